"""Trials of several searches at once, as far as no score decides what is tried; the searches then read them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recbole_llm.config import LLMConfig
from recbole_llm.errors import ConfigError, UserError
from recbole_llm.report.grid import Cell
from recbole_llm.report.jobs import apart, in_a_line, in_processes, threads_each
from recbole_llm.report.trials import trial_file
from recbole_llm.report.tune import check_search


def trials_ahead(cells: Sequence[Cell], trials: int, search: str | None, jobs: int) -> None:
    """Run what the searches of these cells try first in processes of their own.

    Nothing is decided here: a trial that fails is kept as failed, and one whose process was killed is run again by the
    search itself. So the result is that of searches one after another, to the last digits that the number of threads
    moves (docs/tuning.md).

    Args:
        cells: one of each search, with the settings that are searched.
        trials, search: as ``tune`` takes them.
        jobs: processes at a time.
    """
    from recbole_llm.report.proposals import proposed_before_scores  # Optuna takes half a second

    asked: dict[Path, dict[str, Any]] = {}
    for cell in cells:
        config, space = check_search(cell.entry.model, cell.setting.dataset, cell.settings, search)
        first = {p.key: config[p.key] for p in space}
        proposed = proposed_before_scores(space, first, config["seed"], config["valid_metric_bigger"], trials)
        for values in proposed:
            one = _asked(cell, config["dataset"], values, threads_each(jobs))
            if one is not None and not Path(one["file"]).is_file():
                asked.setdefault(Path(one["file"]), one)
    if len(asked) < 2:
        return
    print(f"[tune] {len(asked)} trials, {jobs} at a time", flush=True)
    clock, done = time.perf_counter(), 0
    for i, error in in_processes(_trial_apart, dict(enumerate(asked.values())), jobs):
        done += 1
        left = (time.perf_counter() - clock) / done * (len(asked) - done)
        label, ends = list(asked.values())[i]["label"], f"; {error}" if error else ""
        print(f"[tune {done}/{len(asked)}] {label}, about {left:.0f} s left{ends}", flush=True)


def _asked(cell: Cell, dataset: str, values: dict[str, Any], threads: int) -> dict[str, Any] | None:
    """A trial as plain data; None for values that are wrong together, which costs nothing to find again."""
    try:
        file = trial_file(LLMConfig(cell.entry.model, dataset, None, {**cell.settings, **values}))
    except ConfigError:
        return None
    return {
        "label": " ".join([cell.entry.label, *(f"{key}={value}" for key, value in values.items())]),
        "model": cell.entry.model,
        "dataset": dataset,
        "settings": cell.settings,
        "values": values,
        "file": str(file.absolute()),
        "cwd": str(Path.cwd()),
        "threads": threads,
    }


def _trial_apart(asked: dict[str, Any]) -> str | None:
    """Its output is kept beside its file where it failed."""
    console = Path(asked["file"]).with_suffix(".log")
    try:
        console.parent.mkdir(parents=True, exist_ok=True)
        error = apart(asked, console)
        if error is None:
            console.unlink(missing_ok=True)
    except (UserError, OSError) as wrong:
        return in_a_line(wrong)
    return error
