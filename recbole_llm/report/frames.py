"""Results in full precision, as frames for CSV files and plain data for JSON."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from recbole_llm.report.results import Line, Results, from_to, training_data
from recbole_llm.report.significance import LEVEL
from recbole_llm.report.stats import bootstrap_interval

FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # what a spreadsheet takes for the beginning of a formula, or trims


def setting_columns(results: Results) -> dict[str, Any]:
    """What tells this table's rows from those of another."""
    run = results.records[0] if results.records else {}
    return {
        "dataset": results.data,
        "few_shot": run.get("few_shot", results.setting.few_shot),
        "mode": run.get("mode", results.setting.mode),
    }


def line_columns(line: Line) -> dict[str, Any]:
    """Where a line has training data or users of its own, they win over the table's."""
    if not line.runs:
        return line.trained_on
    run = line.runs[0]
    return {"dataset": from_to(run["dataset"], [training_data(run)]), "few_shot": run.get("few_shot")}


def results_frame(every: Sequence[Results]) -> pd.DataFrame:
    """One row a setting and model: ``dataset, few_shot, mode, model, seeds, failed, parameters``, then each metric.

    A metric's mean over seeds stands under its name, its standard deviation over seeds (empty for one seed) under
    ``<metric> std``.
    """
    rows = []
    for results in every:
        metrics = results.metrics()
        for line in results.lines:
            asked = setting_columns(results) | line_columns(line)
            row = asked | {
                "model": line.label,
                "seeds": " ".join(str(run["seed"]) for run in line.runs),
                "failed": len(line.errors),
                "trainable parameters": line.runs[0]["trainable_parameters"] if line.runs else None,
            }
            if line.runs:
                found = line.by_seed.reindex(columns=metrics)
                row |= found.mean().to_dict()
                row |= {f"{m} std": s for m, s in found.std(ddof=1).items()} if len(line.runs) > 1 else {}
            rows.append(row)
    frame = pd.DataFrame(rows).astype({"few_shot": "Int64", "trainable parameters": "Int64"})
    spreads = [c for c in frame.columns if c.endswith(" std")]
    return frame[[c for c in frame.columns if c not in spreads] + spreads]


def spreadsheet_csv(frame: pd.DataFrame) -> str:
    """CSV in which a spreadsheet finds no formula: a text that begins like one gets an apostrophe; numbers stay.

    Texts are quoted, all of them: a bare carriage return that is not would begin a row, and there another formula.
    """

    def guarded(value: Any) -> Any:
        return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value

    def guarded_column(column: pd.Series) -> pd.Series:
        return pd.Series([*map(guarded, column)], column.index, column.dtype)

    return frame.rename(columns=guarded).apply(guarded_column).to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC)


def intervals(results: Results, resamples: int, metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """95 % bootstrap intervals over users of every model's means: ``model, metric, mean, ci_low, ci_high, users``.

    Args:
        metrics: only these; an interval does not hang on which others are asked for.
    """
    rows = [(line, m) for line in results.finished for m in line.users.columns if metrics is None or m in metrics]
    if not rows:
        return pd.DataFrame(columns=["model", "metric", "mean", "ci_low", "ci_high", "users"])
    values = np.stack([line.users[metric].to_numpy() for line, metric in rows])
    known = ~np.isnan(values).all(axis=1)
    rows, values = [row for row, k in zip(rows, known, strict=True) if k], values[known]
    low, high = bootstrap_interval(values, LEVEL, resamples)
    return pd.DataFrame(
        {
            "model": [line.label for line, _ in rows],
            "metric": [metric for _, metric in rows],
            "mean": np.nanmean(values, axis=1),
            "ci_low": low,
            "ci_high": high,
            "users": (~np.isnan(values)).sum(1),
        }
    )


def tests_frame(every: Sequence[Results], tests: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The comparisons of all settings in one frame."""
    frames = []
    for results, found in zip(every, tests, strict=True):
        if not len(found):
            continue
        frame = found.copy()
        for place, (name, value) in enumerate(setting_columns(results).items()):
            frame.insert(place, name, value)
        own = {line.label: line_columns(line) for line in results.finished}
        for name in ("dataset", "few_shot"):
            frame[name] = [own[model][name] for model in frame["model"]]
        frames.append(frame)
    if not frames:
        return pd.DataFrame(columns=["dataset", "metric", "model"])
    return pd.concat(frames, ignore_index=True).astype({"few_shot": "Int64"})


def as_json(every: Sequence[Results], tests: Sequence[pd.DataFrame], resamples: int) -> list[dict[str, Any]]:
    """Everything that the tables say, and what they were made from; nothing that a clock measured."""
    found = []
    for results, compared in zip(every, tests, strict=True):
        records = results.records
        spans = intervals(results, resamples)
        versions = records[0]["versions"] if records else None
        found.append(
            setting_columns(results)
            | {
                "candidate_hash": records[0]["candidate_hash"] if records else None,
                "data_hash": records[0]["data_hash"] if records else None,
                "rows": records[0]["rows"] if records else None,
                "versions": versions,
                "models": [_model(line, spans[spans["model"] == line.label], versions) for line in results.lines],
                "tests": _plain_rows(compared),
            }
        )
    return found


def _model(line: Line, spans: pd.DataFrame, versions: dict[str, str] | None) -> dict[str, Any]:
    """``versions`` are the table's; a run that had others says which."""
    return {
        "model": line.label,
        **line_columns(line),
        "runs": [
            {"seed": run["seed"], "run": run["run_hash"], "device": run["device"], "metrics": run["metrics"]}
            | ({} if run["versions"] == versions else {"versions": run["versions"]})
            for run in line.runs
        ],
        "failed": line.errors,
        "intervals": _plain_rows(spans.drop(columns="model")),
    }


def _plain_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON takes them: NaN is null."""
    return [
        {key: None if isinstance(value, float) and not np.isfinite(value) else value for key, value in row.items()}
        for row in frame.to_dict("records")
    ]
