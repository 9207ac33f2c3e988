"""Results and comparisons -> tables as a reader sees them, in no format yet (``formats`` writes them down)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from recbole_llm.report.caption import caption, harm_caption, tests_caption
from recbole_llm.report.entries import Options
from recbole_llm.report.results import Line, Results, direction, is_harm, merit, metric_name
from recbole_llm.report.runs import stood_still
from recbole_llm.report.significance import alternative_of

DIGITS = 4
ARROWS = {"larger": " ↑", "smaller": " ↓", "zero": " → 0", None: ""}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Value:
    """One cell: its text, the spread over seeds, its place in the column, and the baselines it is told from.

    Attributes:
        place: 1 = the best, 2 = the second, 0 = neither.
        better, worse: letters of the baselines it is significantly better or worse than.
    """

    text: str
    spread: str = ""
    place: int = 0
    better: str = ""
    worse: str = ""


@dataclass(frozen=True)
class Table:
    """``header`` and ``rows`` of equal length; the first ``left`` columns are text. ``name`` is a short identifier."""

    name: str
    title: str
    caption: str
    header: list[str]
    rows: list[list[Value]]
    left: int = 1
    notes: list[str] = field(default_factory=list)


def results_table(
    results: Results, tests: pd.DataFrame, against: Sequence[str], options: Options, number: int
) -> Table:
    """Accuracy: mean over seeds, their standard deviation, best and second, who is told from whom."""
    columns = accuracy_columns(results, options)
    letters = {b: LETTERS[i] for i, b in enumerate(against)}
    tested = [b for b in against if any(line.label == b for line in results.finished)]
    used = {b: letters[b] for b in tested} if not tests.empty and (tests["verdict"] != "").any() else {}
    body = _metric_columns(results.finished, columns, tests, letters)
    header = ["Model", *(metric_name(c) + ARROWS[direction(c)] for c in columns)] + ["Result"] * (not columns)
    failed = [Value("failed"), *[Value("")] * (len(header) - 2)]
    rows = [
        [Value(_lettered(line.label, used)), *((body[line.label] or [Value("")]) if line.runs else failed)]
        for line in results.lines
    ]
    told = caption(results, columns, tests, tested, options, used)
    lacks = [m for m in options.table_metrics or () if results.records and m.lower() not in map(str.lower, columns)]
    notes = [f"{m}: not every run has it." for m in lacks] + _notes(results)
    notes += [f"No test against {b}: no run of it finished." for b in against if results.finished and b not in tested]
    return Table(f"results-{number}", results.title, told, header, rows, notes=notes)


def harm_table(
    results: Results, tests: pd.DataFrame, against: Sequence[str], options: Options, number: int
) -> Table | None:
    """What the rankings do besides hitting, at the largest K; None where nothing is known of it."""
    columns = _largest_k([m for m in results.metrics() if is_harm(m)])
    if not columns:
        return None
    letters = {b: LETTERS[i] for i, b in enumerate(against)}
    body = _metric_columns(results.finished, columns, tests, letters)
    rows = [[Value(line.label), *body[line.label]] for line in results.finished]
    header = ["Model", *(metric_name(c) + ARROWS[direction(c)] for c in columns)]
    told = harm_caption(columns, tests, options)
    return Table(f"harm-{number}", f"Harm: {results.title}", told, header, rows)


def significance_table(results: Results, tests: pd.DataFrame, options: Options, number: int) -> Table | None:
    """Every comparison of the first shown metric that selects models, else of the last shown; None without any."""
    metric = primary_metric(results, options)
    if metric is None or tests.empty or metric not in set(tests["metric"]):
        return None
    neither = "not told apart" if alternative_of(metric, options) == "two-sided" else "not better"
    rows = []
    for row in tests[tests["metric"] == metric].to_dict("records"):
        rows.append(
            [
                Value(row["model"]),
                Value(row["baseline"]),
                Value(f"{row['difference']:+.{DIGITS}f}"),
                Value(f"[{row['ci_low']:+.{DIGITS}f}, {row['ci_high']:+.{DIGITS}f}]"),
                Value("" if np.isnan(row["d"]) else f"{row['d']:+.2f}"),
                Value(f"{row['wins']}/{row['ties']}/{row['losses']}"),
                Value(p_text(row["p_t"])),
                Value(p_text(row["p_randomization"])),
                Value(p_text(row["p_holm"]), place=int(row["verdict"] != "")),
                Value(row["verdict"] or neither),
            ]
        )
    header = [
        "Model",
        "Against",
        "Difference",
        "95 % interval",
        "d",
        "W/T/L",
        "p (t)",
        "p (rand.)",
        "p (Holm)",
        "Verdict",
    ]
    title = f"{metric_name(metric)} against the baseline: {results.title}"
    return Table(f"tests-{number}", title, tests_caption(results, metric, options), header, rows, left=2)


def costs_table(every: Iterable[Results]) -> Table:
    """What each model took, mean over its finished runs. Measured by the clock, so apart from the results."""
    rows, tried = [], False
    for results in every:
        for line in results.finished:
            rows.append([Value(results.title), Value(line.label), *map(Value, _costs(line.runs))])
            tried |= any(str(s.get("run")).startswith("trials/") for run in line.runs for s in run.get("stages", []))
    measured = ["Train s", "Test s", "CPU min", "Train tokens", "Test tokens", "Peak GB"]
    header = ["Setting", "Model", "Runs", "Parameters trained", *measured]
    told = (
        "Means over the finished runs of each model. A stage that several runs share (SFT under several losses) is "
        "counted where it was run; its train tokens are in each. Seconds are of the machine that did a run, and of "
        "what else it did."
    )
    if tried:
        told += " Stages that a trial of the search trained are in the minutes of trials alone, and so missing here."
    return Table("costs", "Costs", told, header, rows, left=2)


def _costs(runs: Sequence[dict[str, Any]]) -> list[str]:
    def mean(values: Iterable[float | None], form: str) -> str:
        known = [v for v in values if v is not None]
        return format(np.mean(known), form) if known else ""

    timings = [run.get("timings", {}) for run in runs]
    processor = [t.get("total_cpu_s") for t in timings]
    memory = [run.get("peak_memory_bytes") for run in runs]
    return [
        str(len(runs)),
        mean((run.get("trainable_parameters") for run in runs), ",.0f"),
        mean((t.get("train_s") for t in timings), ",.1f"),
        mean((t.get("test_s") for t in timings), ",.1f"),
        mean((None if p is None else p / 60 for p in processor), ",.1f"),
        mean((run.get("train_tokens") for run in runs), ",.0f"),
        mean((run.get("test_tokens") for run in runs), ",.0f"),
        mean((None if m is None else m / 1e9 for m in memory), ".2f"),
    ]


def frame_table(name: str, title: str, told: str, frame: pd.DataFrame, left: int) -> Table:
    """Any frame of texts and numbers as a table."""
    rows = [["" if pd.isna(v) else f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in frame.values]
    return Table(name, title, told, list(frame.columns), [[Value(v) for v in row] for row in rows], left)


def accuracy_columns(results: Results, options: Options) -> list[str]:
    """``table_metrics`` as far as the runs have them; else every accuracy metric at the two largest K, and what selects
    epochs."""
    there = results.metrics()
    if options.table_metrics:
        asked = [m.lower() for m in options.table_metrics]
        return [m for a in asked for m in there if m.lower() == a]
    accuracy = [m for m in there if not is_harm(m)]
    largest = sorted({int(m.split("@")[1]) for m in accuracy if "@" in m})[-2:]
    selects = _selecting(results)
    return [m for m in accuracy if "@" not in m or int(m.split("@")[1]) in largest or m in selects]


def primary_metric(results: Results, options: Options) -> str | None:
    """The metric that selects epochs of most runs, decided before any test; where it is not shown, the last that is."""
    columns = accuracy_columns(results, options)
    selects = [metric for metric, _ in _selecting(results).most_common() if metric in columns]
    return next(iter(selects or columns[-1:]), None)


def _selecting(results: Results) -> Counter[str]:
    return Counter(run.get("valid_metric", "").lower() for run in results.records)


def p_text(p: float) -> str:
    """A p-value as papers print it; empty where there is none (a single user)."""
    if np.isnan(p):
        return ""
    return "< .001" if p < 0.001 else f"{p:.3f}".lstrip("0") if p < 1 else "1"


def _lettered(label: str, letters: dict[str, str]) -> str:
    return f"{label} ({letters[label]})" if label in letters else label


def _metric_columns(
    lines: Sequence[Line], columns: Sequence[str], tests: pd.DataFrame, letters: dict[str, str]
) -> dict[str, list[Value]]:
    """Label -> its values."""
    told = (
        {}
        if tests.empty
        else {(r["model"], r["metric"], r["baseline"]): r["verdict"] for r in tests.to_dict("records")}
    )
    swapped = {"better": "worse", "worse": "better", "": ""}
    for (model, metric, baseline), verdict in list(told.items()):  # two baselines are compared once, and both marked
        told.setdefault((baseline, metric, model), swapped[verdict])
    body: dict[str, list[Value]] = {line.label: [] for line in lines}
    for column in columns:
        means = np.array([line.by_seed[column].mean() if column in line.by_seed else np.nan for line in lines])
        for line, mean, place in zip(lines, means, _places(column, means), strict=True):
            found = {b: told.get((line.label, column, b), "") for b in letters}
            body[line.label].append(
                Value(
                    "" if np.isnan(mean) else f"{mean:.{DIGITS}f}",
                    _spread(line.by_seed.get(column)),
                    place,
                    "".join(letters[b] for b, verdict in found.items() if verdict == "better"),
                    "".join(letters[b] for b, verdict in found.items() if verdict == "worse"),
                )
            )
    return body


def _places(metric: str, means: np.ndarray) -> list[int]:
    """1 for the best value, 2 for the second, by the digits shown: what looks equal is equal."""
    merits = merit(metric, np.array([float(f"{mean:.{DIGITS}f}") for mean in means]))
    known = np.unique(merits[~np.isnan(merits)])[::-1]
    return [1 + int(np.searchsorted(-known, -m)) if not np.isnan(m) and m in known[:2] else 0 for m in merits]


def _spread(values: pd.Series | None) -> str:
    if values is None or values.notna().sum() < 2:
        return ""
    return f"{values.std(ddof=1):.{DIGITS}f}"


def _notes(results: Results) -> list[str]:
    """Which runs are missing and why; an error may hold anything."""
    notes = []
    for line in results.lines:
        for error in dict.fromkeys(line.errors):
            count = f"{len(line.errors)} of {len(line.errors) + len(line.runs)} runs " if line.runs else ""
            notes.append(f"{line.label}: {count}failed: {' '.join(error.split())}")
        still = [s["loss"] for run in line.runs for s in run.get("stages", []) if stood_still(s)]
        if still:
            notes.append(
                f"{line.label}: in {len(still)} of {len(line.runs)} runs the {still[0]} loss ended where it starts: "
                "that stage changed next to nothing."
            )
    return notes


def _largest_k(columns: Sequence[str]) -> list[str]:
    """Of the columns ``name@K`` of each name the one of the largest K, in the order of the names."""
    largest: dict[str, str] = {}
    for column in sorted(columns, key=lambda c: int(c.partition("@")[2] or 0)):
        largest[column.split("@")[0]] = column
    return [largest[name] for name in dict.fromkeys(c.split("@")[0] for c in columns)]
