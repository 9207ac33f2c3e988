"""RecBole's models through our runner against RecBole's own ``run_recbole``: the same data, epochs and batches.

    python benchmarks/runner_overhead.py [--models SASRec GRU4Rec] [--epochs=3] [--rounds=3]

Each run has a process of its own, in turns; imports are not timed. All rank all items of ml-100k for every user at
every epoch. *RecBole* trains under torch's anomaly detection, which its SINE switches on for every model; *RecBole,
anomaly detection off* does not. *ours* computes what RecBole computes; *ours, with harm metrics* is our runner as it
comes, with a text encoder's look-alikes besides. All must train as many rows and end within ``--tolerance`` of
RecBole's training loss: batches, and items of equal time, come in other orders.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import arguments, seconds

from results import Results, markdown

RECBOLE, QUICKER = "RecBole", "RecBole, anomaly detection off"
OURS, HARM = "ours", "ours, with harm metrics"
SIDES = (RECBOLE, QUICKER, OURS, HARM)
PARTS = ("wall_s", "cpu_s", "train_s", "evaluate_s")
SETTINGS: dict[str, Any] = {
    "load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]},
    "eval_args": {
        "split": {"LS": "valid_and_test"},
        "group_by": "user",
        "order": "TO",
        "mode": {"valid": "full", "test": "full"},
    },
    "train_neg_sample_args": None,
    "loss_type": "CE",
    "MAX_ITEM_LIST_LENGTH": 20,
    "train_batch_size": 2048,
    "eval_batch_size": 4096,
    "metrics": ["Hit", "NDCG", "MRR"],
    "topk": [1, 5, 10],
    "valid_metric": "NDCG@10",
    "stopping_step": 1000,
    "learning_rate": 0.001,
    "seed": 2020,
    "gpu_id": "",
    "show_progress": False,
    "state": "ERROR",
}


# RecBole's checkpoints hold more than weights, which torch has refused to load since 2.6.
ALLOWED = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}


class Stopwatch:
    """Seconds of a trainer's epochs and evaluations, rows trained, and the last epoch's loss (mean over batches)."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {"train_s": 0.0, "evaluate_s": 0.0, "rows": 0, "loss": 0.0}

    def watch(self, owner: type, method: str, done: Callable[[float, Any, Any], None]) -> None:
        """Hand the seconds of each call of a class's method, its first argument and its result to ``done``."""
        original = getattr(owner, method)

        @functools.wraps(original)
        def timed(trainer: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = original(trainer, data, *args, **kwargs)
            done(time.perf_counter() - start, data, result)
            return result

        setattr(owner, method, timed)

    def epoch(self, seconds: float, data: Any, loss: float) -> None:
        self.found["train_s"] += seconds
        self.found["rows"] += len(data._dataset)
        self.found["loss"] = loss / len(data)

    def evaluation(self, seconds: float, data: Any, result: Any) -> None:
        self.found["evaluate_s"] += seconds


def run_one(side: str, model: str, settings: dict[str, Any], threads: int) -> dict[str, Any]:
    """One run, in this process: seconds, rows, loss and test result."""
    import torch

    # RecBole's quick_start imports ray for hyper-parameter search, which is not used here and need not be installed.
    sys.modules.setdefault("ray", types.SimpleNamespace(tune=None))
    from recbole.quick_start import run_recbole
    from recbole.trainer import Trainer

    from recbole_llm.quick_start import run_recbole_llm
    from recbole_llm.trainer import ProtocolEvaluation

    if side == QUICKER:
        import recbole.model.sequential_recommender  # noqa: F401 - its SINE switches anomaly detection on

        torch.autograd.set_detect_anomaly(False)
    torch.set_num_threads(threads)
    watch = Stopwatch()
    watch.watch(Trainer, "_train_epoch", watch.epoch)
    watch.watch(Trainer if side in (RECBOLE, QUICKER) else ProtocolEvaluation, "evaluate", watch.evaluation)
    if side in (OURS, HARM):  # RecBole does not hide the history of sequential models
        settings = settings | {"mask_history": False, "encoder": "minilm" if side == HARM else "none"}
    runner = run_recbole if side in (RECBOLE, QUICKER) else run_recbole_llm
    wall, cpu = time.perf_counter(), time.process_time()
    sys.argv = sys.argv[:1]  # RecBole reads the command line
    result = runner(model=model, dataset="ml-100k", config_dict=settings)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall_s": wall, "cpu_s": cpu, **watch.found, "test_result": dict(result["test_result"])}


def in_a_process(side: str, model: str, settings: dict[str, Any], threads: int) -> dict[str, Any]:
    """The same in a fresh process and an empty folder."""
    command = [sys.executable, __file__, f"--models={model}", f"--threads={threads}", f"--one={side}"]
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*command, f"--settings={json.dumps(settings)}"],
            cwd=folder,
            env={**os.environ, **ALLOWED, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return json.loads(done.stdout.splitlines()[-1])


def summary(runs: list[dict[str, Any]], right: dict[str, Any], tolerance: float) -> dict[str, Any]:
    """What is written of a side: medians of its runs, or why it does not count."""
    far = max(abs(run["loss"] / right["loss"] - 1) for run in runs)
    record = {"difference": far, "rows": runs[0]["rows"], "test_result": runs[0]["test_result"]}
    if any(run["rows"] != right["rows"] for run in runs):
        return {**record, "failed": f"trains {runs[0]['rows']} rows, RecBole {right['rows']}"}
    if not far <= tolerance:
        return {**record, "failed": f"training loss differs by {far:.1%} from RecBole's"}
    parts = {name: statistics.median(run[name] for run in runs) for name in PARTS[2:]}
    return {**record, **seconds([(run["wall_s"], run["cpu_s"]) for run in runs]), **parts}


def measured(model: str, settings: dict[str, Any], rounds: int, threads: int, tolerance: float) -> dict[str, Any]:
    """A cell: all sides in turns, the first of a round being the last of the next."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            runs[side].append(in_a_process(side, model, settings, threads))
    records = {side: summary(found, runs[RECBOLE][0], tolerance) for side, found in runs.items()}
    return {"settings": settings, "times_recbole": over_recbole(records), "sides": records}


def over_recbole(records: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Each side's seconds over RecBole's: in all by the wall and by the processor, in training, in evaluation."""
    right = records[RECBOLE]
    return {
        name: {part.removesuffix("_s"): record[part] / right[part] for part in PARTS}
        for name, record in records.items()
        if "wall_s" in record
    }


def main(argv: list[str] | None = None) -> Results | None:
    """Measure the cells that are asked for and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["SASRec", "GRU4Rec"])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--tolerance", type=float, default=0.02, help="of the training loss, relative")
    parser.add_argument("--settings", type=json.loads, default={}, help="RecBole keys that both sides get, as JSON")
    parser.add_argument("--one", choices=SIDES, help=argparse.SUPPRESS)
    args = arguments(parser, argv)
    if args.one:
        print(json.dumps(run_one(args.one, args.models[0], args.settings, args.threads)))
        return None
    results = Results("runner_overhead", args)
    settings = {**SETTINGS, "epochs": args.epochs, **args.settings}
    cells = {f"{model}, {args.epochs} epochs": model for model in args.models}
    for cell in results.todo(cells):
        results.keep(cell, measured(cells[cell], settings, args.rounds, args.threads, args.tolerance))
    print(table(results))
    return results


def table(results: Results) -> str:
    """Markdown: a row for each model and side."""
    return markdown(
        [
            {
                "model": cell,
                "side": name,
                "wall s": side.get("wall_s"),
                "CPU s": side.get("cpu_s"),
                "training s": side.get("train_s"),
                "evaluation s": side.get("evaluate_s"),
                **{f"/ RecBole, {part}": times for part, times in record["times_recbole"].get(name, {}).items()},
                "Hit@10": side["test_result"]["hit@10"],
                "": side.get("failed", ""),
            }
            for cell, record in results.cells.items()
            for name, side in record["sides"].items()
        ]
    )


if __name__ == "__main__":
    found = main()
    sys.exit(found and found.exit_message)
