"""Plots of what changes along something: training users, kinds of users, steps of training."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from recbole_llm.report import plot_data
from recbole_llm.report.plot_marks import INTERVAL, legend_of, series, shifts, spoken, titles
from recbole_llm.report.plot_style import DIM, Plot, Styles, Told, legend, panels
from recbole_llm.report.results import Results, metric_name

# Trait -> name of the plot, title, label of the axis.
TRAIT_TEXTS = {
    "history": ("history_length", "Accuracy by length of the history", "items in the user's history"),
    "target_popularity": (
        "item_popularity",
        "Accuracy by popularity of the target",
        "training interactions of the target",
    ),
}
# Stage, key, label of the axis.
CURVE_TEXTS = (
    ("SFT", "loss", "SFT loss (nats a token)"),
    ("preference", "loss", "preference loss"),
    ("preference", "rewards/margins", "reward margin (β × nats)"),
    ("preference", "rewards/accuracies", "pairs with a margin above 0"),
    ("preference", "logps/chosen", "chosen log-prob (nats)"),
    ("preference", "logps/chosen_shift", "chosen log-prob shift (nats)"),
)


def few_shot(told: Told, looks: Styles, resamples: int) -> Iterator[Plot]:
    """Accuracy against the number of training users."""
    curves = plot_data.few_shot_curves(told, resamples)
    if not curves:
        return
    figure, grid = panels(len(curves), 2.4)
    for axes, curve in zip(grid, curves, strict=True):
        labels = list(dict.fromkeys(curve.points["model"]))
        places = _places(axes, curve.points["users"])
        points = curve.points.assign(place=curve.points["users"].fillna(np.inf).map(places)).sort_values("place")
        for label, shift in shifts(labels, 0.15).items():
            mine = points[points["model"] == label]
            series(axes, mine["place"] * 2**shift, mine, looks[label])
        titles(axes, f"{curve.dataset}, {curve.mode}", "training users", metric_name(curve.metric))
    there = {label for curve in curves for label in curve.points["model"]}
    legend(figure, {label: look for label, look in looks.items() if label in there}, lines=True)
    alt = "; ".join(f"{c.dataset}, {c.mode}: {metric_name(c.metric)}" for c in curves)
    caption = f"The place of all training users is not to scale. {INTERVAL}"
    yield Plot("few_shot", "Few-shot curves", caption, f"Lines against training users. {alt}.", figure)


def _places(axes: Axes, users: pd.Series) -> dict[float, float]:
    """Where each number of training users stands on a logarithmic axis; all users (infinity) beyond the largest."""
    sizes = sorted(users.dropna().unique())
    places = {size: size for size in sizes}
    if users.isna().any():
        places[np.inf] = sizes[-1] * (sizes[-1] / sizes[-2] if len(sizes) > 1 else 2.0)
    axes.set_xscale("log")
    axes.set_xticks(list(places.values()), ["all" if np.isinf(size) else f"{size:,.0f}" for size in places])
    axes.xaxis.set_minor_locator(NullLocator())
    return places


def users(told: Told, trait: str, looks: Styles, resamples: int) -> Iterator[Plot]:
    """Accuracy of users alike."""
    name, title, label = TRAIT_TEXTS[trait]
    found = [(r, m, plot_data.by_trait(r, m, trait, resamples)) for r, m in told]
    frames = [(r, m, frame) for r, m, frame in found if frame is not None]
    if not frames:
        return
    figure, grid = panels(len(frames), 2.3)
    for axes, (results, metric, frame) in zip(grid, frames, strict=True):
        for model, shift in shifts([line.label for line in results.finished], 0.5).items():
            mine = frame[frame["model"] == model]
            series(axes, mine["bin"] + shift, mine, looks[model])
        bins = frame.drop_duplicates("bin")
        axes.set_xticks(bins["bin"], bins["label"])
        axes.grid(axis="x", visible=False)
        titles(axes, results.title, label, metric_name(metric))
    shown = [(r, m) for r, m, _ in frames]
    legend_of(figure, shown, looks, lines=True)
    counts = pd.concat([frame["users"] for *_, frame in frames])
    sizes = " to ".join(map(str, sorted({counts.min(), counts.max()})))
    caption = f"Users in bins by quantiles, {sizes} in each; equal values share a bin. {INTERVAL}"
    yield Plot(name, title, caption, spoken("Lines", shown, label), figure)


def training(results: Results, number: int, looks: Styles) -> Iterator[Plot]:
    """Loss, and what a preference loss does to chosen titles, step by step."""
    steps = plot_data.training(results)
    curves = [(stage, label, _curve(steps, stage, key)) for stage, key, label in CURVE_TEXTS]
    curves = [(stage, label, curve) for stage, label, curve in curves if len(curve)]
    if not curves:
        return
    figure, grid = panels(len(curves), 1.8, columns=3)
    for axes, (stage, label, curve) in zip(grid, curves, strict=True):
        for model, mine in curve.groupby("model", sort=False):
            look, every = looks[str(model)], max(1, len(mine) // 5)
            axes.plot(
                mine["step"],
                mine["value"],
                look.marker,
                linestyle=look.line,
                color=look.colour,
                ms=3.5,
                markevery=every,
            )
        axes.locator_params(axis="x", integer=True)
        titles(axes, label, "step of SFT" if stage == "SFT" else "step of the preference loss")
    fallen = plot_data.displaced(steps)
    caption = (
        "Mean over seeds, running mean over a twentieth of the steps. Shift: less the log-prob under the reference. "
        "Losses of different kinds share no scale. An SFT stage that several losses share is drawn for each of them."
    )
    if fallen:
        grid[-1].axhline(0, color=DIM, linewidth=0.8)
        trained = steps.loc[steps["stage"] == "preference", "model"].nunique()
        worst = min(fallen.values())
        told = f"falls: {len(fallen)} of {trained} models,\nto −{-worst:.1f} nats"
        grid[-1].text(0.03, 0.04, told, transform=grid[-1].transAxes, fontsize=7, va="bottom", zorder=5)
        each = ", ".join(f"{model} {shift:+.1f}" for model, shift in fallen.items())
        caption += (
            f" Likelihood displacement: at the end the chosen titles are less likely than under the reference ({each} "
            "nats), whatever the margin does."
        )
    legend(figure, {m: looks[m] for m in dict.fromkeys(steps["model"])}, lines=True)
    alt = f"Lines over steps: {', '.join(label for _, label, _ in curves)}."
    yield Plot(f"training-{number}", f"Training: {results.title.rpartition(', ')[0]}", caption, alt, figure)


def _curve(steps: pd.DataFrame, stage: str, key: str) -> pd.DataFrame:
    """``model, step, value`` of a stage: the running mean of each model."""
    mine = steps.loc[(steps["stage"] == stage) & steps[key].notna(), ["model", "step", key]]
    smooth = mine.groupby("model", sort=False)[key].transform(
        lambda values: values.rolling(max(1, len(values) // 20), min_periods=1).mean()
    )
    return mine.assign(value=smooth.astype(float))
