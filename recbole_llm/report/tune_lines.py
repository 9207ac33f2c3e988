"""The searches of a comparison: one of each line on every data set and size, those that others build on first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from graphlib import TopologicalSorter
from typing import Any

from recbole_llm.config import LLMConfig
from recbole_llm.errors import ConfigError
from recbole_llm.progress import guessed_seconds, told_time
from recbole_llm.recommender import never_tested
from recbole_llm.report.ahead import Search, trials_ahead
from recbole_llm.report.entries import Entry, Options
from recbole_llm.report.grid import Cell, Setting
from recbole_llm.report.search_space import Parameter
from recbole_llm.report.tune import Tuned, check_search, proposals_of, tune

Key = tuple[str, Setting]  # label of a line, and its setting without the mode, since modes share a search


def tune_all(
    grid: Sequence[Cell], options: Options
) -> tuple[dict[tuple[str, Setting], dict[str, Any]], list[tuple[str, str, Tuned]]]:
    """With ``tune``: every line's chosen keys on every data set and size, by the first seed; modes share them.

    A line that ``tuned_from`` sends to another takes that line's chosen values as given, where it has none of its own,
    and is searched over what is left open.

    Returns:
        (label, setting) -> chosen keys, and the label, data set and trials of each search.

    Raises:
        ConfigError: search spaces of all lines that are wrong, before the first trial.
    """
    if not options.tune:
        unread = [f"--{key}" for key in ("search", "tuned_from") if getattr(options, key)]
        if unread:
            print(f"[tune] {' and '.join(unread)}: nothing is searched without --tune; passed over.", flush=True)
        return {}, []
    first: dict[Key, Cell] = {}
    for cell in grid:
        first.setdefault(_key(cell), cell)
    sources, names = options.tuned_from or {}, options.names or {}
    base = {key: (sources[key[0]], key[1]) for key in first if key[0] in sources}
    levels = _levels(first, base)
    _tell_plan(_check_searches(first, base, [key for level in levels for key in level], options), options)
    found: dict[Key, Tuned] = {}
    chosen: dict[Key, dict[str, Any]] = {}
    for level in levels:
        taken = {key: _taken(chosen[base[key]], first[key]) if key in base else {} for key in level}
        searches = {key: _search(first[key], taken[key], options) for key in level}
        if options.jobs > 1:
            trials_ahead(list(searches.values()), options.tune, options.search, options.jobs)
        for key, (label, model, dataset, settings) in searches.items():
            source = names.get(base[key][0], base[key][0]) if key in base else None
            found[key] = tune(model, dataset, settings, options.tune, options.search, label, source=source)
            chosen[key] = taken[key] | found[key].settings
    # A line with training users of its own has one search, whatever sizes the others have.
    once = {(key[0], told_as(first[key])): found[key] for key in first}
    told = [(names.get(label, label), size, tuned) for (label, size), tuned in once.items()]
    return {(cell.entry.label, cell.setting): chosen[_key(cell)] for cell in grid}, told


def _levels(first: dict[Key, Cell], base: dict[Key, Key]) -> list[list[Key]]:
    """Lines whose searches need nothing of one another, those first that others build on."""
    sorter = TopologicalSorter({key: [base[key]] if key in base else [] for key in first})
    sorter.prepare()
    levels: list[list[Key]] = []
    while sorter.is_active():
        levels.append(list(sorter.get_ready()))
        sorter.done(*levels[-1])
    return levels


def _search(cell: Cell, taken: dict[str, Any], options: Options) -> Search:
    """Called by its line, and by the axes that tell it from other searches of that line."""
    several = len(options.datasets or ()) > 1
    axes = replace(cell.setting, dataset=cell.setting.dataset if several else None, mode=None)
    label = replace(cell, setting=axes, seed=None).label
    return Search(label, cell.entry.model, cell.setting.dataset, _without_test(cell, taken))


def _without_test(cell: Cell, taken: dict[str, Any]) -> dict[str, Any]:
    """A line's settings for its trials, which modes, numbers of test users and harm metrics of the test share."""
    settings = cell.settings | taken
    asked = {key: value for key, value in settings.items() if key != "look_alikes"} | never_tested(cell.config)
    try:
        LLMConfig(cell.entry.model, cell.setting.dataset, None, asked)
    except ConfigError:  # what the test alone could use
        return settings
    return asked


def _key(cell: Cell) -> Key:
    return cell.entry.label, replace(cell.setting, mode=None)


def _taken(values: dict[str, Any], cell: Cell) -> dict[str, Any]:
    """Of another line's values those that this line does not state itself."""
    return {key: value for key, value in values.items() if key not in cell.settings}


def _check_searches(
    first: dict[Key, Cell], base: dict[Key, Key], order: Sequence[Key], options: Options
) -> list[tuple[LLMConfig, list[Parameter]]]:
    """Configuration and space of every search; what will be taken is stood for by values as given.

    Raises:
        ConfigError: what is wrong with any of them.
    """
    problems: list[str] = []
    found = []
    given: dict[Key, dict[str, Any]] = {}
    for key in order:
        cell = first[key]
        taken = _taken(given[base[key]], cell) if key in base else {}
        given[key] = taken
        try:
            config, space = check_search(cell.entry.model, cell.setting.dataset, cell.settings | taken, options.search)
            given[key] = taken | {p.key: config[p.key] for p in space}
            found.append((config, space))
        except ConfigError as error:
            problems += [f"{cell.entry.label}: {p}" for p in error.problems]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return found


def _tell_plan(searches: Sequence[tuple[LLMConfig, list[Parameter]]], options: Options) -> None:
    """How many trials there may be, and how long they may take."""
    trials = [int(min(options.tune, proposals_of(*search).most())) for search in searches]
    seconds = sum(most * guessed_seconds(config) for most, (config, _) in zip(trials, searches, strict=True))
    print(
        f"[tune] {len(searches)} searches, at most {sum(trials)} trials, about {told_time(seconds / options.jobs)} "
        "(a guess; those that finished before take none); then the runs.",
        flush=True,
    )


def check_tuned_from(entries: Sequence[Entry], options: Options) -> None:
    """Raises ConfigError for a line that builds on none, on one of another model, or on itself in the end.

    What is said of lines that are not asked for is passed over: a file's table may hold more than ``--models``.
    """
    model = {entry.label: entry.model for entry in entries}
    sources, problems = options.tuned_from or {}, []
    for label in filter(model.__contains__, sources):
        start = f"--tuned_from: {label}: {sources[label]}"
        if sources[label] not in model:
            problems.append(f"{start} is none of --models; name a line of the comparison as it stands there.")
        elif model[sources[label]] != model[label]:
            problems.append(f"{start} is another model, whose keys mean something else; name a line of {model[label]}.")
        elif label in _chain(label, sources):
            problems.append(f"{start} builds on {label} in turn; leave one of them out.")
    if problems:
        raise ConfigError(problems)
    if options.tune and (others := [label for label in sources if label not in model]):
        print(f"[tune] --tuned_from: none of --models is called {', '.join(others)}; passed over.", flush=True)


def _chain(label: str, sources: dict[str, str]) -> list[str]:
    """What a line builds on, and what that builds on, until there is no more or one comes again."""
    found: list[str] = []
    while (label := sources.get(label, "")) and label not in found:
        found.append(label)
    return found


def told_as(cell: Cell) -> str:
    """Data set and training users of a cell, as the table of chosen values names them."""
    size = cell.config["few_shot"]
    return cell.config["dataset"] + ("" if size is None else f", {size} training users")


def builds_on(options: Options, shown: Sequence[str]) -> list[str]:
    """A sentence for every shown line whose search began with the chosen values of another."""
    names = options.names or {}
    pairs = [(names.get(a, a), names.get(b, b)) for a, b in (options.tuned_from or {}).items()]
    return [f"{line} takes the values chosen for {source}." for line, source in pairs if line in shown]
