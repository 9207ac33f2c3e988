"""Keys that nothing reads and values that a key may not hold, each told in a sentence."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from recbole_llm.key_checks import flag, number
from recbole_llm.keys import CHECKS, REFUSED
from recbole_llm.settings import PROPERTIES, read_yaml

# RecBole's YAML writes these real numbers, switches and texts as whole numbers.
_LOOSE = {
    "q",
    "global_ratio",
    "spatial_ratio",
    "dropout_prob",
    "hidden_dropout_prob",
    "resolution",
    "use_proj_bias",
    "reranker_CAN_NUM",
}


def unknown_keys(
    given: Mapping[str, Any], known: Collection[str], model: str, owners: Callable[[], Mapping[str, Collection[str]]]
) -> list[str]:
    """One sentence for each key that nothing reads, with the models that do read it or the closest key.

    Args:
        given: the user's settings.
        known: keys that this model or its protocol reads.
        owners: gives key -> names of the models whose key it is; asked only when there is something to tell.
    """
    problems = []
    for key, value in given.items():
        if key in REFUSED:
            unset = value is None or value is False
            problems += [] if unset else [f"--{key}={value!r}: {REFUSED[key]}."]
        elif key in known:
            continue
        elif models := list(owners().get(key, ())):
            told = ", ".join(models[:3]) + (f" and {len(models) - 3} more" if len(models) > 3 else "")
            problems.append(
                f"--{key}: {model} does not read it; it is a key of {told}. Leave it out, or in "
                f"a comparison give it to that model alone: {models[0]}[{key}={value}]."
            )
        elif key == "models" or key in read_yaml(str(PROPERTIES / "comparison.yaml")):
            problems.append(f"--{key}: a key of `recbole-llm compare`, not of a run; leave it out.")
        else:
            listed = "`recbole-llm ls --keys` lists ours, RecBole's documentation its own"
            problems.append(f"--{key}: no such key; {closest(key, known, listed)}")
    return problems


def closest(name: str, known: Collection[str], otherwise: str) -> str:
    """``did you mean X?`` where a name is near, whatever its case; else what to do ``otherwise``."""
    lower = {k.lower(): k for k in sorted(known)}
    close = difflib.get_close_matches(str(name).lower(), lower, n=1, cutoff=0.6)
    return f"did you mean `{lower[close[0]]}`?" if close else f"{otherwise}."


def wrong_values(values: Mapping[str, Any], recbole_defaults: Mapping[str, Any]) -> list[str]:
    """One sentence for each value of the wrong type or out of range.

    Args:
        values: what the user gave.
        recbole_defaults: RecBole's own default of each of its keys, whose type is the type allowed.
    """
    problems = []
    for key, value in values.items():
        told = CHECKS[key](value) if key in CHECKS else _unlike_default(key, value, recbole_defaults.get(key))
        if told:
            problems.append(f"--{key}={value!r}: {told}.")
    return problems


def _unlike_default(key: str, value: Any, default: Any) -> str | None:
    """RecBole's keys: a number stays a number, a switch a switch, and so on."""
    if key in _LOOSE or key in ("topk", "metrics", "eval_args", "valid_metric"):  # told with the evaluation
        return None
    if key == "additional_feat_suffix":  # which RecBole's own YAML has as a text and as a list
        texts = value if isinstance(value, list) else [value]
        fine = value is None or all(isinstance(text, str) for text in texts)
        return None if fine else "must be text, or a list of it"
    if isinstance(default, bool):
        return flag(value)
    if isinstance(default, int):
        return None if isinstance(value, int) and not isinstance(value, bool) else "must be a whole number"
    if isinstance(default, float):
        return number(-math.inf)(value)
    kinds: dict[type, str] = {
        str: "text",
        dict: "a table, for example {'key': 'value'}",
        list: "a list, for example [1, 2]",
    }
    told = kinds.get(type(default))
    return None if told is None or value is None or isinstance(value, type(default)) else f"must be {told}"
