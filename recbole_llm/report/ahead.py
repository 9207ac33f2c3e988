"""Trials of several searches at once, as far as no score decides what is tried; the searches then read them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from recbole_llm.config import LLMConfig
from recbole_llm.errors import ConfigError, UserError
from recbole_llm.report.apart import Children, apart, in_processes, threads_each
from recbole_llm.report.jobs import in_a_line
from recbole_llm.report.trials import trial_file
from recbole_llm.report.tune import check_search, proposals_of


class Search(NamedTuple):
    """What is searched: settings of a model, and the label of its line."""

    label: str
    model: str
    dataset: str | None
    settings: dict[str, Any]


def trials_ahead(searches: Sequence[Search], trials: int, space: str | None, jobs: int) -> None:
    """Run what these searches try first in processes of their own.

    Nothing is decided here: a trial that fails is kept as failed, and one whose process was killed, or that lacked
    memory beside the others, is run again by the search itself. So the result is that of searches one after another, to
    the last digits that the number of threads moves (docs/tuning.md).

    Args:
        trials: of each search, as ``tune`` takes them.
        space: ``--search``.
        jobs: processes at a time.
    """
    asked: dict[Path, dict[str, Any]] = {}
    for search in searches:
        config, parameters = check_search(search.model, search.dataset, search.settings, space)
        for values in proposals_of(config, parameters).before_scores(trials):
            one = _asked(search, config["dataset"], values, threads_each(jobs))
            if one is not None and not Path(one["file"]).is_file():
                asked.setdefault(Path(one["file"]), one)
    if len(asked) < 2:
        return
    print(f"[tune] {len(asked)} trials, {jobs} at a time", flush=True)
    clock, done = time.perf_counter(), 0
    with closing(in_processes(_trial_apart, dict(enumerate(asked.values())), jobs)) as ended:
        for i, error in ended:
            done += 1
            left = (time.perf_counter() - clock) / done * (len(asked) - done)
            label, ends = list(asked.values())[i]["label"], f"; {error}" if error else ""
            print(f"[tune {done}/{len(asked)}] {label}, about {left:.0f} s left{ends}", flush=True)


def _asked(search: Search, dataset: str, values: dict[str, Any], threads: int) -> dict[str, Any] | None:
    """A trial as plain data; None for values that are wrong together, which costs nothing to find again."""
    try:
        file = trial_file(LLMConfig(search.model, dataset, None, {**search.settings, **values}))
    except ConfigError:
        return None
    return {
        "label": " ".join([search.label, *(f"{key}={value}" for key, value in values.items())]),
        "model": search.model,
        "dataset": dataset,
        "settings": search.settings,
        "values": values,
        "file": str(file.absolute()),
        "cwd": str(Path.cwd()),
        "threads": threads,
    }


def _trial_apart(asked: dict[str, Any], children: Children) -> str | None:
    """Its output is kept beside its file where it failed."""
    console = Path(asked["file"]).with_suffix(".log")
    try:
        console.parent.mkdir(parents=True, exist_ok=True)
        error = apart(asked, console, children)
        if error is None:
            console.unlink(missing_ok=True)
    except (UserError, OSError) as wrong:
        return in_a_line(wrong)
    return error
