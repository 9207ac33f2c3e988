"""A stage that is cut off at any step goes on there, and nobody can tell from what it leaves."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recbole_llm.errors import UserError
from recbole_llm.llm_trainer import LLMTrainer
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.resume import FILES, random_facts, random_tensors, read_save, set_random, stopping
from tests.conftest import toy_settings, write_dataset

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.injects]
# Dropout draws from torch's generator at every step; validation after every epoch selects one.
LONG = {"loss": "DMPO", "epochs": 2, "preference_epochs": 2, "lora_dropout": 0.1, "save_every": 1e-9, "eval_step": 1}


class Killed(BaseException):
    """As good as kill -9: nothing of ours handles it."""


@pytest.fixture
def long(tiny: dict[str, Any]) -> dict[str, Any]:
    return {**tiny, **LONG, "train_batch_size": 64}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that nothing cut off, and how many steps it took."""
    folder = tmp_path_factory.mktemp("unbroken")
    before = os.getcwd()
    os.chdir(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        settings = toy_settings(write_dataset(folder / "data"), folder / "saved")
        settings |= {"model": "LLMRanker", "llm": "tiny", **LONG, "train_batch_size": 64}
        result = run_recbole_llm(config_dict=settings)
    finally:
        torch.set_num_threads(threads)
        os.chdir(before)
    return {"left": left(Path(result["run_folder"])), "result": result["test_result"]}


def left(folder: Path) -> dict[str, Any]:
    """What a run leaves that no clock measured."""
    record = json.loads((folder / "result.json").read_text())
    timed = ("seconds", "cpu_seconds", "reused", "reference", "found")  # what of the reference was read or computed
    return {
        "adapter": (folder / "adapter_model.safetensors").read_bytes(),
        "rows": (folder / "per_user.csv.gz").read_bytes(),
        "steps": (folder / "metrics.jsonl").read_text(),
        "stages": [{k: v for k, v in stage.items() if k not in timed} for stage in record["stages"]],
    }


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int, where: str = "_step") -> Callable[[], None]:
    """From now on the run dies in its ``step``-th call of a method of the trainer."""
    calls, real = iter(range(10**9)), getattr(LLMTrainer, where)

    def dies(self: LLMTrainer, *args: Any, **how: Any) -> Any:
        if next(calls) == step:
            raise Killed
        return real(self, *args, **how)

    monkeypatch.setattr(LLMTrainer, where, dies)
    return lambda: monkeypatch.setattr(LLMTrainer, where, real)


def test_kills_at_random_steps(
    long: dict[str, Any], unbroken: dict[str, Any], monkeypatch: pytest.MonkeyPatch, case: Callable[..., None]
) -> None:
    """Killed again and again after a few more steps, through both stages: adapter, rows and every step are equal."""
    draw, kills = random.Random(int.from_bytes(os.urandom(4))), 0
    while True:
        alive = kill_at(monkeypatch, draw.randint(1, 5))
        try:
            result = run_recbole_llm(config_dict=long)
            break
        except Killed:
            kills += 1
        finally:
            alive()
    found = left(Path(result["run_folder"]))
    assert kills >= 4
    case("kills survived", kills)
    assert found["adapter"] == unbroken["left"]["adapter"] and found["rows"] == unbroken["left"]["rows"]
    assert found["steps"] == unbroken["left"]["steps"]
    assert found["stages"] == unbroken["left"]["stages"]
    assert not list(Path(long["checkpoint_dir"]).glob("**/progress-*"))  # nothing is left to go on with


@pytest.mark.parametrize("where", ["_valid_epoch", "_save_checkpoint"])
def test_kills_around_validation(
    long: dict[str, Any],
    unbroken: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    case: Callable[..., None],
    where: str,
) -> None:
    """After the last step of an epoch, before its validation and before the best epoch is kept."""
    case("kills survived")
    alive = kill_at(monkeypatch, 1, where)
    with pytest.raises(Killed):
        run_recbole_llm(config_dict=long)
    alive()
    found = left(Path(run_recbole_llm(config_dict=long)["run_folder"]))
    assert found["adapter"] == unbroken["left"]["adapter"] and found["rows"] == unbroken["left"]["rows"]
    assert found["steps"] == unbroken["left"]["steps"]


def test_a_damaged_save_is_told_and_the_one_before_is_used(
    long: dict[str, Any],
    unbroken: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    case: Callable[..., None],
) -> None:
    case("kills survived", 3), case("faults injected", 3)
    for damage in (lambda data: data[: len(data) // 2], lambda data: data[:-4] + b"\0\1\2\3", lambda data: b""):
        alive = kill_at(monkeypatch, 2)
        with pytest.raises(Killed):
            run_recbole_llm(config_dict=long)
        alive()
        saves = list(Path(long["checkpoint_dir"]).glob("**/progress-*.safetensors"))
        newest = max(saves, key=lambda file: read_save(file)[1]["saved"])
        newest.write_bytes(damage(newest.read_bytes()))
        assert read_save(newest) is None and f"{newest} is damaged" in caplog.text
    found = left(Path(run_recbole_llm(config_dict=long)["run_folder"]))
    assert found["adapter"] == unbroken["left"]["adapter"] and found["rows"] == unbroken["left"]["rows"]


def test_both_saves_damaged_begins_anew(
    long: dict[str, Any], unbroken: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = kill_at(monkeypatch, 4)
    with pytest.raises(Killed):
        run_recbole_llm(config_dict=long)
    alive()
    for file in Path(long["checkpoint_dir"]).glob("**/progress-*.safetensors"):
        file.write_bytes(b"x")
    assert left(Path(run_recbole_llm(config_dict=long)["run_folder"])) == unbroken["left"]


def test_what_was_refused_is_gone(long: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that begins anew and is cut off early goes on where it was, not where the one before it had been."""
    alive = kill_at(monkeypatch, 5)
    with pytest.raises(Killed):
        run_recbole_llm(config_dict=long)
    alive()
    alive = kill_at(monkeypatch, 2)
    with pytest.raises(Killed):
        run_recbole_llm(config_dict={**long, "resume": False})
    alive()
    done, real = [], LLMTrainer._step
    monkeypatch.setattr(LLMTrainer, "_step", lambda self, *a, **h: done.append(1) or real(self, *a, **h))
    folder = Path(run_recbole_llm(config_dict=long)["run_folder"])
    assert len(done) == len((folder / "metrics.jsonl").read_text().splitlines()) - 2


def test_seconds_before_a_kill_count(long: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage and run took what they took in all processes, up to the last save of each."""
    real = LLMTrainer._step

    def slow(self: LLMTrainer, *args: Any, **how: Any) -> Any:
        time.sleep(0.2)
        return real(self, *args, **how)

    monkeypatch.setattr(LLMTrainer, "_step", slow)
    alive = kill_at(monkeypatch, 4)
    with pytest.raises(Killed):
        run_recbole_llm(config_dict={**long, "loss": "SFT"})
    alive()
    folder = Path(run_recbole_llm(config_dict={**long, "loss": "SFT"})["run_folder"])
    record = json.loads((folder / "result.json").read_text())
    (stage,) = record["stages"]
    assert stage["seconds"] > 0.2 * stage["steps"] and record["timings"]["train_s"] > 0.2 * stage["steps"]


def test_resume_can_be_refused(long: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """``resume=False`` begins the stage anew: every step is done again; the run is the same run."""
    alive = kill_at(monkeypatch, 4)
    with pytest.raises(Killed):
        run_recbole_llm(config_dict=long)
    alive()
    counted, real = [], LLMTrainer._step
    monkeypatch.setattr(LLMTrainer, "_step", lambda self, *args: (counted.append(1), real(self, *args))[1])
    folder = Path(run_recbole_llm(config_dict={**long, "resume": False, "save_every": 0})["run_folder"])
    steps = [stage["steps"] for stage in json.loads((folder / "result.json").read_text())["stages"]]
    assert len(counted) == sum(steps)


def test_ctrl_c_finishes_the_step_and_keeps_it(
    long: dict[str, Any], unbroken: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any save by the clock; the signal comes in the middle of a step."""
    real, calls = LLMTrainer._step, iter(range(10**9))

    def interrupted(self: LLMTrainer, *args: Any) -> Any:
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args)

    monkeypatch.setattr(LLMTrainer, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_recbole_llm(config_dict={**long, "save_every": 1000})
    monkeypatch.setattr(LLMTrainer, "_step", real)
    (save,) = Path(long["checkpoint_dir"]).glob("**/progress-*.safetensors")
    assert read_save(save)[1]["steps"] == 3
    assert left(Path(run_recbole_llm(config_dict=long)["run_folder"])) == unbroken["left"]


def test_the_second_ctrl_c_is_as_always() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt), stopping() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.asked
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_full_disk(long: dict[str, Any], monkeypatch: pytest.MonkeyPatch, case: Callable[..., None]) -> None:
    case("faults injected")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("recbole_llm.resume.write_tensors", full)
    with pytest.raises(UserError, match="--checkpoint_dir: where the stage is could not be saved .*Free some space"):
        run_recbole_llm(config_dict=long)
    assert not [f for name in FILES for f in Path(long["checkpoint_dir"]).glob(f"**/{name}*")]


def test_random_generators_go_on() -> None:
    np.random.seed(3), torch.manual_seed(3), random.seed(3)
    np.random.normal(), random.gauss(0, 1)  # both keep a second value
    tensors, facts = random_tensors(torch.device("cpu")), json.loads(json.dumps(random_facts()))
    draws = [(np.random.normal(), torch.rand(1).item(), random.gauss(0, 1)) for _ in range(3)]
    set_random(tensors, facts, torch.device("cpu"))
    assert [(np.random.normal(), torch.rand(1).item(), random.gauss(0, 1)) for _ in range(3)] == draws
