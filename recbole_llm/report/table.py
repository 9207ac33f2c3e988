"""Finished runs -> one table, as Markdown and CSV. Runs with different candidates never share one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from recbole.evaluator.register import smaller_metrics

from recbole_llm.errors import UserError
from recbole_llm.harm import HARM
from recbole_llm.run_folder import write_text

NOT_METRICS = ("model", "trainable parameters", "train s", "test s", "cpu min", "note")
GENERATED = "generation/"  # metrics of free answers, which only some models give


def comparison(runs: Sequence[dict[str, Any]], metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """One line a run: label, metrics, and what it cost.

    Args:
        runs: ``result.json`` records, each with a ``label``; a failed one has ``error``, no ``metrics``.
        metrics: columns; None = all that every finished run has, and those of free answers that any has.

    Raises:
        UserError: the runs were evaluated on different candidates.
    """
    finished = [run for run in runs if "metrics" in run]
    hashes = {run["candidate_hash"] for run in finished}
    if len(hashes) > 1:
        told = ", ".join(f"{run['label']} {run['candidate_hash'][:12]}" for run in finished)
        raise UserError(
            f"These runs were evaluated on different candidates, and share no table: {told}. "
            "Run them with the same data, --eval_args, --eval_users and --candidate_seed."
        )
    if metrics is None:
        every = dict.fromkeys(m for run in finished for m in run["metrics"])
        metrics = [m for m in every if m.startswith(GENERATED) or all(m in run["metrics"] for run in finished)]
    lines = []
    for run in runs:
        line: dict[str, Any] = {"model": run["label"]}
        line.update({m: run.get("metrics", {}).get(m) for m in metrics})
        timings = run.get("timings", {})
        processor = timings.get("total_cpu_s")
        line |= {
            "trainable parameters": run.get("trainable_parameters"),
            "train s": timings.get("train_s"),
            "test s": timings.get("test_s"),
            "cpu min": None if processor is None else processor / 60,
            "note": f"failed: {run['error']}" if "error" in run else "",
        }
        lines.append(line)
    return pd.DataFrame(lines)


def to_markdown(table: pd.DataFrame, runs: Sequence[dict[str, Any]]) -> str:
    """Accuracy and cost, below it harm at the largest K and free answers; conditions above, the best in bold."""
    harm = [c for c in table.columns if c.split("@")[0] in HARM or c.startswith(GENERATED)]
    shown = _best_in_bold(table.drop(columns=harm))
    for column in ("train s", "test s", "cpu min"):
        shown[column] = [f"{v:.1f}" if pd.notna(v) else "" for v in table[column]]
    weights = table["trainable parameters"]
    shown["trainable parameters"] = [f"{int(v):,}" if pd.notna(v) else "" for v in weights]
    for column in ("model", "note"):  # an error may hold anything
        shown[column] = [" ".join(str(text).split()).replace("|", "\\|") for text in table[column]]
    if not table["note"].any():
        shown = shown.drop(columns="note")
    parts = [conditions(runs), _aligned(shown)]
    if harm:
        finished = table[harm].notna().any(axis=1)
        below = _best_in_bold(table.loc[finished, _largest_k(harm)])
        below.insert(0, "model", shown.loc[finished, "model"])
        parts += ["Harm", _aligned(below)]
    return "\n\n".join(parts) + "\n"


def _best_in_bold(table: pd.DataFrame) -> pd.DataFrame:
    """Metrics as text, the best of each column in bold; other columns as they are."""
    shown = table.copy().astype(object)
    for column in (c for c in table.columns if c not in NOT_METRICS):
        values = pd.to_numeric(table[column])
        name = column.split("@")[0].lower()
        goodness = {"larger": values, "smaller": -values, "zero": -values.abs(), None: values * np.nan}
        best = HARM.get(name, "smaller" if name in smaller_metrics else "larger")
        merit = goodness[None if name.startswith(GENERATED) else best]  # shares of a few answers
        shown[column] = [_metric(v, good) for v, good in zip(values, merit == merit.max(), strict=True)]
    return shown


def _largest_k(columns: Sequence[str]) -> list[str]:
    """Of the columns ``name@K`` of each name the one of the largest K, in the order of the names."""
    largest: dict[str, str] = {}
    for column in sorted(columns, key=lambda c: int(c.partition("@")[2] or 0)):
        largest[column.split("@")[0]] = column
    return [largest[name] for name in dict.fromkeys(c.split("@")[0] for c in columns)]


def _aligned(shown: pd.DataFrame) -> str:
    right = ["right"] * (len(shown.columns) - 1)
    return shown.to_markdown(index=False, disable_numparse=True, colalign=["left", *right])


def _metric(value: float, best: bool) -> str:
    if pd.isna(value):
        return ""
    return f"**{value:.4f}**" if best else f"{value:.4f}"


def conditions(runs: Sequence[dict[str, Any]]) -> str:
    """One line that says what the runs share; where they differ, each value."""
    finished = [run for run in runs if "metrics" in run]
    if not finished:
        return "No run finished."
    run = finished[0]
    users = [_users(r) for r in finished]
    events = [f"{r['training_interactions']:,}" for r in finished]
    return " · ".join(
        (
            run["dataset"],
            f"{_each(users)}, {_each(events)} training interactions",
            f"test: {run['rows']} rows, {_asked(run)}, candidate hash {run['candidate_hash'][:12]}",
            f"seed {_each(r['seed'] for r in finished)}",
            f"recbole_llm {_each(r['versions']['recbole_llm'] for r in finished)}, "
            f"torch {_each(r['versions']['torch'] for r in finished)}",
        )
    )


def _asked(run: dict[str, Any]) -> str:
    ahead = run.get("next_items", 1)  # older records lack it
    return run["mode"] if ahead == 1 else f"the next {ahead} items, {run['mode']}"


def _users(run: dict[str, Any]) -> str:
    if run["training_users"] is None:
        return "all training users"
    return ("few-shot: " if run["few_shot"] else "") + f"{run['training_users']} training users"


def _each(values: Iterable[Any]) -> str:
    return " / ".join(dict.fromkeys(map(str, values)))


def write_comparison(table: pd.DataFrame, runs: Sequence[dict[str, Any]], folder: Path, name: str) -> list[Path]:
    """Write ``<name>.md`` and ``<name>.csv`` (full precision); returns their paths.

    Raises:
        UserError: the folder cannot be written; the runs' own folders are untouched.
    """
    markdown, csv = folder / f"{name}.md", folder / f"{name}.csv"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(markdown, to_markdown(table, runs))
        write_text(csv, table.to_csv(index=False))
    except OSError as error:
        raise UserError(
            f"--checkpoint_dir={folder}: could not write the table ({error}). Free some space "
            "and give the same command again; finished runs are kept."
        ) from error
    return [markdown, csv]
