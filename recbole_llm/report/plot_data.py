"""The numbers behind the plots of a comparison, as frames; ``plot`` draws them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recbole_llm.report.frames import intervals, setting_columns
from recbole_llm.report.results import Line, Results, merit, user_traits
from recbole_llm.report.runs import done_before
from recbole_llm.report.significance import LEVEL
from recbole_llm.report.stats import bootstrap_interval

BINS = 5  # of users, as many in each
LIFT = "popularity_lift@"
CURVES = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/chosen_shift")
FALLEN = -0.1  # nats below the reference: chosen titles are 10 % less likely


def has_users(results: Results, metric: str) -> bool:
    """Whether a run has finished, and the metric is known user by user."""
    return bool(results.finished) and metric in results.finished[0].users


def metric_means(results: Results, metric: str, resamples: int) -> pd.DataFrame:
    """Every model's mean over users: ``model, mean, ci_low, ci_high, seeds`` (the mean of each seed, a list)."""
    found = intervals(results, resamples, [metric]).drop(columns=["metric", "users"])
    seeds = {line.label: [float(users[metric].mean()) for users in line.users_by_seed] for line in results.finished}
    return found.assign(seeds=found["model"].map(seeds))


# Few-shot


@dataclass(frozen=True)
class FewShot:
    """How a metric grows with the training users, on one data set in one mode.

    Attributes:
        points: ``model, users, mean, ci_low, ci_high``; ``users`` is NaN for all users.
    """

    dataset: str
    mode: str
    metric: str
    points: pd.DataFrame


def few_shot_curves(told: Sequence[tuple[Results, str]], resamples: int) -> list[FewShot]:
    """A curve of each data set and mode with two sizes or more.

    Args:
        told: settings and the metric of each; the first of a curve's is taken.
    """
    groups: dict[tuple[str, str], list[tuple[Results, str]]] = {}
    for results, metric in told:
        if results.setting.few_shot_given:
            columns = setting_columns(results)
            groups.setdefault((columns["dataset"], columns["mode"]), []).append((results, metric))
    found = []
    for (dataset, mode), members in groups.items():
        metric = members[0][1]
        parts = []
        for results, _ in members:
            users = {line.label: line.runs[0]["training_users"] for line in results.finished}
            means = metric_means(results, metric, resamples).drop(columns="seeds")
            parts.append(means.assign(users=means["model"].map(users).astype(float)))
        points = pd.concat(parts, ignore_index=True)
        if points["users"].nunique(dropna=False) > 1:
            found.append(FewShot(dataset, mode, metric, points))
    return found


# Costs


def on_cpu(every: Sequence[Results]) -> bool:
    """Whether every run was; else processor seconds are not what it took."""
    return all(run.get("device", "cpu") == "cpu" for results in every for run in results.records)


def run_seconds(run: dict[str, Any], cpu: bool) -> float:
    """Processor seconds (else those of the clock) that the result took; NaN where no one measured.

    What was found done (``done_before``) is counted with what it took where it was done.
    """
    total = run.get("timings", {}).get("total_cpu_s" if cpu else "total_s", np.nan)
    return total + sum(part.get("cpu_seconds" if cpu else "seconds", np.nan) for part in done_before(run))


def costs(results: Results, metric: str, resamples: int, cpu: bool) -> pd.DataFrame:
    """As ``metric_means`` with ``seconds`` and trained ``parameters``, means over a model's runs."""
    seconds = {line.label: np.mean([run_seconds(run, cpu) for run in line.runs]) for line in results.finished}
    sizes = {
        line.label: np.mean([run.get("trainable_parameters", np.nan) for run in line.runs]) for line in results.finished
    }
    found = metric_means(results, metric, resamples)
    return found.assign(seconds=found["model"].map(seconds), parameters=found["model"].map(sizes))


def pareto(cost: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Which points no other beats: none costs as little or less and is worth more, or costs less and is worth as much.

    Args:
        cost: the less the better ``[N]``; NaN is beaten.
        value: the more the better ``[N]``.
    """
    at_least = (cost[None] <= cost[:, None]) & (value[None] >= value[:, None])
    better = (cost[None] < cost[:, None]) | (value[None] > value[:, None])
    return ~(at_least & better).any(1) & ~np.isnan(cost) & ~np.isnan(value)


def front(frame: pd.DataFrame, cost: str, metric: str) -> pd.DataFrame:
    """The rows of ``costs`` that no other beats, the cheapest first."""
    best = pareto(frame[cost].to_numpy(), merit(metric, frame["mean"].to_numpy()))
    return frame[best].sort_values(cost, kind="stable")


# Kinds of users


def by_trait(results: Results, metric: str, trait: str, resamples: int) -> pd.DataFrame | None:
    """Every model's mean over users alike: ``model, bin, label, users, mean, ci_low, ci_high``.

    Users stand in ``BINS`` bins by quantiles, so that each holds as many; equal values share one, so there may be
    fewer. None where the runs do not tell, or all users are alike.

    Args:
        trait: one of ``results.TRAITS``.
    """
    traits = user_traits(results.records[0])
    if trait not in traits:
        return None
    values = traits[trait]
    # The numbers of the bins; the quantiles of few values may coincide.
    bins = pd.qcut(values, BINS, labels=False, duplicates="drop").to_numpy()
    kinds = np.unique(bins[~np.isnan(bins)])
    if len(kinds) < 2:
        return None
    rows = []
    for kind in kinds:
        inside = bins == kind
        ours = np.stack([line.users[metric].to_numpy()[inside] for line in results.finished])
        low, high = bootstrap_interval(ours, LEVEL, resamples)
        label = _range(values[inside])
        for i, line in enumerate(results.finished):
            rows.append((line.label, int(kind), label, int(inside.sum()), np.nanmean(ours[i]), low[i], high[i]))
    return pd.DataFrame(rows, columns=["model", "bin", "label", "users", "mean", "ci_low", "ci_high"])


def _range(values: pd.Series) -> str:
    low, high = (f"{value:.1f}".removesuffix(".0") for value in (values.min(), values.max()))
    return low if low == high else f"{low}–{high}"


# Popularity


def lift_metric(results: Results) -> str | None:
    """The popularity lift at the largest K."""
    found = [m for m in results.metrics() if m.startswith(LIFT) and has_users(results, m)]
    return max(found, key=lambda m: int(m.removeprefix(LIFT)), default=None)


def lifts(results: Results, metric: str, lift: str, resamples: int) -> pd.DataFrame:
    """Every model's lift and accuracy: ``model`` and of both metrics ``<name>, <name> low, <name> high``."""
    spans = intervals(results, resamples, [metric, lift])
    columns = []
    for name in (lift, metric):
        mine = spans[spans["metric"] == name].set_index("model")[["mean", "ci_low", "ci_high"]]
        columns.append(mine.set_axis([name, f"{name} low", f"{name} high"], axis=1))
    order = [line.label for line in results.finished]
    return pd.concat(columns, axis=1).dropna().reindex(order).dropna().rename_axis("model").reset_index()


# Training


def training(results: Results) -> pd.DataFrame:
    """Every step of LLM runs, mean over seeds: ``model, stage, step`` and ``CURVES``.

    ``stage`` is SFT or preference, ``step`` counts from 0 in each. Runs that share an SFT stage have the same of it.
    """
    found = [frame for line in results.finished if (frame := _steps(line)) is not None]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=["model", "stage", "step", *CURVES])


def _steps(line: Line) -> pd.DataFrame | None:
    frames = []
    for run in line.runs:
        file = Path(run["run_folder"]) / "metrics.jsonl"
        if file.is_file():
            steps = pd.DataFrame([json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()])
            steps["stage"] = np.where(steps["stage"] == "SFT", "SFT", "preference")
            frames.append(steps.assign(step=steps.groupby("stage").cumcount()))
    if not frames:
        return None
    every = pd.concat(frames, ignore_index=True).reindex(columns=["stage", "step", *CURVES])
    mean = every.groupby(["stage", "step"], sort=True).mean().reset_index()
    mean.insert(0, "model", line.label)
    return mean


def displaced(steps: pd.DataFrame) -> dict[str, float]:
    """Models whose chosen titles lost probability: how far below the reference they are in the end (nats, negative).

    The end is the last tenth of the steps. A margin that grows while both log-probs fall is likelihood displacement
    (Razin et al. 2024, arXiv:2410.08847).
    """
    found = {}
    for model, mine in steps[steps["stage"] == "preference"].groupby("model", sort=False):
        shift = mine["logps/chosen_shift"].dropna()
        end = shift.iloc[-max(1, len(shift) // 10) :].mean()
        if end < FALLEN:
            found[str(model)] = float(end)
    return found
