"""Finished runs -> one table, as Markdown and CSV. Runs with different candidates never share one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from recbole_llm.errors import UserError
from recbole_llm.run_folder import write_text


def comparison(runs: Sequence[dict[str, Any]], metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """One line a run: label, metrics, and what it cost.

    Args:
        runs: ``result.json`` records, each with a ``label``; a failed run has ``error`` instead of ``metrics``.
        metrics: columns; None = all that every finished run has.

    Raises:
        UserError: the runs were evaluated on different candidates.
    """
    finished = [run for run in runs if "metrics" in run]
    hashes = {run["candidate_hash"] for run in finished}
    if len(hashes) > 1:
        told = ", ".join(f"{run['label']} {run['candidate_hash'][:12]}" for run in finished)
        raise UserError(f"These runs were evaluated on different candidates and cannot stand in one table: {told}. Run them "
                        "with the same data, eval_args, eval_users and candidate_seed.")
    if metrics is None:
        metrics = [m for m in (finished[0]["metrics"] if finished else []) if all(m in run["metrics"] for run in finished)]
    lines = []
    for run in runs:
        line: dict[str, Any] = {"model": run["label"]}
        line.update({m: run["metrics"][m] if "metrics" in run else None for m in metrics})
        timings = run.get("timings", {})
        line.update({"trainable parameters": run.get("trainable_parameters"), "train s": timings.get("train_s"),
                     "test s": timings.get("test_s"), "note": "failed: " + run["error"] if "error" in run else ""})
        lines.append(line)
    return pd.DataFrame(lines)


def to_markdown(table: pd.DataFrame, runs: Sequence[dict[str, Any]]) -> str:
    """The table with its conditions above it; the best of each metric in bold."""
    shown = table.copy().astype(object)
    plain = ("model", "trainable parameters", "train s", "test s", "note")
    for column in (c for c in table.columns if c not in plain):
        values = pd.to_numeric(table[column])
        smaller = column.split("@")[0] in SMALLER_IS_BETTER
        best = values.min() if smaller else values.max()
        shown[column] = [_metric(v, v == best) for v in values]
    for column in ("train s", "test s"):
        shown[column] = [f"{v:.1f}" if pd.notna(v) else "" for v in table[column]]
    shown["trainable parameters"] = [f"{int(v):,}" if pd.notna(v) else "" for v in table["trainable parameters"]]
    if not table["note"].any():
        shown = shown.drop(columns="note")
    shown["model"] = [str(m).replace("|", "\\|") for m in shown["model"]]
    body = shown.to_markdown(index=False, disable_numparse=True, colalign=["left"] + ["right"] * (len(shown.columns) - 1))
    return f"{conditions(runs)}\n\n{body}\n"


SMALLER_IS_BETTER = ("averagepopularity", "giniindex")


def _metric(value: float, best: bool) -> str:
    if pd.isna(value):
        return ""
    return f"**{value:.4f}**" if best else f"{value:.4f}"


def conditions(runs: Sequence[dict[str, Any]]) -> str:
    """One line that says what all runs share."""
    run = next((r for r in runs if "metrics" in r), None)
    if run is None:
        return "No run finished."
    few = f"few-shot: {run['training_users']} training users" if run["few_shot"] else "all training users"
    seeds = sorted({r["seed"] for r in runs if "metrics" in r})
    return (
        f"{run['dataset']} · {few}, {run['training_interactions']:,} training interactions · test: {run['rows']} rows, {run['mode']}, "
        f"candidate hash {run['candidate_hash'][:12]} · seed {', '.join(map(str, seeds))} · "
        f"recbole_llm {run['versions']['recbole_llm']}, torch {run['versions']['torch']}"
    )


def write_comparison(table: pd.DataFrame, runs: Sequence[dict[str, Any]], folder: Path, name: str) -> list[Path]:
    """Write ``<name>.md`` and ``<name>.csv`` (full precision); returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    markdown, csv = folder / f"{name}.md", folder / f"{name}.csv"
    write_text(markdown, to_markdown(table, runs))
    write_text(csv, table.to_csv(index=False))
    return [markdown, csv]
