"""How plots look: colours, markers, sizes and fonts of a paper's column; readable in grey and to the colour-blind."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from recbole_llm.files import whole
from recbole_llm.report.results import Results

COLUMN, PAGE = 3.4, 7.0  # inches: a column, and the width of a page of two
DPI = 200
CHARACTER = 0.062  # inches, on average
LONGEST = 46  # characters of a line of a legend
# Okabe & Ito (2008) without yellow, which white paper swallows, and with grey for black, on which no whisker is seen.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "p", "h", ">")
HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----", "++++", "oo")
LINES = ("-", "--", "-.", ":")
DIM = "0.45"  # of what is no model: borders, whiskers, lines that lead the eye
LOOK: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": DIM,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.color": "0.2",
    "ytick.color": "0.2",
    "grid.color": "0.88",
    "grid.linewidth": 0.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "lines.linewidth": 1.1,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar in a label is a dollar
    "pdf.fonttype": 42,  # Type 3 fonts are refused by some publishers
}


@dataclass(frozen=True)
class Style:
    """How a model is drawn, the same in every plot of a report."""

    colour: str
    marker: str
    hatch: str
    line: str


def styles(labels: Iterable[str]) -> dict[str, Style]:
    """A style for every label by its place; no two of 77 share colour and marker."""
    found: dict[str, Style] = {}
    for label in labels:
        i = len(found)
        cycles = (COLOURS, MARKERS, HATCHES, LINES)
        found.setdefault(label, Style(*(cycle[i % len(cycle)] for cycle in cycles)))
    return found


Styles = dict[str, Style]
Told = Sequence[tuple[Results, str]]  # each setting, and the metric that is drawn of it


@dataclass(frozen=True)
class Plot:
    """A figure, the name of its files, and what a page says about it; ``alt`` is for who does not see it."""

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure


@contextmanager
def paper_style() -> Iterator[None]:
    """Inside, matplotlib has its own defaults and ours on top, whatever the user has set; afterwards his again."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(LOOK)
        yield


def panels(count: int, height: float, columns: int = 2, share: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, ``height`` inches each, as wide as a column or a page.

    Args:
        share: all panels have the same vertical axis, labelled on the left alone.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(COLUMN if columns == 1 else PAGE, rows * height), layout="constrained")
    layout: Any = figure.get_layout_engine()
    layout.set(w_pad=0.06, h_pad=0.07)
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=share).ravel().tolist()
    for empty in grid[count:]:
        empty.remove()
    return figure, grid[:count]


def legend(figure: Figure, shown: Mapping[str, Style], lines: bool = False, more: Sequence[Artist] = ()) -> None:
    """Names of the models below the panels, where they hide nothing; the figure grows by their height.

    Args:
        lines: the models are drawn as lines with markers, else as markers.
        more: handles of what is no model.
    """
    width, height = figure.get_size_inches()
    handles: list[Any] = [
        Line2D([], [], color=s.colour, marker=s.marker, linestyle=cast(Any, s.line if lines else "none"), label=label)
        for label, s in shown.items()
    ]
    handles += more
    longest = max(len(handle.get_label()) for handle in handles)
    columns = max(1, min(len(handles), int(width / (CHARACTER * min(longest, LONGEST) + 0.5))))
    for handle in handles:
        handle.set_label(wrapped(handle.get_label(), int((width / columns - 0.5) / CHARACTER)))
    lines_of = [sum(h.get_label().count("\n") + 1 for h in column) for column in np.array_split(handles, columns)]
    figure.set_size_inches(width, height + 0.15 * max(lines_of) + 0.15)
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=columns,
        handlelength=3 if lines else 1,
        columnspacing=1.2,
        labelspacing=0.3,
    )


def wrapped(text: str, width: int) -> str:
    """Lines of at most ``width`` characters, broken behind blanks, commas and brackets where there are any."""
    lines = [""]
    for piece in re.findall(r"[^\s,\[+/_-]*[\s,\[+/_-]?", " ".join(text.split())):
        while len(piece) > width:
            rest = width - len(lines[-1])
            lines[-1], piece = lines[-1] + piece[:rest], piece[rest:]
            lines.append("")
        if len((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.strip() for line in lines if line.strip())


def short_number(value: float) -> str:
    """1500 -> 1.5k, 2000000 -> 2M; small ones as they are."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``<name>.png`` and ``<name>.pdf``, each whole or not at all; the same figure gives the same bytes."""
    layout: Any = figure.get_layout_engine()
    layout.execute(figure)  # once more when it is drawn: a narrower panel has other ticks
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # each font table it drops is told as INFO
    files = []
    without = {"png": {"Software": None}, "pdf": {"Creator": None, "Producer": None, "CreationDate": None}}
    for kind, metadata in without.items():
        file = folder / f"{name}.{kind}"
        with whole(file, shared=True) as beside:
            figure.savefig(beside, format=kind, dpi=DPI, metadata=metadata)
        figure.set_layout_engine("none")  # what was laid out once stays there
        files.append(file)
    return files
