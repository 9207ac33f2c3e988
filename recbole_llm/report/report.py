"""``report.html``: everything about a comparison on one page that needs no other file and asks no server."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import yaml

from recbole_llm.report.caption import TESTS, protocol_sentences
from recbole_llm.report.entries import Options
from recbole_llm.report.formats import html_head, html_label, html_table
from recbole_llm.report.grid import Cell
from recbole_llm.report.page import page
from recbole_llm.report.results import metric_name
from recbole_llm.report.significance import LEVEL
from recbole_llm.report.summary import Comparison, compared, found
from recbole_llm.report.table import Table, Value

if TYPE_CHECKING:  # matplotlib is loaded where something is drawn
    from recbole_llm.report.plot_style import Plot

PIXELS = 120  # of the screen for an inch of a figure


def report(
    comparison: Comparison,
    tables: Sequence[Table],
    costs: Sequence[Table],
    plots: Sequence[Plot],
    folder: Path,
    files: Iterable[str],
) -> str:
    """The page.

    Args:
        costs: tables of what the runs, and the tuning before them, took.
        plots: already saved in ``folder/plots``.
        folder: where the page will lie; links are relative to it.
        files: names of what lies beside it.
    """
    parts = [
        _summary(comparison),
        *map(html_table, (*tables, *costs)),
        *(_figure(plot, folder) for plot in plots),
        _protocol(comparison),
        _failed(comparison, folder),
        html_table(_environments(comparison.records)),
        _runs(comparison, folder),
        _files(folder, files, plots),
    ]
    data = dict.fromkeys(run["dataset"] for results in comparison.every for run in results.records)
    return page(
        ": ".join(["Comparison", ", ".join(data)] if data else ["Comparison"]),
        [_navigation(tables, costs, plots, any("error" in record for record in comparison.records)), *parts],
    )


def _navigation(tables: Iterable[Table], costs: Iterable[Table], plots: Iterable[Plot], failed: bool) -> str:
    """A line of links for the tables of the settings, one for the plots, one for the rest."""
    spent = (table.name for table in costs)
    rest = ("summary", *spent, "protocol", *(["failed"] if failed else []), "environment", "runs", "files")
    settings: list[str] = []
    for table in tables:
        kind = table.name.partition("-")[0]
        link = f'<a href="#{escape(table.name)}">{escape(table.title if kind == "results" else kind)}</a>'
        if kind == "results" or not settings:
            settings.append(link)
        else:
            settings[-1] += f"<small>{link}</small>"
    lines = [
        "".join(f'<a href="#{name}">{name.replace("-", " ").capitalize()}</a>' for name in rest),
        "Tables: " + "".join(f"<span>{links}</span>" for links in settings),
        "Plots: " + "".join(f'<a href="#plot-{escape(plot.name)}">{escape(plot.title)}</a>' for plot in plots),
    ]
    return f"<nav>{''.join(f'<p>{line}</p>' for line in lines if '<a' in line)}</nav>"


def _section(name: str, title: str, body: str) -> str:
    return f'<section id="{name}"><h2>{title}</h2>{body}</section>'


def _summary(comparison: Comparison) -> str:
    items = "".join(
        f"<li><b>{escape(results.title)}.</b> "
        f"{escape(found(results, tests, comparison.against, comparison.options))}</li>"
        for results, tests in zip(comparison.every, comparison.tests, strict=True)
    )
    return _section("summary", "Summary", f"<p>{escape(compared(comparison))}</p><ul>{items}</ul>")


def _figure(plot: Plot, folder: Path) -> str:
    image = (folder / "plots" / f"{plot.name}.png").read_bytes()
    width = round(plot.figure.get_size_inches()[0] * PIXELS)
    links = " ".join(_link(f"plots/{plot.name}.{kind}", kind.upper()) for kind in ("pdf", "png"))
    return (
        f'<section id="plot-{escape(plot.name)}"><h2>{escape(plot.title)}</h2><figure>'
        f'<img width="{width}" alt="{escape(plot.alt)}" src="data:image/png;base64,{base64.b64encode(image).decode()}">'
        f"<figcaption>{escape(plot.caption)} {links}</figcaption></figure></section>"
    )


# Protocol


def _protocol(comparison: Comparison) -> str:
    """What was trained on and asked, setting by setting, and what is the same for all."""
    facts = [(results.title, " ".join(protocol_sentences(results))) for results in comparison.every if results.records]
    runs = [run for results in comparison.every for run in results.records]
    if runs:
        facts += [*_asked(runs), *_statistics(comparison.against, comparison.options)]
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts)
    return _section("protocol", "Protocol", f"<dl>{rows}</dl>") if facts else ""


def _asked_of(run: dict[str, Any]) -> dict[str, Any]:
    """``eval_args``, with the split of what was ranked; runs of older versions record only that of training data."""
    told = _config(run).get("eval_args", {})
    return {**told, "split": run["split"]} if "split" in run else told


def _asked(runs: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    evaluation = [_asked_of(run) for run in runs]
    split = [
        ", ".join(f"{kind} {how}" for kind, how in told["split"].items()) + f", order {told['order']}"
        for told in evaluation
        if "split" in told and "order" in told
    ]
    valid = [
        told["mode"]["valid"] for told in evaluation if isinstance(told.get("mode"), dict) and "valid" in told["mode"]
    ]
    return [
        ("Split", f"{_each(split)} (LS: leave one out, RS: shares; TO: by time)")
        if split
        else ("Split", "not recorded"),
        (
            "Validation",
            f"{_each(valid) or 'as the test'}; the epoch is selected by {_each(r.get('valid_metric') for r in runs)}",
        ),
        (
            "Candidates",
            f"{_each(run['candidate_hash'] for run in runs)}; seed {_each(r.get('candidate_seed') for r in runs)}",
        ),
        ("Data", _each(run["data_hash"] for run in runs)),
        ("Seeds", _each(run["seed"] for run in runs)),
        ("Metrics", ", ".join(dict.fromkeys(metric_name(m) for run in runs for m in run["metrics"]))),
    ]


def _statistics(against: Sequence[str], options: Options) -> list[tuple[str, str]]:
    side = "two-sided" if options.alternative == "two-sided" else "one-sided: is the model better?"
    return [
        ("Baseline", ", ".join(against)),
        ("Test", f"{TESTS[options.test]} over users' means over seeds, {side}"),
        (
            "Correction",
            f"Holm, over all comparisons of a metric in a table; family-wise error rate {options.alpha:g}",
        ),
        ("Intervals", f"{100 * LEVEL:.0f} % percentile bootstrap over users, {options.resamples:,} draws"),
    ]


def _config(run: dict[str, Any]) -> dict[str, Any]:
    return yaml.safe_load(_text(run, "config.yaml") or "{}")


def _text(run: dict[str, Any], name: str) -> str:
    """A file of a run folder; empty where it is not there any more."""
    file = Path(run["run_folder"]) / name
    return file.read_text(encoding="utf-8") if file.is_file() else ""


# Runs


def _failed(comparison: Comparison, folder: Path) -> str:
    rows = [
        [*_name(comparison, cell), escape(str(record["error"])), _folder_link(cell.folder, folder)]
        for cell, record in zip(comparison.cells, comparison.records, strict=True)
        if "error" in record
    ]
    if not rows:
        return ""
    head = ["Model", "Setting", "Seed", "Error", "Folder"]
    return _section("failed", "Failed runs", _linked_table(head, _once(rows)))


def _runs(comparison: Comparison, folder: Path) -> str:
    rows = [
        [*_name(comparison, cell, record.get("seed")), _folder_link(cell.folder, folder)]
        for cell, record in zip(comparison.cells, comparison.records, strict=True)
    ]
    told = "Configuration, environment, log, result, candidates and rows of every user lie in the folder of a run."
    table = _linked_table(["Model", "Setting", "Seed", "Folder"], _once(rows))
    return _section("runs", "Runs", f'{table}<p class="caption">{told}</p>')


def _once(rows: Iterable[list[str]]) -> list[tuple[str, ...]]:
    """Each row once: an entry with training users of its own is the same run in every setting of another number."""
    return list(dict.fromkeys(map(tuple, rows)))


def _name(comparison: Comparison, cell: Cell, seed: int | None = None) -> list[str]:
    """Model, setting and seed of a run; ``seed`` is the one it had where none was asked for."""
    seed = cell.seed if seed is None else seed
    label = (comparison.options.names or {}).get(cell.entry.label, cell.entry.label)
    return [html_label(label), escape(cell.asked()), "" if seed is None else str(seed)]


def _linked_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    head = "".join(html_head(name, text=True) for name in header)
    lines = ("".join(f'<td class="text">{cell}</td>' for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _environments(records: Iterable[dict[str, Any]]) -> Table:
    """Every machine and set of versions that made a result, and how many runs it did."""
    counts: dict[str, int] = {}
    for run in {run["run_folder"]: run for run in records if "run_folder" in run}.values():
        told = _text(run, "env.json") or json.dumps({"versions": run.get("versions", {})})
        counts[told] = counts.get(told, 0) + 1
    rows = []
    for text, count in counts.items():
        told = json.loads(text)
        packages = ", ".join(f"{name} {version}" for name, version in told.pop("versions").items())
        machine = [told.get(key) for key in ("processor", "cores", "torch_threads", "cuda", "platform", "git_commit")]
        rows.append([*(Value("" if v is None else str(v)) for v in machine), Value(packages), Value(str(count))])
    header = ["Processor", "Cores", "Threads", "GPU", "Platform", "Commit", "Versions", "Runs"]
    return Table("environment", "Environment", "From env.json of every run.", header, rows, left=len(header))


# Links


def _files(folder: Path, files: Iterable[str], plots: Sequence[Plot]) -> str:
    names = [*files, *(f"plots/{plot.name}.{kind}" for plot in plots for kind in ("pdf", "png"))]
    items = "".join(f"<li>{_link(name, name)}</li>" for name in names)
    return _section("files", "Files", f"<ul>{items}</ul>")


def _folder_link(run_folder: Path, folder: Path) -> str:
    try:
        path = Path(os.path.relpath(run_folder, folder)).as_posix()
    except ValueError:  # another drive of Windows
        return escape(str(run_folder))
    return _link(path + "/", run_folder.name)


def _link(path: str, text: str) -> str:
    """A link to a file or folder, relative to the page."""
    return f'<a href="{escape(quote(path))}">{escape(text)}</a>'


def _each(values: Iterable[Any]) -> str:
    return " / ".join(dict.fromkeys(str(value) for value in values if value is not None))
