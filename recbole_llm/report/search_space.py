"""What is searched: the keys of a model and their ranges, from ``properties/search`` or a file of the user's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from recbole_llm import checks, keys
from recbole_llm.config import LLMConfig
from recbole_llm.errors import ConfigError
from recbole_llm.model import model_names
from recbole_llm.settings import PROPERTIES, parse_value, read_yaml, shipped
from recbole_llm.wrong_keys import unknown_keys, wrong_values

DIGITS = 4  # significant ones of a real number that is proposed, so that a table can print it whole
FORMS = (
    "a list of values, or a table with one of {'choice': [...]}, {'log': [low, high]}, {'uniform': [low, high]} or "
    "{'int': [low, high]} (the last two may end in a step), and {'unless': {key: values}} beside it"
)


@dataclass(frozen=True)
class Parameter:
    """One key and the values it may take.

    Attributes:
        kind: ``choice`` among ``bounds``, or between two of them: ``log`` (real, its logarithm uniform), ``uniform``
            (real) or ``int``.
        bounds: the values; or low, high and, where there is one, a step.
        unless: key -> values of it under which this one is not searched.
    """

    key: str
    kind: str
    bounds: tuple[Any, ...]
    unless: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def step(self) -> float | None:
        """Between neighbouring numbers; None where there are none."""
        if len(self.bounds) == 3:
            return self.bounds[2]
        return 1 if self.kind == "int" else None

    @property
    def size(self) -> float:
        """How many values there are; infinity for real numbers."""
        if self.kind == "choice":
            return len(self.bounds)
        return math.inf if self.step is None else round((self.bounds[1] - self.bounds[0]) / self.step) + 1

    def value(self, drawn: float) -> Any:
        """What a draw means: the value at a place of a choice, or a number as it is printed."""
        if self.kind == "choice":
            return self.bounds[int(drawn)]
        if self.kind == "int":
            return int(drawn)
        low, high = self.bounds[:2]
        digits = DIGITS if self.step is None else 12  # neighbours stay apart; 3 * .1 is .30000000000000004
        return min(max(float(f"{drawn:.{digits}g}"), low), high)

    def drawn(self, value: Any) -> float | None:
        """The draw that means a value; None where the value lies outside."""
        if self.kind == "choice":
            return self.bounds.index(value) if value in self.bounds else None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        low, high = self.bounds[:2]
        steps = 0.0 if self.step is None else (value - low) / self.step
        return value if low <= value <= high and math.isclose(steps, round(steps), abs_tol=1e-8) else None

    def nth(self, place: int) -> float:
        """The draw at a place, where they can be counted."""
        if self.kind == "choice":
            return place
        assert self.step is not None  # else they cannot be counted
        return self.bounds[0] + place * self.step

    def idle(self, config: LLMConfig) -> bool:
        """Whether these settings do not read the key."""
        return any(config[key] in values for key, values in self.unless.items())

    def form(self) -> dict[str, list[Any]]:
        """As it is written in YAML."""
        return {self.kind: list(self.bounds)}


def search_space(config: LLMConfig, search: str | None = None) -> list[Parameter]:
    """What is searched for a model: its space without the keys that the user gave, or that the run does not read.

    Args:
        config: of the model, with the user's settings.
        search: a folder with ``<Model>.yaml`` or ``<Model>.hyper``, or one such file; a file of any other name is for
            every model, as RecBole's ``hyper.test``. A model without one there has its space in ``properties/search``.

    Raises:
        ConfigError: everything that is wrong with the space; or there is none for this model.
    """
    file = _file_of(config.model, search)
    forms = _read_yaml(file) if file.suffix in (".yaml", ".yml") else read_hyper(file)
    parameters, problems = [], []
    for key, form in forms.items():
        try:
            parameters.append(parameter(key, form))
        except ValueError as error:
            problems.append(f"{key}: {error}.")
    problems += _wrong_keys(config, parameters)
    if problems:
        raise ConfigError([f"--search: `{file}`: {problem}" for problem in problems])
    given = config.external_config_dict
    return [p for p in parameters if p.key not in given and not p.idle(config)]


def parameter(key: str, form: Any) -> Parameter:
    """A range as YAML tells it.

    Raises:
        ValueError: it is none; says what would be.
    """
    table = {"choice": form} if isinstance(form, (list, tuple)) else form
    kinds = [k for k in table if k != "unless"] if isinstance(table, dict) else []
    if len(kinds) != 1 or kinds[0] not in ("choice", "log", "uniform", "int"):
        raise ValueError(f"{form!r} must be {FORMS}")
    (kind,), bounds, unless = kinds, table[kinds[0]], table.get("unless") or {}
    if not isinstance(bounds, (list, tuple)) or not bounds or not isinstance(unless, dict):
        raise ValueError(f"{form!r} must be {FORMS}")
    if wrong := _wrong_choices(bounds) if kind == "choice" else _wrong_bounds(kind, bounds):
        raise ValueError(f"{bounds!r} {wrong}")
    listed = {k: list(v) if isinstance(v, (list, tuple)) else [v] for k, v in unless.items()}
    return Parameter(key, kind, tuple(bounds), listed)


def _wrong_choices(values: Sequence[Any]) -> str | None:
    return "names a value twice" if any(value in values[:i] for i, value in enumerate(values)) else None


def _wrong_bounds(kind: str, bounds: Sequence[Any]) -> str | None:
    """What is wrong with low, high and step."""
    most = 2 if kind == "log" else 3
    plain = all(isinstance(b, (int, float)) and not isinstance(b, bool) and math.isfinite(b) for b in bounds)
    if not plain or not 2 <= len(bounds) <= most or (kind == "int" and not all(isinstance(b, int) for b in bounds)):
        told = "whole numbers" if kind == "int" else "numbers"
        return f"must be two {told}, low and high" + (", and a step if you like" if most == 3 else "")
    low, high, *step = bounds
    if low >= high:
        return "must be low before high; write one value as a list"
    if kind == "log" and low <= 0:
        return "must be above 0, for it has no logarithm; write the number itself, not its exponent"
    if step and (step[0] <= 0 or not math.isclose((high - low) / step[0], round((high - low) / step[0]))):
        return "has a step that does not lead from low to high"
    return None


def _wrong_keys(config: LLMConfig, parameters: list[Parameter]) -> list[str]:
    """Keys that the model does not read, that say what is asked, or that cannot have such values."""
    known = config.known_keys()
    named = {p.key: p.bounds[0] for p in parameters} | {key: "" for p in parameters for key in p.unless}
    owners = partial(checks.model_keys, PROPERTIES)
    problems = [told.removeprefix("--") for told in unknown_keys(named, known, config.model, owners)]
    everyones = (checks.shared_keys(PROPERTIES) | set(keys.PROTOCOL_KEYS)) - keys.TRAINING_KEYS
    unread = set(keys.NOT_OF_LLMS) if keys.ranks_titles(config.final_config_dict) else set()
    for p in (p for p in parameters if p.key in known):
        if p.key in everyones - {"MAX_ITEM_LIST_LENGTH"}:
            problems.append(f"{p.key}: it is the same for every model, so it is not searched; leave it out.")
        if p.key in unread:
            problems.append(f"{p.key}: the training of an LLM does not read it; leave it out.")
        values = p.bounds if p.kind == "choice" else p.bounds[:2]
        asked = [(p.key, value) for value in values]
        asked += [(key, value) for key, listed in p.unless.items() if key in known for value in listed]
        told = [t for key, value in asked for t in wrong_values({key: value}, config.recbole_defaults)]
        problems += [t.removeprefix("--") for t in told]
    return problems


# ---- files


def _file_of(model: str, search: str | None) -> Path:
    """The file that holds a model's space.

    Raises:
        ConfigError: nothing there, two of them, or none for this model.
    """
    own = PROPERTIES / "search" / f"{model}.yaml"
    given = shipped(str(search)) if search is not None else own
    if not given.exists() and search is not None:
        raise ConfigError([f"--search={search}: no such file or folder."])
    if given.is_dir():
        found = [file for suffix in (".yaml", ".hyper") if (file := given / f"{model}{suffix}").is_file()]
        if len(found) > 1:
            raise ConfigError([f"--search={search}: it holds two spaces for {model}; remove one of them."])
        given = found[0] if found else own
    elif given.stem != model and given.stem in model_names():  # another model's
        given = own
    if not given.is_file():
        raise ConfigError(
            [
                f"--tune: there is no search space for {model}. Write one into <folder>/{model}.yaml, for example "
                "`learning_rate: {log: [1e-4, 1e-2]}`, and set --search=<folder>."
            ]
        )
    return given


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        return read_yaml(str(file))
    except ConfigError as error:
        raise ConfigError([p.replace("--config_files", "--search", 1) for p in error.problems]) from None


def read_hyper(file: Path) -> dict[str, Any]:
    """A space in RecBole's text form, ``key type range`` a line, as YAML would tell it.

    ``loguniform`` bounds are natural logarithms, as in hyperopt. ``quniform low,high,q`` is the multiples of q from
    round(low / q) to round(high / q); hyperopt draws the first and the last half as often as the others, we as often.

    Raises:
        ConfigError: names every line that is none.
    """
    forms: dict[str, Any] = {}
    problems = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError([f"--search: cannot read `{file}` ({error})."]) from None
    for number, line in enumerate(lines, 1):
        parts = line.split(maxsplit=2)
        if not parts or parts[0].startswith("#"):
            continue
        try:
            if len(parts) < 3 or parts[0] in forms:
                raise ValueError
            forms[parts[0]] = _hyper_form(parts[1], parse_value(parts[2]))
        except (ValueError, TypeError, KeyError, OverflowError, ZeroDivisionError):
            problems.append(
                f"--search: `{file}`, line {number}: `{line.strip()}` must look like `learning_rate loguniform -8,0`, "
                "`dropout_prob uniform 0,0.5`, `n_layers quniform 1,3,1` or `embedding_size choice [64,96]`, each key "
                "once."
            )
    if problems:
        raise ConfigError(problems)
    return forms


def _hyper_form(kind: str, told: Any) -> Any:
    if not isinstance(told, list):
        raise ValueError
    if kind == "choice":  # RecBole wants lists in quotes
        return [parse_value(value) if isinstance(value, str) else value for value in told]
    numbers = [float(value) for value in told]
    if kind == "quniform":
        low, high, q = numbers
        low, high = (round(round(bound / q) * q, 12) for bound in (low, high))  # 3 * .1 is .30000000000000004
        whole = all(number.is_integer() for number in (low, high, q))
        return {"int": [int(low), int(high), int(q)]} if whole else {"uniform": [low, high, q]}
    low, high = numbers
    rounded = [float(f"{math.exp(x):.{DIGITS}g}") for x in (low, high)] if kind == "loguniform" else [low, high]
    return {{"loguniform": "log", "uniform": "uniform"}[kind]: rounded}
