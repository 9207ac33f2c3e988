"""What stands on the axes of a plot: points, whiskers, series, titles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from recbole_llm.report.plot_style import CHARACTER, Style, Styles, Told, legend, wrapped
from recbole_llm.report.results import metric_name

INTERVAL = "Whiskers: 95 % bootstrap intervals over users."
Span = tuple[float, float]  # low, high


def whisker(axes: Axes, at: Span, *, x: Span | None = None, y: Span | None = None, **look: Any) -> None:
    """Intervals around a point, along one axis or both."""
    for low_high, along in ((x, axes.hlines), (y, axes.vlines)):
        if low_high is not None:
            along(at[1] if along == axes.hlines else at[0], *low_high, linewidth=0.9, zorder=3, **look)


def point(axes: Axes, at: Span, look: Style) -> None:
    """A model's marker, with a white rim where it covers another."""
    axes.plot(*at, look.marker, color=look.colour, ms=6, mec="white", mew=0.6, zorder=4)


def series(axes: Axes, x: pd.Series, means: pd.DataFrame, look: Style) -> None:
    """A model's line through its means, with their intervals."""
    axes.vlines(x, means["ci_low"], means["ci_high"], color=look.colour, linewidth=0.9)
    axes.plot(x, means["mean"], look.marker, linestyle=look.line, color=look.colour)


def shifts(labels: Sequence[str], width: float) -> dict[str, float]:
    """How far each model stands beside a place that all share, so that no whisker hides another."""
    return dict(zip(labels, np.linspace(-width / 2, width / 2, len(labels)) if len(labels) > 1 else [0.0], strict=True))


def titles(axes: Axes, title: str, x: str, y: str = "", beside: float = 0.5) -> None:
    """Title and labels, broken into lines by the width of the panel, which the layout leaves as it is.

    Args:
        beside: inches that the vertical axis and its labels take.
    """
    figure: Any = axes.figure
    place: Any = axes.get_subplotspec()
    width = figure.get_size_inches()[0] / place.get_gridspec().ncols - beside
    axes.set_title(wrapped(title, int(width / CHARACTER)), loc="left")
    axes.set_xlabel(wrapped(x, int(width / CHARACTER)))
    axes.set_ylabel(y)


def magnitudes(axes: Axes, values: pd.Series, form: Callable[[float], str]) -> None:
    """A horizontal axis of orders of magnitude, with a place for 0 where there is one, and ticks in plain numbers."""
    low, high = float(values.min()), float(values.max())
    if low <= 0:
        axes.set_xscale("symlog", linthresh=1, linscale=0.4)
        exponents = np.arange(0, np.ceil(np.log10(max(high, 1))) + 1)
        axes.xaxis.set_major_locator(FixedLocator([0, *10.0 ** exponents[:: 1 + len(exponents) // 7]]))
        axes.set_xlim(-0.5, max(high, 1) * 3)
    else:
        axes.set_xscale("log")
        narrow = high / low < 30
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,), numticks=6))
        axes.set_xlim(low / (1.5 if narrow else 2.5), high * (1.5 if narrow else 2.5))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def legend_of(figure: Figure, told: Told, looks: Styles, lines: bool = False, more: Sequence[Artist] = ()) -> None:
    """``legend`` of the models that have finished in any of these settings."""
    there = {line.label for results, _ in told for line in results.finished}
    legend(figure, {label: look for label, look in looks.items() if label in there}, lines, more)


def spoken(kind: str, told: Told, x: str) -> str:
    """What a plot of every setting shows, in words."""
    panels = "; ".join(f"{results.title}: {metric_name(metric)}" for results, metric in told)
    return f"{kind} against {x}. {panels}."
