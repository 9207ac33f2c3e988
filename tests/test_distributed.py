"""A run in several processes leaves what a run in one leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from safetensors.numpy import load_file

from recbole_llm import distributed
from recbole_llm.cli import main
from recbole_llm.config import LLMConfig
from recbole_llm.data.candidates import EvalRows
from recbole_llm.distributed import divided, shares
from recbole_llm.errors import ConfigError
from recbole_llm.llm_trainer import LLMTrainer
from recbole_llm.model.llmranker import LLMRanker
from recbole_llm.quick_start import run_recbole_llm
from tests.conftest import prepared, started
from tests.processes import run_together

pytestmark = pytest.mark.usefixtures("one_thread")
faults = pytest.mark.faults
# Some windows longer than a pass, some processes without windows or rows in the end.
UNEVEN = {"token_budget": 64, "train_batch_size": 20}


def left(result: dict[str, Any]) -> dict[str, Any]:
    """What a run leaves that no clock measured."""
    folder = Path(result["run_folder"])
    return {
        "steps": [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
        "adapter": load_file(folder / "adapter_model.safetensors"),
        "rows": (folder / "per_user.csv.gz").read_bytes(),
        "record": json.loads((folder / "result.json").read_text()),
    }


def alike(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Steps, adapter, metrics and rows of two runs agree; log-probs of whole titles relative to their size.

    Left out is the share of margins above 0: in a stage's first step all are 0, and rounding decides.
    """
    assert len(found["steps"]) == len(expected["steps"]) > 0
    for step, other in zip(found["steps"], expected["steps"], strict=True):
        assert step["stage"] == other["stage"]
        step, other = ({k: v for k, v in s.items() if k not in ("stage", "rewards/accuracies")} for s in (step, other))
        assert step == pytest.approx(other, rel=tolerance, abs=tolerance)
    assert found["adapter"].keys() == expected["adapter"].keys()
    for name, tensor in found["adapter"].items():
        np.testing.assert_allclose(tensor, expected["adapter"][name], atol=tolerance)
    assert found["rows"] == expected["rows"]
    for key in ("metrics", "valid_metrics", "train_tokens", "candidate_hash", "rows"):
        assert found["record"][key] == expected["record"][key]


def in_one(settings: dict[str, Any]) -> dict[str, Any]:
    """What the run leaves in a single process, in a folder of its own."""
    return left(run_recbole_llm(config_dict={**settings, "checkpoint_dir": settings["checkpoint_dir"] + "-one"}))


def test_two_processes_leave_what_one_leaves(tiny: dict[str, Any], tmp_path: Path) -> None:
    """SFT, then DMPO; there is one process's log and TensorBoard file alone."""
    settings = {**tiny, "loss": "DMPO"}
    one = in_one(settings)
    logs = [len(list(tmp_path.glob(files))) for files in ("log/*/*", "log_tensorboard/*")]
    first, second = run_together(2, settings)
    assert first["test_result"] == second["test_result"] and first["best_valid_score"] == second["best_valid_score"]
    found = left(first)
    alike(found, one)
    assert found["record"]["processes"] == 2 and found["record"]["test_tokens"] == one["record"]["test_tokens"]
    assert [len(list(tmp_path.glob(files))) for files in ("log/*/*", "log_tensorboard/*")] == [2 * n for n in logs]


# ---- shares


def test_shares() -> None:
    """By hand: 7 to the first, 5 to the second, 4 to the second (5 < 7), 3 to the first, 2 to the second (9 < 10)."""
    assert shares([3, 7, 5, 2, 4], 2) == [[0, 1], [2, 3, 4]]
    assert shares([1], 3) == [[0], [], []]
    assert shares([], 2) == [[], []]
    assert shares([9, 1, 5], 1) == [[0, 1, 2]]


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_shares_are_balanced(parts: int) -> None:
    """Everything once; no share is more than the largest thing above another."""
    sizes = np.random.default_rng(parts).integers(1, 100, 57).tolist()
    found = shares(sizes, parts)
    assert sorted(i for part in found for i in part) == list(range(57))
    weights = [sum(sizes[i] for i in part) for part in found]
    assert max(weights) - min(weights) <= max(sizes)


def as_process(monkeypatch: pytest.MonkeyPatch, rank: int, processes: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(processes))


@pytest.mark.parametrize("processes", [2, 3])
def test_every_row_has_one_process(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    """One process after another plays its part; together they are the evaluation of one."""
    trainer = started(*prepared(tiny, "LLMRanker"))
    for count in (1, 2, 5, 7, 40):
        rows = first_rows(trainer.protocol.test, count)
        trainer.evaluate(rows, load_best_model=False)
        parts = []
        monkeypatch.setattr(
            "recbole_llm.llm_evaluation.gathered", lambda work, parts=parts: parts.append(work()) or parts
        )
        for rank in range(processes):
            as_process(monkeypatch, rank, processes)
            whole = trainer._rank(rows, list(trainer._batches(rows)), False)
        monkeypatch.undo()
        counts = [sum(len(batch["rows"]) for batch in part.batches) for part in parts]
        assert sum(counts) == count and (min(counts) > 0 or count < processes)
        assert max(counts) - min(counts) <= trainer.model.users_at_once
        num_items, counter = trainer.protocol.dataset.item_num, trainer.protocol.item_counter
        _, table = trainer.per_user_evaluator.evaluate_ranking(whole, rows, num_items, counter)
        pd.testing.assert_frame_equal(table, trainer.per_user[table.columns])


def first_rows(rows: EvalRows, count: int) -> EvalRows:
    kept = {name: getattr(rows, name)[:count] for name in ("users", "relevant", "candidates", "hidden", "history")}
    return replace(rows, visible=rows.visible[torch.arange(count)], **kept)


def test_one_process_talks_to_nobody() -> None:
    assert (distributed.world_size(), distributed.rank(), distributed.is_first()) == (1, 0, True)
    assert divided("abc", [3, 1, 2], lambda things: [t.upper() for t in things]) == ["A", "B", "C"]
    parameter = torch.nn.Parameter(torch.ones(2))
    distributed.sum_gradients([parameter])
    assert parameter.grad is None and not torch.distributed.is_initialized()


# ---- what is refused


def test_refused(
    toy: dict[str, Any],
    tiny: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ConfigError, match="--fsdp=True: it spreads .* torchrun --nproc_per_node"):
        run_recbole_llm(config_dict={**tiny, "fsdp": True})
    with pytest.raises(ConfigError, match="use --finetune=lora, or leave --fsdp out"):
        LLMConfig(config_dict={**tiny, "fsdp": True, "finetune": "full"})
    as_process(monkeypatch, 0, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--model=SASRec: it trains in one process; leave torchrun out"):
        run_recbole_llm(config_dict={**toy, "model": "SASRec"})
    assert main(["ls"]) == 2 and "`ls`: it works in one process" in capsys.readouterr().err
    as_process(monkeypatch, 1, 2)  # the first one tells
    assert main(["ls"]) == 2 and not capsys.readouterr().err


# ---- the rest, which takes longer


@faults
@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        (2, {"loss": "SDPO", "rejected": "self_hard", "boundary_negatives": True, **UNEVEN}),
        (3, {"loss": "DPO", "rejected_num": 1, "weight_decay": 0.1, "train_batch_size": 9}),  # a window a step
        (2, {"loss": "RosePO", "oracle_model": "SASRec", "recommender_config": {"epochs": 1}}),
        (2, {"loss": "MultDPO", "chosen_num": 2, "score_norm": "pmi"}),
        (2, {"loss": "DMPO", "fsdp": True}),
        (3, {"loss": "DPO", "rejected_num": 1, "fsdp": True, "gradient_checkpointing": True, **UNEVEN}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_losses(tiny: dict[str, Any], processes: int, changes: dict[str, Any]) -> None:
    settings = {**tiny, **changes}
    alike(left(run_together(processes, settings)[0]), in_one({**settings, "fsdp": False}))


@faults
@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize("kind", ["rerank", "exact", "exact_topk"])
def test_full_ranking(tiny: dict[str, Any], kind: str, fsdp: bool) -> None:
    settings = {**tiny, "eval_args": {"mode": "full"}, "full_ranking": kind, "eval_users": 7, "fsdp": fsdp}
    alike(left(run_together(2, settings)[0]), in_one({**settings, "fsdp": False}))


def not_a_number(rank: int) -> None:
    if rank != 1:
        return
    real, calls = LLMRanker.window_loss, iter(range(10**9))

    def broken(self: LLMRanker, windows: Any, loss: str) -> Any:
        found = real(self, windows, loss)
        return type(found)(found.total * (np.nan if next(calls) == 3 else 1), found.count, found.logged)

    LLMRanker.window_loss = broken


@faults
@pytest.mark.parametrize("fsdp", [False, True])
def test_no_number_in_one_process_stops_all(tiny: dict[str, Any], fsdp: bool) -> None:
    first, second = run_together(2, {**tiny, "fsdp": fsdp}, not_a_number)
    assert first == second and "--learning_rate: the SFT loss became nan in epoch 0, step 3" in first


def out_of_memory(rank: int) -> None:
    real = LLMRanker.window_loss

    def scarce(self: LLMRanker, windows: Any, loss: str) -> Any:
        if rank == 1 and self.budget.tokens > 500:
            raise torch.OutOfMemoryError("planted")
        return real(self, windows, loss)

    LLMRanker.window_loss = scarce


@faults
def test_out_of_memory_in_one_process(tiny: dict[str, Any]) -> None:
    alike(left(run_together(2, tiny, out_of_memory)[0]), in_one(tiny))


LONG = {"loss": "DMPO", "epochs": 8, "preference_epochs": 8, "save_every": 1e-9, "eval_step": 4, "train_batch_size": 20}


def dies(rank: int) -> None:
    real, calls = LLMTrainer._step, iter(range(10**9))

    def step(self: LLMTrainer, *args: Any) -> Any:
        if rank == 1 and next(calls) == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *args)

    LLMTrainer._step = step


@faults
@pytest.mark.parametrize("processes", [1, 3])
def test_goes_on_with_another_number_of_processes(tiny: dict[str, Any], processes: int) -> None:
    settings = {**tiny, **LONG, "epochs": 2, "preference_epochs": 1, "eval_step": 1}
    first, second = run_together(2, settings, dies)
    assert second is None and "Another process of this run has ended" in first
    (result, *_) = run_together(processes, settings)
    found = left(result)
    assert "going on in epoch 0 after step 7" in (Path(result["run_folder"]) / "train.log").read_text()
    alike(found, in_one(settings))


@faults
@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_torchrun_that_is_stopped(tiny: dict[str, Any], tmp_path: Path, how: str) -> None:
    """A process killed in the middle, or Ctrl-C: all end, with an error, and the same command goes on."""
    settings = {**tiny, **LONG}
    del settings["state"]
    flags = [f"--{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "recbole_llm", "run", *flags]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    try:
        workers = _workers_at_work(run, tmp_path)
        victim, number = (workers[1].pid, signal.SIGKILL) if how == "kill" else (run.pid, signal.SIGINT)
        os.kill(victim, number)
        assert run.wait(60) != 0
        psutil.wait_procs(workers, 5)
        assert not [worker for worker in workers if worker.is_running()]
    finally:
        run.kill()
    result, _ = run_together(2, settings)
    assert "going on in epoch" in (Path(result["run_folder"]) / "train.log").read_text()
    unbroken = run_together(2, {**settings, "checkpoint_dir": str(tmp_path / "unbroken")})[0]
    found, expected = left(result), left(unbroken)
    assert found["steps"] == expected["steps"] and found["rows"] == expected["rows"]  # to the last bit
    alike(found, expected, 1e-30)


def _workers_at_work(run: subprocess.Popen[bytes], folder: Path) -> list[psutil.Process]:
    """torchrun's processes, by rank, once they have trained some steps."""
    end = time.monotonic() + 120
    while time.monotonic() < end and run.poll() is None:
        lines = [file.read_text().count("\n") for file in folder.glob("saved/LLMRanker-*/metrics.jsonl")]
        if max(lines, default=0) > 20:
            workers = psutil.Process(run.pid).children()
            return sorted(workers, key=lambda worker: int(worker.environ()["RANK"]))
        time.sleep(0.05)
    raise AssertionError(f"torchrun did not begin to train: {run.poll()}")
