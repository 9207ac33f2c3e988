"""What a configuration value may be: each check tells what is wrong with a value, or nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

Check = Callable[[Any], str | None]  # a value -> what is wrong with it ("must be ..."), or None

LEARNERS = ("adam", "adamw", "sgd", "adagrad", "rmsprop", "sparse_adam")


def integer(least: int = 0, most: int | None = None, *, optional: bool = False) -> Check:
    """A whole number of at least ``least`` (and at most ``most``); with ``optional``, empty too."""
    bounds = f">= {least}" + (f" and <= {most}" if most is not None else "")
    bounds += " or empty" if optional else ""

    def check(value: Any) -> str | None:
        if value is None and optional:
            return None
        fine = isinstance(value, int) and not isinstance(value, bool)
        fine = fine and value >= least and (most is None or value <= most)
        return None if fine else f"must be a whole number {bounds}"

    return check


def number(least: float = 0.0, most: float = math.inf, *, above: bool = False) -> Check:
    """A finite number in [least, most], or in (least, most] with ``above``."""
    bounds = "" if least == -math.inf else f" {'>' if above else '>='} {least:g}"
    bounds += f" and <= {most:g}" if most != math.inf else ""

    def check(value: Any) -> str | None:
        fine = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
        fine = fine and (value > least if above else value >= least) and value <= most
        return None if fine else f"must be a number{bounds}"

    return check


def one_of(*choices: Any) -> Check:
    """One of the values given; case counts."""
    told = ", ".join("(empty)" if c is None else str(c) for c in choices)
    return lambda value: None if value in choices else f"must be one of {told}"


def or_auto(check: Check) -> Check:
    """What a check allows, or ``auto``."""

    def told(value: Any) -> str | None:
        wrong = None if value == "auto" else check(value)
        return wrong and f"{wrong}, or auto"

    return told


def text(value: Any) -> str | None:
    """Any non-empty text."""
    return None if isinstance(value, str) and value else "must be text"


def optional_text(value: Any) -> str | None:
    """Text, or nothing."""
    return None if value is None else text(value)


def interval(value: Any) -> str | None:
    """RecBole's intervals of numbers, as in [5,inf) or (0,2];[5,inf), or nothing; others it warns of and leaves out."""
    parts = [] if value is None else [part.strip() for part in str(value).split(";")]
    fine = all(re.fullmatch(r"[\[(][^,]*,[^,]*[\])]", part) and _rises(part[1:-1].split(",")) for part in parts)
    return None if fine else "must be an interval such as '[5,inf)'; '[0,inf)' leaves nothing out"


def _rises(ends: list[str]) -> bool:
    try:
        return float(ends[0]) <= float(ends[1])
    except ValueError:
        return False


def file_name(value: Any) -> str | None:
    """Text that is part of the names of folders and files, and so cannot lead elsewhere."""
    fine = isinstance(value, str) and value.isprintable() and not {*"/\\"} & {*value} and value not in ("", ".", "..")
    told = "must be a name of at most 150 bytes, without slashes and control characters"
    return None if fine and len(value.encode()) <= 150 else told


def optional_file_name(value: Any) -> str | None:
    """A name, or nothing."""
    return None if value is None else file_name(value)


def flag(value: Any) -> str | None:
    """True or False."""
    return None if isinstance(value, bool) else "must be True or False"


def off(value: Any) -> str | None:
    """False, of what would give one model other data than another."""
    return None if value is False else "must be False, for it takes interactions from some models alone; leave it out"


def text_or_list(value: Any) -> str | None:
    """Text, or a list of texts."""
    texts = [value] if isinstance(value, str) else value
    fine = isinstance(texts, (list, tuple)) and texts and all(isinstance(v, str) and v for v in texts)
    return None if fine else "must be text or a list of texts"


def gpu(value: Any) -> str | None:
    """RecBole's GPU numbers: 0, "0,1", or empty for the CPU."""
    fine = isinstance(value, (str, int, tuple)) and not isinstance(value, bool)
    return None if fine else "must be the number of a GPU, several as 0,1, or empty text for the CPU"


def learner(value: Any) -> str | None:
    """An optimizer that RecBole knows; it takes Adam for any other, with no more than a warning."""
    fine = isinstance(value, str) and value.lower() in LEARNERS
    return None if fine else f"must be one of {', '.join(LEARNERS)}"


def mixed(*choices: str) -> Check:
    """One of the values given, or several different ones joined by ``+``."""
    told = f"must be one of {', '.join(choices)}, or several joined by +, as in {choices[0]}+{choices[1]}"

    def check(value: Any) -> str | None:
        parts = value.split("+") if isinstance(value, str) else []
        return None if parts and set(parts) <= set(choices) and len(set(parts)) == len(parts) else told

    return check


def smoothing(value: Any) -> str | None:
    """RosePO's epsilon: a number, or the oracle's."""
    return None if value == "oracle" or number(0, 0.5)(value) is None else "must be oracle, or a number >= 0 and <= 0.5"


def table(value: Any) -> str | None:
    """Settings in a table, or empty."""
    return None if value is None or isinstance(value, dict) else "must be a table, for example {'key': 'value'}"


def value_intervals(value: Any) -> str | None:
    """RecBole's table of columns and what their values may be: an interval of numbers, or a list of tokens."""
    told = "must be a table such as {'rating': '[3,inf)'}, of a token column {'kind': ['film', 'series']}"
    if value is None:
        return None
    fine = isinstance(value, dict) and all(
        isinstance(wanted, (list, tuple)) or (isinstance(wanted, str) and interval(wanted) is None)
        for wanted in value.values()
    )
    return None if fine else told


def columns(value: Any) -> str | None:
    """RecBole's table of files and their columns, or nothing."""
    fine = value is None or (
        isinstance(value, dict)
        and all(names == "*" or (isinstance(names, (list, tuple)) and names) for names in value.values())
    )
    return None if fine else "must be a table such as {'inter': ['user_id', 'item_id', 'timestamp']}, or empty"


def negatives(value: Any) -> str | None:
    """RecBole's table of how negatives are drawn, or nothing."""
    entries: dict[str, Check] = {
        "distribution": one_of("uniform", "popularity", None, "None"),
        "sample_num": integer(1),
        "alpha": number(),
        "dynamic": flag,
        "candidate_num": integer(),
    }
    if value is None:
        return None
    if not isinstance(value, dict):
        return "must be a table such as {'distribution': 'uniform', 'sample_num': 1}"
    for entry, given in value.items():
        if entry not in entries:
            return f"must have no entry {entry!r}; there are {', '.join(entries)}"
        if value.get("distribution", "uniform") not in (None, "None") and (told := entries[entry](given)):
            return f"its {entry} {told}"
    return None


def clipping(value: Any) -> str | None:
    """RecBole's table for torch's ``clip_grad_norm_``, or empty."""
    fine = value is None or (
        isinstance(value, dict)
        and number(above=True)(value.get("max_norm")) is None
        and set(value) <= {"max_norm", "norm_type"}
    )
    return None if fine else "must be a table such as {'max_norm': 1.0}, or empty"
