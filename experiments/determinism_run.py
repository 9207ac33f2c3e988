"""One run of experiments/determinism.py in a process of its own, and the scores of what it left.

    python experiments/determinism_run.py asked.json scores.npz

A finished run is not run again. The model is built anew and its scores of the frozen test rows are taken before and
after the run's weights are loaded: ``before`` and ``after`` ``[R, C]`` in the order of the rows' candidates (nats for
LLMRanker), ``target`` ``[R]`` the column of the target, ``users`` ``[R]``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from recbole_llm.config import LLMConfig
from recbole_llm.data.candidates import EvalRows
from recbole_llm.quick_start import build_trainer, read_data, run_recbole_llm
from recbole_llm.report.compare import compare

SCORING = {"users_at_once", "rows_shuffled", "candidates_reversed"}


def main() -> None:
    """Do the run that is asked for, where it is not done, and write its scores."""
    asked, out = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    folder = Path(asked["folder"]) if asked["folder"] else trained(asked)
    found = observed(asked["model"], asked["settings"], folder, asked["scoring"])
    with open(out.with_suffix(".tmp"), "wb") as file:
        np.savez(file, **found)
    out.with_suffix(".tmp").rename(out)


def trained(asked: dict[str, Any]) -> Path:
    """The folder of the finished run."""
    model, settings = asked["model"], asked["settings"]
    if finished(settings["checkpoint_dir"], model) is None:
        if asked["jobs"]:  # in a process that the comparison starts
            out = str(Path(settings["checkpoint_dir"]) / "tables")
            compare([model], "ml-100k", {**settings, "jobs": asked["jobs"], "out": out})
        else:
            run_recbole_llm(model, "ml-100k", None, settings)
    return finished(settings["checkpoint_dir"], model)


def finished(checkpoint_dir: str, model: str) -> Path | None:
    """A finished run's folder; a condition has one of a model."""
    return next((file.parent for file in Path(checkpoint_dir).glob(f"{model}-ml-100k-*/result.json")), None)


def observed(model: str, settings: dict[str, Any], folder: Path, scoring: dict[str, Any]) -> dict[str, np.ndarray]:
    """What the module says, from a run's settings and folder."""
    if wrong := set(scoring) - SCORING:
        raise ValueError(f"no such way of scoring: {wrong}")
    config = LLMConfig(model, "ml-100k", config_dict=settings)
    protocol = read_data(config, None)
    weights = folder / f"{model}.pth"
    with TemporaryDirectory() as scratch:  # a trainer that starts empties the step metrics of its folder
        trainer = build_trainer(config, protocol, Path(scratch), None)
        before = scores(trainer, protocol.test, scoring)
        trainer._load_checkpoint(str(weights if weights.is_file() else folder))
        after = scores(trainer, protocol.test, scoring)
        trainer.tensorboard.close()
    rows = protocol.test
    target = (rows.candidates == rows.relevant).argmax(1)
    return {"before": before, "after": after, "target": target, "users": rows.user_tokens[rows.users].astype(str)}


@torch.no_grad()
def scores(trainer: Any, rows: EvalRows, scoring: dict[str, Any]) -> np.ndarray:
    """Scores of all candidates ``[R, C]`` through the evaluation's own path, as its batches have it or as asked."""
    trainer.model.eval()
    reverse = bool(scoring.get("candidates_reversed"))
    asked = replace(rows, candidates=np.ascontiguousarray(rows.candidates[:, ::-1])) if reverse else rows
    found = np.full(rows.candidates.shape, np.nan)
    for batch in _batches(trainer, asked, scoring):
        found[batch] = trainer.score_rows(asked, batch)[0].double().cpu().numpy()
    return found[:, ::-1] if reverse else found


def _batches(trainer: Any, rows: EvalRows, scoring: dict[str, Any]) -> Iterator[np.ndarray]:
    if not (scoring.keys() & {"users_at_once", "rows_shuffled"}):
        yield from trainer._batches(rows)
        return
    order = np.random.default_rng(1).permutation(len(rows)) if scoring.get("rows_shuffled") else np.arange(len(rows))
    size = scoring.get("users_at_once", 16)
    yield from (order[first : first + size] for first in range(0, len(rows), size))


if __name__ == "__main__":
    main()
