"""Peak memory and tokens of a run, as result.json has them."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from recbole_llm import costs, quick_start
from recbole_llm.costs import Clock, Peak, TokenCount, waiting
from recbole_llm.llm_trainer import LLMTrainer
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.report.plot_data import run_seconds

pytestmark = pytest.mark.usefixtures("one_thread")

MIB = 2**20
CPU = torch.device("cpu")
linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot forget an earlier peak")
FEW = {"few_shot": 10, "eval_users": 12, "train_batch_size": 16, "stopping_step": 100}


def record_of(settings: dict[str, Any], model: str | None = None) -> dict[str, Any]:
    folder = Path(run_recbole_llm(model, config_dict=settings)["run_folder"])
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def touch(size: int) -> None:
    """Hold so many bytes for a moment."""
    held = bytearray(size)
    held[::4096] = b"1" * len(held[::4096])


@linux
def test_peak_is_of_what_runs_after_it() -> None:
    gc.collect()  # else what other tests left is given back to the system between the two peaks
    ctypes.CDLL(None).malloc_trim(0)
    first = Peak(CPU)
    touch(400 * MIB)
    large = first.bytes()
    second = Peak(CPU)
    touch(50 * MIB)
    small = second.bytes()
    assert small is not None and large is not None
    assert large - small == pytest.approx(350 * MIB, abs=40 * MIB)


def test_peak_that_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(costs, "PROCESS", tmp_path / "none")
    assert Peak(CPU).bytes() is None


@linux
def test_each_run_of_a_process_has_its_own_peak(toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    record_of({**toy, "seed": 1}, "Pop")  # what is loaded once
    plain = record_of(toy, "Pop")["peak_memory_bytes"]
    prepare = quick_start.prepare_data

    def larger(config: Any) -> Any:
        touch(400 * MIB)
        return prepare(config)

    with monkeypatch.context() as patch:
        patch.setattr(quick_start, "prepare_data", larger)
        large = record_of(toy, "Pop")["peak_memory_bytes"]
    assert large - plain == pytest.approx(400 * MIB, abs=80 * MIB)
    assert record_of(toy, "Pop")["peak_memory_bytes"] == pytest.approx(plain, abs=80 * MIB)


def test_a_model_of_recboles_has_no_tokens(toy: dict[str, Any]) -> None:
    assert not {"train_tokens", "test_tokens"} & set(record_of(toy, "Pop"))


def test_a_stage_that_was_there_counts_its_tokens(tiny: dict[str, Any]) -> None:
    first = record_of({**tiny, **FEW})
    second = record_of({**tiny, **FEW, "loss": "DMPO", "rejected_num": 2})
    assert second["train_tokens"] == first["train_tokens"] + second["stages"][1]["tokens"]


def test_a_stage_of_an_earlier_process_is_the_runs_own(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off after SFT, and given again when it was whole, a run took what its stages took; each counted once."""
    settings = {**tiny, **FEW, "loss": "DMPO", "rejected_num": 2}
    real = LLMTrainer._run_stage

    def dies(self: LLMTrainer, stage: Any, *args: Any) -> Any:
        if stage.loss == "DMPO":
            raise KeyboardInterrupt
        return real(self, stage, *args)

    monkeypatch.setattr(LLMTrainer, "_run_stage", dies)
    with pytest.raises(KeyboardInterrupt):
        run_recbole_llm(config_dict=settings)
    monkeypatch.setattr(LLMTrainer, "_run_stage", real)
    for _ in range(2):
        run = record_of(settings)
        assert not any("reused" in stage for stage in run["stages"])
        for train, total, seconds in (
            ("train_s", "total_s", "seconds"),
            ("train_cpu_s", "total_cpu_s", "cpu_seconds"),
        ):
            took = sum(stage[seconds] for stage in run["stages"])
            assert took <= run["timings"][train] <= run["timings"][total]
            assert run_seconds(run, cpu="cpu" in total) == run["timings"][total]


def test_a_stage_of_a_trial_is_not_the_runs(tiny: dict[str, Any]) -> None:
    """Its seconds are among those of the search."""
    run_recbole_llm(config_dict={**tiny, **FEW}, saved=False)
    (stage,) = record_of({**tiny, **FEW})["stages"]
    assert stage["reused"] and stage["run"].startswith("trials/")


def test_count_ends_with_its_block() -> None:
    class Body(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> None:
            pass

    body = Body()
    with TokenCount(body) as count:
        body(input_ids=torch.zeros(2, 5))
        body(input_ids=torch.zeros(1, 3))
    body(input_ids=torch.zeros(1, 100))
    assert count.tokens == 13


def test_waiting_for_another_process_costs_nothing() -> None:
    clock = Clock()
    with waiting():
        time.sleep(0.3)
    clock.lap("work")
    assert clock.spent()[0] < 0.2 and clock.timings()["work_s"] < 0.2
