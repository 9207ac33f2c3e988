"""What a comparison found, in plain sentences written from its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from recbole_llm.report.entries import Options
from recbole_llm.report.grid import Cell
from recbole_llm.report.results import Results, direction, merit, metric_name
from recbole_llm.report.significance import alternative_of
from recbole_llm.report.table import DIGITS, p_text, primary_metric


@dataclass(frozen=True)
class Comparison:
    """A comparison that is done.

    Attributes:
        cells, records: every run, and what came of it.
        every, tests: its settings, and of each the tests as ``significance.comparisons`` gives them.
        against: labels of the baselines, as the tables show them.
    """

    cells: Sequence[Cell]
    records: Sequence[dict[str, Any]]
    every: Sequence[Results]
    tests: Sequence[pd.DataFrame]
    against: Sequence[str]
    options: Options


def compared(comparison: Comparison) -> str:
    """How many models, on what, and how many runs failed."""
    every = comparison.every
    data = list(dict.fromkeys(run["dataset"] for results in every for run in results.records))
    seeds = list(dict.fromkeys(str(run["seed"]) for results in every for run in results.records))
    ended = dict(zip((cell.folder for cell in comparison.cells), comparison.records, strict=True))  # two may be one run
    failed = sum("error" in record for record in ended.values())
    parts = [
        _count(len(every[0].lines), "model") + (f" on {' and '.join(data)}" if data else ""),
        _count(len(every), "setting"),
        f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}" if seeds else "no seed",
        _count(len(ended), "run") + (f", {failed} of them failed" if failed else ""),
    ]
    return "; ".join(parts) + "."


def found(results: Results, tests: pd.DataFrame, against: Sequence[str], options: Options) -> str:
    """The best model of a setting by its primary metric, and whether it is told apart from the baselines."""
    metric = primary_metric(results, options)
    lines = [line for line in results.finished if metric in line.by_seed]
    if not lines or metric is None:
        return "No run finished." if not results.finished else "The finished runs share no metric of the table."
    if direction(metric) is None:
        return f"{metric_name(metric)} says nothing about which model is best."
    means = np.array([float(f"{line.by_seed[metric].mean():.{DIGITS}f}") for line in lines])
    value = dict(zip([line.label for line in lines], means, strict=True))
    merits = merit(metric, means)
    best = [line.label for line, m in zip(lines, merits, strict=True) if m == merits.max()]
    told = [f"{metric_name(metric)}: {' and '.join(best)} {'is' if len(best) == 1 else 'are'} best"]
    told[0] += f" ({value[best[0]]:.{DIGITS}f})."
    mine = tests[tests["metric"] == metric] if len(tests) else tests
    for baseline in against:
        if baseline in best:
            told.append(_above_others(mine, baseline, metric, options))
        else:
            told += [_against(mine, name, baseline, value, metric, options, alone=len(best) == 1) for name in best]
    return " ".join(told)


def _above_others(tests: pd.DataFrame, baseline: str, metric: str, options: Options) -> str:
    """The best is the baseline: who is told apart from it?"""
    rows = tests[tests["baseline"] == baseline] if len(tests) else tests
    elsewhere = len(tests) and (tests["model"] == baseline).any()  # against another baseline, told of next
    if elsewhere and (not len(rows) or alternative_of(metric, options) == "better"):
        return f"{baseline} is a baseline itself."
    if not len(rows):
        return f"{baseline} is the baseline; there is no other to test."
    if alternative_of(metric, options) == "better":
        return f"{baseline} is the baseline; the tests are one-sided, and do not ask whether it is better than others."
    worse = rows.loc[rows["verdict"] == "worse", "model"]
    if len(worse) == len(rows):
        return f"{baseline} is the baseline, and significantly better than {_all(len(rows))}."
    same = ", ".join(rows.loc[rows["verdict"] != "worse", "model"])
    return (
        f"{baseline} is the baseline, and significantly better than {len(worse)} of {_count(len(rows), 'other')}; not "
        f"told apart from it: {same}."
    )


def _against(
    tests: pd.DataFrame, model: str, baseline: str, value: dict[str, float], metric: str, options: Options, alone: bool
) -> str:
    """The best against a baseline; ``alone`` there is no other best."""
    row = _pair(tests, model, baseline)
    if row is None or row["users"] < 2:
        return f"There is no test of {model} against the baseline {baseline}."
    none = "not told apart from" if alternative_of(metric, options) == "two-sided" else "not significantly better than"
    relation = {"better": "significantly better than", "worse": "significantly worse than", "": none}
    facts = (
        f"difference {row['difference']:+.{DIGITS}f}, 95 % interval [{row['ci_low']:+.{DIGITS}f}, "
        f"{row['ci_high']:+.{DIGITS}f}], {_p(row['p_holm'])} after Holm's correction, {row['users']:,} users"
    )
    told = f"{'It' if alone else model} is {relation[row['verdict']]} the baseline {baseline} "
    told += f"({value[baseline]:.{DIGITS}f}): {facts}."
    if not row["verdict"]:
        told += f" A true difference of {row['detectable']:.{DIGITS}f} would be seen in 4 of 5 such studies at best."
    return told


def _pair(tests: pd.DataFrame, model: str, baseline: str) -> dict[str, Any] | None:
    """Their row; where both are baselines it may stand the other way round, and is turned."""
    if not len(tests):
        return None
    for ours, other, turned in ((model, baseline, False), (baseline, model, True)):
        rows = tests[(tests["model"] == ours) & (tests["baseline"] == other)].to_dict("records")
        if rows and not turned:
            return rows[0]
        if rows:
            row = rows[0]
            verdict = {"better": "worse", "worse": "better", "": ""}[row["verdict"]]
            span = {"difference": -row["difference"], "ci_low": -row["ci_high"], "ci_high": -row["ci_low"]}
            return row | span | {"verdict": verdict}
    return None


def _p(value: float) -> str:
    text = p_text(value)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _all(number: int) -> str:
    return "the other" if number == 1 else f"all {number} others"
