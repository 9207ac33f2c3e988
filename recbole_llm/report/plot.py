"""The plots of a comparison, each drawn only where its data are there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.lines import Line2D

from recbole_llm.report import plot_data
from recbole_llm.report.entries import Options
from recbole_llm.report.plot_curves import TRAIT_TEXTS, few_shot, training, users
from recbole_llm.report.plot_files import drop_plots
from recbole_llm.report.plot_marks import INTERVAL, legend_of, magnitudes, point, spoken, titles, whisker
from recbole_llm.report.plot_style import (
    CHARACTER,
    DIM,
    Plot,
    Styles,
    Told,
    panels,
    paper_style,
    save,
    short_number,
    styles,
    wrapped,
)
from recbole_llm.report.results import Results, metric_name
from recbole_llm.report.table import primary_metric

LABEL_WIDTH = 26  # characters


def save_plots(every: Sequence[Results], options: Options, folder: Path) -> list[Plot]:
    """Draw what there are data for, and write it into ``folder`` as PNG and PDF."""
    folder.mkdir(parents=True, exist_ok=True)
    with paper_style():
        plots = list(draw(every, options))
        for plot in plots:
            save(plot.figure, folder, plot.name)
    drop_plots(folder, {plot.name for plot in plots})
    return plots


def draw(every: Sequence[Results], options: Options) -> Iterator[Plot]:
    """All plots for which there are data; to be drawn inside ``plot_style.paper_style``."""
    looks = styles(line.label for results in every for line in results.lines)
    metrics = [primary_metric(results, options) for results in every]
    told = [(r, m) for r, m in zip(every, metrics, strict=True) if m and plot_data.has_users(r, m)]
    if told:
        yield metric_bars(told, looks, options.resamples)
        yield from few_shot(told, looks, options.resamples)
        yield cost(told, looks, options.resamples)
        for trait in TRAIT_TEXTS:
            yield from users(told, trait, looks, options.resamples)
        yield from popularity(told, looks, options.resamples)
    seen = set()
    for number, results in enumerate(every, start=1):
        trained_on = (results.setting.dataset, results.setting.few_shot)
        if trained_on not in seen:  # how the test asks changes no training
            for plot in training(results, number, looks):
                seen.add(trained_on)
                yield plot


def metric_bars(told: Told, looks: Styles, resamples: int) -> Plot:
    """A bar a model, a panel a setting."""
    labels = [line.label for line in told[0][0].lines]
    names = [wrapped(label, LABEL_WIDTH) for label in labels]
    deepest = max(name.count("\n") + 1 for name in names)
    figure, grid = panels(len(told), 0.7 + max(0.27, 0.13 * deepest) * len(labels), share=True)
    beside = 0.2 + CHARACTER * max(len(line) for name in names for line in name.split("\n")) / min(2, len(told))
    texts = []
    for axes, (results, metric) in zip(grid, told, strict=True):
        means = plot_data.metric_means(results, metric, resamples)
        rows = means.to_dict("records")
        end = max(0.0, means[["ci_high", "mean"]].to_numpy().max())
        for row in rows:
            y, look = labels.index(row["model"]), looks[row["model"]]
            axes.barh(y, row["mean"], 0.7, color=look.colour, hatch=look.hatch, edgecolor="white", linewidth=0)
            whisker(axes, (row["mean"], y), x=(row["ci_low"], row["ci_high"]), color="0.1")
            if len(row["seeds"]) > 1:
                axes.plot(row["seeds"], [y + 0.22] * len(row["seeds"]), "o", ms=2.6, mfc="white", mec="0.1", mew=0.6)
            axes.text(end * 1.04, y, f"{row['mean']:.3f}", va="center", fontsize=7)
        for label in set(labels) - set(means["model"]):
            axes.text(end * 0.02, labels.index(label), "failed", va="center", fontsize=7, color=DIM)
        axes.set_xlim(min(0.0, means["ci_low"].min()), end * 1.22 or 1)
        axes.locator_params(axis="x", nbins=5)  # not by the width, which hangs on the last label
        axes.set_yticks(range(len(labels)), names)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        titles(axes, results.title, f"{metric_name(metric)}, mean over users", beside=beside)
        texts.append(f"{results.title}: " + ", ".join(f"{row['model']} {row['mean']:.4f}" for row in rows))
    grid[0].set_ylim(len(labels) - 0.5, -0.5)  # shared: the first model on top everywhere
    caption = f"Mean over users. {INTERVAL} Dots: seeds, where there are several."
    return Plot("metric", "Accuracy", caption, f"Bars. {'; '.join(texts)}.", figure)


def cost(told: Told, looks: Styles, resamples: int) -> Plot:
    """Accuracy against seconds and against trained parameters, with the front of what is worth its cost."""
    cpu = plot_data.on_cpu([results for results, _ in told])
    axes_of = {
        "seconds": (f"{'CPU' if cpu else 'wall-clock'} seconds, training and test", "{:,g}".format),
        "parameters": ("trained parameters", short_number),
    }
    figure, grid = panels(2 * len(told), 2.2)
    for i, (results, metric) in enumerate(told):
        frame = plot_data.costs(results, metric, resamples, cpu)
        for axes, (what, (label, form)) in zip(grid[2 * i : 2 * i + 2], axes_of.items(), strict=True):
            known = frame[frame[what].notna()]
            if known.empty:
                axes.set_axis_off()
                continue
            for row in known.to_dict("records"):
                at, look = (row[what], row["mean"]), looks[row["model"]]
                whisker(axes, at, y=(row["ci_low"], row["ci_high"]), color=look.colour, alpha=0.5)
                point(axes, at, look)
            best = plot_data.front(known, what, metric)
            axes.plot(best[what], best["mean"], color=DIM, linestyle="--", linewidth=0.9, drawstyle="steps-post")
            magnitudes(axes, known[what], form)
            titles(axes, results.title, label, metric_name(metric))
    legend_of(figure, told, looks, more=[Line2D([], [], color=DIM, linestyle="--", label="Pareto front")])
    caption = (
        f"Accuracy against what it took, mean over runs; nothing is both cheaper than the dashed line and as good. "
        f"{INTERVAL} An SFT stage that several losses share counts "
        "for each of them. Seconds are of the machine that did a run, and of what else it did."
    )
    return Plot(
        "cost", "Accuracy against cost", caption, spoken("Points", told, "seconds and trained parameters"), figure
    )


def popularity(told: Told, looks: Styles, resamples: int) -> Iterator[Plot]:
    """Accuracy against popularity lift."""
    found = [(r, m, lift) for r, m in told if (lift := plot_data.lift_metric(r))]
    if not found:
        return
    figure, grid = panels(len(found), 2.2)
    for axes, (results, metric, lift) in zip(grid, found, strict=True):
        for row in plot_data.lifts(results, metric, lift, resamples).to_dict("records"):
            at, look = (row[lift], row[metric]), looks[row["model"]]
            spans = {axis: (row[f"{name} low"], row[f"{name} high"]) for axis, name in (("x", lift), ("y", metric))}
            whisker(axes, at, **spans, color=look.colour)
            point(axes, at, look)
        low, high = axes.get_xlim()
        if low <= 0 <= high:
            axes.axvline(0, color=DIM, linewidth=0.8)
        titles(axes, results.title, f"popularity lift@{lift.partition('@')[2]}", metric_name(metric))
    shown = [(r, m) for r, m, _ in found]
    legend_of(figure, shown, looks)
    caption = (
        "How much more popular the top K is than what the user chose before (0: as popular, which is best; 1: twice as "
        f"popular; docs/harm.md), against accuracy. {INTERVAL}"
    )
    alt = spoken("Points", shown, "popularity lift")
    yield Plot("popularity_lift", "Popularity lift against accuracy", caption, alt, figure)
