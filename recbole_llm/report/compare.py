"""Models x data sets x seeds under one protocol: runs what is not finished, then writes tables, plots and a report."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from recbole_llm.config import LLMConfig
from recbole_llm.errors import ConfigError, UserError
from recbole_llm.evaluator import accuracy_names
from recbole_llm.files import content_hash, write_json, write_text
from recbole_llm.harm import CATALOGUE, HARM
from recbole_llm.pair_metrics import PAIR_METRICS
from recbole_llm.read_keys import answers_of
from recbole_llm.report import frames
from recbole_llm.report.entries import Entry, Options, parse_models, split_options
from recbole_llm.report.formats import html_table, latex_file, markdown
from recbole_llm.report.grid import Cell, cells
from recbole_llm.report.jobs import run_cells
from recbole_llm.report.page import page
from recbole_llm.report.plot_files import drop_plots, plots_in
from recbole_llm.report.report import report
from recbole_llm.report.results import GENERATED, Results, collect
from recbole_llm.report.significance import baselines, check_resamples, comparisons
from recbole_llm.report.summary import Comparison
from recbole_llm.report.table import Table, costs_table, frame_table, harm_table, results_table, significance_table
from recbole_llm.report.tune import Tuned, trials_frame, tuned_frame
from recbole_llm.report.tune_lines import builds_on, check_tuned_from, tune_all
from recbole_llm.transfer import eval_config_of

WRITTEN = ("table.md", "table.tex", "table.csv", "tests.csv", "table.html", "costs.md", "trials.csv", "report.html")
TUNED = (
    "Every model had as many trials as its space holds, up to the same number, on validation alone (docs/tuning.md)."
)


def compare(
    models: str | Sequence[str], dataset: str | None = None, config_dict: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Run every model on every data set, size, mode and seed, and write what goes into a paper.

    A run that finished before with the same configuration, data and version is not run again. A run that
    fails is reported in the table and stops nothing else; wrong settings are told before the first run.

    Args:
        models: entries as ``parse_models`` reads them.
        dataset: data set name, or several separated by commas.
        config_dict: settings of all runs, and those of the comparison (``entries.Options``).

    Returns:
        ``table`` (DataFrame), ``markdown``, ``tests`` (DataFrame), ``files``, ``runs`` (records), ``results`` and
        ``failed`` (labels).

    Raises:
        ConfigError: of all models together.
        UserError: runs of one table have different candidates, or the tables cannot be written.
    """
    entries = parse_models(models)
    options, shared = split_options({**(config_dict or {}), **({} if dataset is None else {"dataset": dataset})})
    if options.datasets and len(options.datasets) == 1:  # no axis
        dataset, options = options.datasets[0], replace(options, datasets=None)
    if options.seeds and "seed" in shared:
        told = ",".join(map(str, options.seeds))
        raise ConfigError([f"--seed={shared['seed']}: --seeds={told} says those of a comparison; leave one out."])
    against = baselines(entries, options)
    _check_names(entries, options)
    check_tuned_from(entries, options)
    check_resamples(entries, against, options)
    _check_out(options)
    grid = cells(entries, options, shared, dataset)
    _check_metrics(grid, options)
    chosen, tuned = tune_all(grid, options)
    if chosen:
        grid = cells(entries, options, shared, dataset, chosen)
    records = run_cells(grid, options.jobs, options.cluster)
    return write_comparison(grid, records, against, options, tuned)


def _check_names(entries: Sequence[Entry], options: Options) -> None:
    """Raises ConfigError where two lines of a table would have the same name."""
    shown = [(options.names or {}).get(entry.label, entry.label) for entry in entries]
    twice = [name for name in dict.fromkeys(shown) if shown.count(name) > 1]
    if twice:
        raise ConfigError([f"--names={options.names!r}: two lines of a table would be called {', '.join(twice)}."])


def _check_out(options: Options) -> None:
    """Raises ConfigError where no tables can be written, or where files of the same names are of something else."""
    if not options.out:  # beside the runs, which try their folders
        return
    folder = Path(options.out)
    there = next(path for path in (folder, *folder.parents, Path()) if path.exists())
    if not there.is_dir():
        raise ConfigError([f"--out={options.out}: {there} is a file; name a folder."])
    if not os.access(there, os.W_OK):
        raise ConfigError([f"--out={options.out}: {there} cannot be written to; name another folder."])
    others = [name for name in WRITTEN if (folder / name).exists()]
    others += [f"plots/{name}" for name in plots_in(folder / "plots")]
    if others and not (folder / "table.json").exists():
        raise ConfigError(
            [
                f"--out={options.out}: {', '.join(others)} there would be overwritten, and no comparison left them; "
                "name another folder, or move them away."
            ]
        )


def _check_metrics(grid: Sequence[Cell], options: Options) -> None:
    """Raises ConfigError for a ``table_metrics`` that no run will have."""
    known = list(dict.fromkeys(name for cell in grid for name in _metrics_of(eval_config_of(cell.config))))
    wrong = [m for m in options.table_metrics or () if m.lower() not in known and not m.lower().startswith(GENERATED)]
    if wrong:
        raise ConfigError([f"--table_metrics: no run has {', '.join(wrong)}; there are {', '.join(known)}."])


def _metrics_of(config: LLMConfig) -> Iterator[str]:
    """Names of what a run may measure, those of free answers left out."""
    yield from accuracy_names(config)
    mode = config["eval_args"]["mode"]["test"]
    answers = answers_of(config, mode)
    if answers == 2:
        yield from PAIR_METRICS
    topk = [k for k in config["topk"] if answers is None or k < answers]
    asked = {metric.lower() for metric in config["metrics"]}
    for name in HARM:
        if name.startswith("hallucination") and config["encoder"] == "none":
            continue
        if CATALOGUE.get(name) in asked:
            continue
        if name != "hallucination_base":
            yield from (f"{name}@{k}" for k in topk)
        elif answers is not None:
            yield name


def write_comparison(
    grid: Sequence[Cell],
    records: Sequence[dict[str, Any]],
    against: Sequence[str],
    options: Options,
    tuned: Sequence[tuple[str, str, Tuned]] = (),
) -> dict[str, Any]:
    """Tables of finished runs into ``out``; returns what ``compare`` does.

    Args:
        tuned: label, data set and trials of each search, for the appendix.

    Raises:
        UserError: different candidates in one table, or a folder that cannot be written.
    """
    names = options.names or {}
    every = collect(grid, records, names)
    against = [names.get(label, label) for label in against]
    tests = [comparisons(results, against, options) for results in every]
    tables = _tables(every, tests, against, options)
    costs = [costs_table(every)]
    searched = {}
    if tuned:
        chosen, minutes = _searches(tuned, options)
        tables, costs = [*tables, chosen], [*costs, minutes]
        searched = {"trials.csv": frames.spreadsheet_csv(trials_frame(tuned))}
    told = "\n".join(markdown(table) for table in tables)
    folder = _out(grid, options)
    tested = frames.tests_frame(every, tests)
    frame, spent = frames.results_frame(every), "\n".join(map(markdown, costs))
    texts = {
        "table.md": told,
        "table.tex": latex_file(tables),
        "table.csv": frames.spreadsheet_csv(frame),
        "tests.csv": frames.spreadsheet_csv(tested),
        "table.html": page("Comparison", [html_table(t) for t in tables]),
        "costs.md": spent,
        **searched,
    }
    comparison = Comparison(grid, records, every, tests, against, options)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # First: it says whose the others are, should this be stopped before the last.
        write_json(folder / "table.json", frames.as_json(every, tests, options.resamples))
        for name, text in texts.items():
            write_text(folder / name, text)
        if not searched:  # of a comparison that was tuned
            (folder / "trials.csv").unlink(missing_ok=True)
        plots = _plots(every, options, folder)
        files = [*texts, "table.json"]
        write_text(folder / "report.html", report(comparison, tables, costs, plots, folder, files))
    except OSError as error:
        raise UserError(
            f"--out={folder}: could not write the tables ({error}). Free some space, or name another folder, and give "
            "the same command again; finished runs are kept."
        ) from error
    return {
        "table": frame,
        "tests": tested,
        "markdown": told,
        "costs": spent,
        "files": [folder / name for name in (*files, "report.html")],
        "runs": records,
        "results": every,
        "failed": [record["label"] for record in records if "error" in record],
    }


def _searches(tuned: Sequence[tuple[str, str, Tuned]], options: Options) -> tuple[Table, Table]:
    """The appendix of a comparison with searches: what was chosen, and what that cost."""
    found = tuned_frame(tuned)
    order = ["model", "data set", "chosen", "trials", "failed", "valid metric", "as given", "best"]
    told = " ".join([TUNED, *builds_on(options, [label for label, _, _ in tuned])])
    minutes = found[["model", "data set", "trials", "min"]]
    return (
        frame_table("tuned", "Chosen values", told, found[order], left=3),
        frame_table("tuning-costs", "Minutes of all trials", "The same number of trials.", minutes, left=2),
    )


def _plots(every: Sequence[Results], options: Options, folder: Path) -> list[Any]:
    """Drawn and saved, or none."""
    if not options.plots:
        drop_plots(folder / "plots")
        return []
    from recbole_llm.report.plot import save_plots  # matplotlib takes a second to load, and no run needs it

    return save_plots(every, options, folder / "plots")


def _tables(
    every: Sequence[Results], tests: Sequence[pd.DataFrame], against: Sequence[str], options: Options
) -> list[Table]:
    """Of each setting its results, tests and harm."""
    found: list[Table | None] = []
    for number, (results, compared) in enumerate(zip(every, tests, strict=True), start=1):
        found.append(results_table(results, compared, against, options, number))
        found.append(significance_table(results, compared, options, number))
        found.append(harm_table(results, compared, against, options, number))
    return [table for table in found if table]


def _out(grid: Sequence[Cell], options: Options) -> Path:
    """``out``, else ``<checkpoint_dir>/compare-<data set>-<hash of the runs>``."""
    if options.out:
        return Path(options.out)
    config = grid[0].config
    which = content_hash([cell.folder.name for cell in grid])[:10]
    return Path(config["checkpoint_dir"]) / f"compare-{config['dataset']}-{which}"
