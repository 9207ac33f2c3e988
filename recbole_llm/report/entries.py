"""The models of a comparison as the user types them, and what is asked of the comparison as a whole."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

from recbole_llm.errors import ConfigError
from recbole_llm.key_checks import Check, flag, integer, number, one_of, optional_text, text
from recbole_llm.keys import PROTOCOL_KEYS
from recbole_llm.model import model_class
from recbole_llm.settings import TEXT_FLAGS, parse_value

MODEL = re.compile(r"(?P<model>\w+)(\[(?P<settings>.*)\])?", re.DOTALL)
EXAMPLE = "--models=Pop,SASRec,LLMRanker"


@dataclass(frozen=True)
class Entry:
    """One line of a table: a model with settings of its own, by the label the user typed."""

    label: str
    model: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What a comparison is asked beside the settings of its runs; meanings stand in properties/comparison.yaml.

    Attributes:
        datasets, few_shots, modes, seeds: what every model is run over; None = as the runs' own settings have it.
    """

    datasets: tuple[str, ...] | None = None
    few_shots: tuple[int | None, ...] | None = None
    modes: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    baseline: tuple[str, ...] | None = None
    alternative: str = "two-sided"
    test: str = "t"
    alpha: float = 0.05
    resamples: int = 9999
    table_metrics: tuple[str, ...] | None = None
    names: dict[str, str] | None = None
    per_model: dict[str, dict[str, Any]] | None = None
    out: str | None = None
    plots: bool = True
    jobs: int = 1
    cluster: str | None = None
    tune: int = 0
    search: str | None = None
    tuned_from: dict[str, str] | None = None


# Keys of a comparison as typed, where they are not the attributes' names.
TYPED = {"datasets": "dataset", "few_shots": "few_shot"}


def _each(check: Check) -> Check:
    """Every value of a list passes; repeated values are told."""

    def told(values: Any) -> str | None:
        if not values or len(set(map(str, values))) < len(values):
            return "must be one or several different values, separated by commas"
        return next((wrong for v in values if (wrong := check(v))), None)

    return told


def _mode(value: Any) -> str | None:
    fine = isinstance(value, str) and re.fullmatch(r"full|(uni|pop|low)[1-9]\d*", value)
    return None if fine else "must be full, uniN, popN or lowN, as in uni99,full"


CHECKS: dict[str, Check] = {
    "datasets": _each(text),
    "few_shots": _each(PROTOCOL_KEYS["few_shot"]),
    "modes": _each(_mode),
    "seeds": _each(integer(0, 2**32 - 1)),
    "baseline": _each(text),
    "alternative": one_of("two-sided", "better"),
    "test": one_of("t", "randomization"),
    "alpha": number(0, 0.5, above=True),
    "resamples": integer(99),
    "table_metrics": _each(text),
    "plots": flag,
    "jobs": integer(1),
    "cluster": optional_text,
    "tune": integer(0),
    "search": optional_text,
    "out": optional_text,
}
LABEL_TABLES = {
    "names": "{'LLMRanker[loss=DMPO]': 'DMPO'}",
    "tuned_from": "{'LLMRanker[loss=DMPO]': 'LLMRanker'}",
}
NUMBERS = ("few_shots", "seeds")
LISTS = ("datasets", "few_shots", "modes", "seeds", "baseline", "table_metrics")


def split_options(settings: dict[str, Any]) -> tuple[Options, dict[str, Any]]:
    """A comparison's settings -> what is asked of it as a whole, and what all runs share.

    Raises:
        ConfigError: what is wrong with the former.
    """
    rest, given, problems = dict(settings), {}, []
    for name, key in ((f.name, TYPED.get(f.name, f.name)) for f in fields(Options)):
        if name == "few_shots" and not isinstance(rest.get(key), (str, list, tuple)):
            continue  # one size is a setting of the runs
        value = rest.pop(key, None)
        if value is None:
            continue
        value = tuple(_listed(value, name in NUMBERS)) if name in LISTS else value
        told = CHECKS[name](value) if name in CHECKS else None
        problems += [f"--{key}={settings[key]!r}: {told}."] if told else []
        given[name] = value
    for key, example in LABEL_TABLES.items():
        table = given.get(key) or {}
        if not isinstance(table, dict) or not all(isinstance(v, str) and v for v in table.values()):
            problems.append(f"--{key}={table!r}: must be a table of labels, as in {example}.")
    try:
        given["per_model"] = per_model_settings(given.get("per_model"))
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return Options(**cast(Any, given)), rest


def _listed(value: Any, numbers: bool) -> list[Any]:
    """``"a,b"``, ``[1, 2]`` or one value -> a list; ``none`` in a text is None, and in a list, where YAML leaves it."""
    if isinstance(value, str):
        return [parse_value(v.strip()) if numbers else v.strip() for v in split_commas(value)]
    if isinstance(value, (list, tuple)):
        return [None if isinstance(v, str) and v.lower() == "none" else v for v in value]
    return [value]


def parse_models(text: str | Sequence[str]) -> list[Entry]:
    """``Pop,SASRec,LLMRanker[loss=DMPO,beta=0.5]`` -> entries; commas inside brackets belong to the model.

    Raises:
        ConfigError: an entry is not a model name with ``key=value`` settings.
    """
    parts = split_commas(text) if isinstance(text, str) else text
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
        raise ConfigError([f"--models={text!r}: must be text or a list of texts, for example {EXAMPLE}."])
    entries, problems = [], []
    for part in dict.fromkeys(p.strip() for p in parts if p.strip()):
        found = MODEL.fullmatch(part)
        pairs = [s.partition("=") for s in split_commas(found["settings"] or "") if s.strip()] if found else []
        if not found or any(not key.strip() or not mark for key, mark, _ in pairs):
            problems.append(f"--models: `{part}` must look like SASRec or LLMRanker[loss=DMPO,beta=0.5].")
            continue
        entries.append(Entry(part, found["model"], {k.strip(): _value(k.strip(), v.strip()) for k, _, v in pairs}))
    if not entries and not problems:
        problems.append(f"--models: name at least one, for example {EXAMPLE}.")
    if problems:
        raise ConfigError(problems)
    return entries


def _value(key: str, typed: str) -> Any:
    """As on the command line: what is text there is text here, too."""
    value = parse_value(typed)
    return typed if key in TEXT_FLAGS and value is not None else value


def split_commas(text: str) -> list[str]:
    """The parts between commas; commas in brackets of any kind belong to a part."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def per_model_settings(given: Any) -> dict[str, dict[str, Any]]:
    """The ``per_model`` table, which may come from a file of the user's.

    Raises:
        ConfigError: it is no table of tables, or names no model.
    """
    if not isinstance(given or {}, dict) or not all(isinstance(v, dict) for v in (given or {}).values()):
        raise ConfigError([f"--per_model={given!r}: must be a table of tables, as in {{'SASRec': {{'epochs': 50}}}}."])
    problems = []
    for model in given or {}:  # a file's table may hold more models than are asked for now
        try:
            model_class(str(model))
        except ConfigError as error:
            problems += [p.replace("--model=", "--per_model: ", 1) for p in error.problems]
    if problems:
        raise ConfigError(problems)
    return given or {}
