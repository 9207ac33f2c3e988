"""Every benchmark runs, with the random LLM; its gate passes what is equal and refuses to time what is not."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from recbole_llm.data.atomic import dataset_folder
from recbole_llm.llm.tiny import tiny_llm
from recbole_llm.topk_search import Found

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"

pytestmark = pytest.mark.usefixtures("one_thread")

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def script() -> Callable[[str], ModuleType]:
    """A benchmark as a module, found where its own script would find what it imports."""

    def load(name: str) -> ModuleType:
        if str(FOLDER) not in sys.path:
            sys.path.append(str(FOLDER))
        return importlib.import_module(name)

    return load


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A benchmark's main function with the random LLM, one round, in a temporary folder; returns its results."""
    monkeypatch.chdir(tmp_path)

    def with_tiny(module: ModuleType, *flags: str) -> Any:
        return module.main(["--llm=tiny", "--rounds=1", f"--out={tmp_path}", *flags])

    return with_tiny


def assert_timed(results: Any, *, cells: int, ours: str) -> None:
    """Every side of every cell was equal and timed, and the file says so."""
    written = json.loads(results.file.read_text())["cells"]
    assert len(written) == cells and results.exit_message is None
    for cell in written.values():
        assert {"rounds", "took_s", "load_average_before", "environment"} <= set(cell)
        assert {"git_commit", "torch_threads", "processor", "versions"} <= set(cell["environment"])
        assert ours in cell["sides"]
        for side in cell["sides"].values():
            assert side["difference"] < 1e-3
            assert 0 < side["least_wall_s"] <= side["wall_s"] and side["cpu_s"] > 0
    assert ours in results.table(ours)


def test_scoring(script: Run, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    module = script("score_candidates")
    flags = ("--prompt", "30", "--candidates", "4", "6")
    results = run(module, *flags)
    assert_timed(results, cells=2, ours=module.OURS)
    cell = results.cells["P=30 N=6"]
    assert set(cell["times_faster"]) == {module.PLAIN, module.KEEP, module.CACHE, module.OURS}
    assert cell["sides"][module.PLAIN]["tokens"] == 6 * (30 + max(cell["title_tokens"]))
    assert cell["sides"][module.OURS]["tokens"] == 30 + sum(cell["title_tokens"]) - 6
    again = run(module, *flags, "12")
    assert capsys.readouterr().out.count("kept from before") == 2
    assert again.cells["P=30 N=6"] == cell and "P=30 N=12" in again.cells


def test_a_wrong_side_is_not_timed(script: Run, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its cell is measured again the next time."""
    module = script("score_candidates")
    flags = ("--prompt", "20", "--candidates", "3")
    with monkeypatch.context() as patch:
        patch.setattr(module, "batch_logps", lambda model, trees, right=module.batch_logps: right(model, trees) + 2e-3)
        results = run(module, *flags)
    side = results.cells["P=20 N=3"]["sides"][module.OURS]
    assert "failed" in side and "wall_s" not in side
    assert "ours: differs by 2.0e-03" in results.exit_message
    assert "wall_s" in results.cells["P=20 N=3"]["sides"][module.PLAIN]
    assert_timed(run(module, *flags), cells=1, ours=module.OURS)


def test_nan_does_not_pass(script: Run) -> None:
    common = script("common")
    sides = {"broken": common.Side(lambda: float("nan"))}
    assert "failed" in common.compare(sides, lambda found: found, 1.0, 1)["broken"]


def test_preference_step(script: Run, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """All sides, TRL where it is installed; one whose gradients are 1 % off is refused."""
    module = script("train_preference")
    monkeypatch.setattr(module, "SIDES", module.SIDES[0 if importlib.util.find_spec("trl") else 2 :])
    flags = ("--prompt", "25", "--k", "2", "--trl_default")
    results = run(module, *flags)
    assert_timed(results, cells=1, ours=module.OURS)
    sides = results.cells["P=25 k=2"]["sides"]
    assert set(sides) == set(module.SIDES)
    assert sides[module.OURS]["difference"] < 1e-5 < module.TOLERANCE * 1.01
    answers = results.cells["P=25 k=2"]["answer_tokens"]
    assert sides[module.SEQUENCES]["tokens"] == 3 * (25 + max(answers))
    if module.TRL in sides:
        assert sides[module.TRL]["tokens"] == 4 * (25 + max(answers))
        assert sides[module.TRL]["reference_precomputed"] and not sides[module.TRL_DEFAULT]["reference_precomputed"]
        assert sides[module.TRL_DEFAULT]["gradient_checkpointing"]
        assert sides[module.TRL]["padding_free"] is True or "padding" in sides[module.TRL]["padding_free"]
    monkeypatch.setattr(module, "SIDES", (module.OURS,))
    monkeypatch.setattr(
        module, "batch_logps", lambda model, trees, right=module.batch_logps: right(model, trees) * 1.01
    )
    assert "ours, reference cached: differs" in run(module, *flags, "--again").exit_message


def test_sides_too_large_are_not_run(script: Run, run: Run) -> None:
    module = script("train_preference")
    sides = run(module, "--prompt", "25", "--k", "1", "--most_gib=0").cells["P=25 k=1"]["sides"]
    assert sides[module.SEQUENCES]["not_run"].startswith("not run: memory")
    assert "wall_s" in sides[module.OURS] and "wall_s" not in sides[module.SEQUENCES]


def test_memory(script: Run, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe sees what a side holds; the parent writes what each process printed."""
    module = script("train_preference")
    held: list[torch.Tensor] = []

    def grow() -> torch.Tensor:
        held.append(torch.ones(64 * 2**20))  # 256 MiB: more than the allocator may have kept of earlier tests
        return torch.zeros(3)

    monkeypatch.setattr(module, "side", lambda *about: script("common").Side(grow, lambda found: (found, found)))
    found = module.probe(module.OURS, "tiny", [1], [[2]])
    assert found["growth_bytes"] == pytest.approx(3 * 256 * 2**20, rel=0.1)
    assert found["peak_bytes"] > found["growth_bytes"]
    said = SimpleNamespace(returncode=0, stdout=json.dumps(found) + "\n")
    died = SimpleNamespace(returncode=-9, stdout="")
    monkeypatch.setattr(
        module.subprocess, "run", lambda command, **how: died if f"--probe={module.OURS}" in command else said
    )
    results = run(module, "--memory", "--prompt", "25", "--k", "1")
    sides = results.cells["P=25 k=1"]["sides"]
    assert sides[module.SEQUENCES] == found and "status -9" in sides[module.OURS]["failed"]
    assert results.file.name == "train_memory-tiny.json" and "ours" in results.exit_message


def test_stream(script: Run, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("stream_training")
    flags = ("--history", "5", "--k", "2", "--gated", "3")
    results = run(module, *flags)
    assert_timed(results, cells=2, ours=module.OURS)
    pairs = results.cells["preference k=2 L=5"]
    assert pairs["sides"][module.OURS]["difference_by_hand"] < 1e-5
    assert pairs["positions"] == 5 and pairs["sides"][module.OURS]["positions_a_second"] > 0
    tokens = {name: side["tokens"] for name, side in results.cells["SFT L=5"]["sides"].items()}
    assert tokens[module.OURS] == results.cells["SFT L=5"]["tokens_of_history"] < tokens[module.SINGLE]
    monkeypatch.setattr(module, "one_by_one", lambda window: [window, window])  # every position twice
    failed = run(module, *flags, "--again")
    assert "preference k=2 L=5, ours, one window a position: differs" in failed.exit_message


@pytest.mark.slow
def test_catalogue(script: Run, run: Run) -> None:
    module = script("full_catalogue")
    flags = ("--form", "bare", "--users", "2", "--history", "4", "--train_users", "5")
    results = run(module, *flags)
    assert_timed(results, cells=1, ours=module.TOPK)
    cell = results.cells["bare, K=10, history 4, 2 users"]
    assert cell["titles"] == 1682 and len(cell["expansions"]) == cell["users"] == 2
    assert cell["hit"]["exact"] == cell["hit"]["exact_topk"]
    assert {module.PLAIN, module.CACHE} < set(cell["times_faster"][module.EXACT])


def test_catalogue_gate(script: Run) -> None:
    """A missed title, an invented one and a wrong score are told from rounding and ties."""
    module = script("full_catalogue")
    full = np.array([-np.inf, -1.0, -2.0, -3.0, -3.00001, -9.0])
    nothing = np.zeros(0, dtype=int)

    def differs(items: list[int], scores: list[float], hidden: np.ndarray = nothing) -> float:
        return module.disagreement(Found(np.array(items), np.array(scores)), full, 3, hidden)

    assert differs([1, 2, 3], [-1, -2, -3]) == 0
    assert differs([2, 1, 4], [-2, -1, -3]) == pytest.approx(1e-5, rel=0.01)
    assert differs([1, 2, 3], [-1, -2.5, -3]) == pytest.approx(0.5)
    assert differs([1, 2, 5], [-1, -2, -9]) == np.inf
    assert differs([1, 2], [-1, -2]) == np.inf
    assert differs([3, 4, 5], [-3, -3.00001, -9], np.array([1, 2])) == 0
    assert differs([1, 2, 3], [-1, -2, -3], np.array([1, 2])) == np.inf


def test_catalogue_metrics(script: Run) -> None:
    module = script("full_catalogue")
    found = Found(np.array([7, 8, 9]), np.array([-3.0, -1.0, -2.0]))
    assert module.metrics(found, 8, 3) == (1.0, 1.0)
    assert module.metrics(found, 7, 3) == (1.0, 0.5)
    assert module.metrics(found, 7, 2) == module.metrics(found, 5, 3) == (0.0, 0.0)


def test_kernels(script: Run, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("cpu_kernels")
    flags = ("--prompt", "30", "--candidates", "4", "--k", "2")
    results = run(module, *flags)
    assert_timed(results, cells=2, ours=module.ON)
    assert set(results.cells["step P=30 k=2"]["kernels"]) == {"layers", "head"}

    def other_weights(llm: str, right: Run = module.load, **options: Any) -> Any:
        return right(llm, seed=len(options))

    monkeypatch.setattr(module, "load", other_weights)
    assert "fast_linears on: differs" in run(module, *flags, "--again").exit_message


def test_runner(script: Run, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Medians over rounds, sides in turns; other data or another loss does not count."""
    module = script("runner_overhead")
    asked: list[str] = []
    changed: dict[str, Any] = {}

    def in_a_process(side: str, model: str, settings: dict[str, Any], threads: int) -> dict[str, Any]:
        asked.append(side)
        seconds = {"wall_s": 10.0 + asked.count(side), "cpu_s": 5.0, "train_s": 4.0, "evaluate_s": 2.0}
        found = {**seconds, "rows": 100, "loss": 3.0, "test_result": {"hit@10": 0.5}}
        return found | (changed if side == module.OURS else {"wall_s": 20.0})

    monkeypatch.setattr(module, "in_a_process", in_a_process)
    results = run(module, "--models", "SASRec", "--rounds=3")
    assert_timed(results, cells=1, ours=module.OURS)
    assert asked == [*module.SIDES, *reversed(module.SIDES), *module.SIDES]
    assert results.cells["SASRec, 3 epochs"]["times_recbole"][module.OURS] == {
        "wall": 0.6,
        "cpu": 1,
        "train": 1,
        "evaluate": 1,
    }
    changed["rows"] = 99
    assert "trains 99 rows, RecBole 100" in run(module, "--models", "SASRec", "--again").exit_message
    changed.update(rows=100, loss=3.3)
    assert "differs by 10.0%" in run(module, "--models", "SASRec", "--again").exit_message


@pytest.mark.slow
@pytest.mark.parametrize("side", ["RECBOLE", "OURS"])
def test_runner_in_a_process(script: Run, side: str) -> None:
    """Both runners on the most active users alone; a user of n films has n - 3 rows of training."""
    module = script("runner_overhead")
    settings = {**module.SETTINGS, "epochs": 1, "user_inter_num_interval": "[450,inf)"}
    found = module.in_a_process(getattr(module, side), "GRU4Rec", settings, 1)
    assert 0 < found["train_s"] + found["evaluate_s"] < found["wall_s"]
    assert found["loss"] == pytest.approx(7.4, abs=0.2)  # about ln 1682 before anything is learned
    films = pd.read_csv(dataset_folder("", "ml-100k") / "ml-100k.inter", sep="\t")["user_id:token"].value_counts()
    assert found["rows"] == (films[films >= 450] - 3).sum()
    assert set(found["test_result"]) > {"hit@10", "ndcg@10"}


@pytest.mark.parametrize(("name", "flags"), [("gpu_scoring", ["--candidates=3"]), ("gpu_training", ["--k=2"])])
def test_gpu_sides_without_a_gpu(script: Run, run: Run, name: str, flags: list[str]) -> None:
    """The same code on a CPU: all sides pass the gate, and the table is written."""
    module = script(name)
    sizes = ["--prompt=20", "--users=4", "--tokens", "150", "--product=128", "--title=3"]
    results = run(module, "--device=cpu", *sizes, *flags)
    (cell,) = results.cells.values()
    ours = module.OURS if name == "gpu_scoring" else module.CACHED
    assert results.exit_message is None and ours in cell["times_faster"]
    for side in cell["sides"].values():
        assert side["difference"] <= cell["allowed_difference"] < 0.1
        assert side["users_a_second"] > 0 < side["useful_mfu"] and side["users_a_pass"] in (1, 2, 3, 4)


def test_operations(script: Run) -> None:
    """Those of one padded batch equal torch's own count, which takes all pairs of tokens where causality needs half."""
    operations = script("operations")
    model, _ = tiny_llm()
    model.set_attn_implementation("eager")
    work = operations.one_sequence_each(10, [3, 5], every_row=True)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(2, 15, dtype=torch.long))
    assert (work.tokens, work.head_rows, work.pairs) == (30, 30, 15**2)
    all_pairs = operations.Work(30, 30, 2 * 15**2)
    assert counter.get_total_flops() == operations.scoring(model, all_pairs)
    least = operations.shared_prompt(10, [3, 5])
    assert (least.tokens, least.head_rows) == (16, 7)
    assert least.pairs == 50 + (20 + 2) + (40 + 8)


def test_arguments(script: Run) -> None:
    """Results go to the repository's own folder unless told otherwise."""
    args = script("common").arguments(argparse.ArgumentParser(), [])
    assert args.out == FOLDER.parent / "results" / "benchmarks" and args.rounds >= 5
