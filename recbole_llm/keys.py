"""What each of our configuration keys may hold, and how a wrong one is told.

A key's meaning, unit and default stand in ``properties/``; here stands what is allowed. RecBole's own keys
are checked against the type of RecBole's default.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Check = Callable[[Any], str | None]  # a value -> what is wrong with it ("must be ..."), or None

LOSSES = ("SFT", "DPO", "DMPO", "SDPO")
REJECTED = ("uniform", "popularity", "low_rating")
SCORE_NORMS = ("sum", "mean", "pmi")


def integer(least: int = 0, *, optional: bool = False) -> Check:
    """A whole number of at least ``least``; with ``optional``, empty too."""

    def check(value: Any) -> str | None:
        if value is None and optional:
            return None
        fine = isinstance(value, int) and not isinstance(value, bool) and value >= least
        return None if fine else f"must be a whole number >= {least}" + (" or empty" if optional else "")

    return check


def number(least: float = 0.0, most: float = float("inf"), *, above: bool = False) -> Check:
    """A number in [least, most], or in (least, most] with ``above``."""

    def check(value: Any) -> str | None:
        fine = isinstance(value, (int, float)) and not isinstance(value, bool)
        fine = fine and (value > least if above else value >= least) and value <= most
        bounds = f"{'>' if above else '>='} {least:g}" + (f" and <= {most:g}" if most != float("inf") else "")
        return None if fine else f"must be a number {bounds}"

    return check


def one_of(*choices: Any) -> Check:
    """One of the values given."""
    told = ", ".join("(empty)" if c is None else str(c) for c in choices)
    return lambda value: None if value in choices else f"must be one of {told}"


def text(value: Any) -> str | None:
    """Any non-empty text."""
    return None if isinstance(value, str) and value else "must be text"


def flag(value: Any) -> str | None:
    """True or False."""
    return None if isinstance(value, bool) else "must be True or False"


def text_or_list(value: Any) -> str | None:
    """Text, or a list of texts."""
    fine = isinstance(value, str) or (isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value))
    return None if fine else "must be text or a list of texts"


# Keys that every model shares (properties/overall.yaml).
PROTOCOL_KEYS: dict[str, Check] = {
    "mask_history": flag,
    "candidate_seed": integer(),
    "eval_users": integer(1, optional=True),
    "few_shot": integer(1, optional=True),
    "few_shot_seed": integer(),
}
# Keys of LLMRanker (properties/model/LLMRanker.yaml).
LLM_KEYS: dict[str, Check] = {
    "llm": text,
    "dtype": one_of("auto", "float32", "bfloat16", "float16"),
    "quantization": one_of(None, "4bit"),
    "finetune": one_of("lora", "full", "none"),
    "attention": one_of("auto", "sdpa", "eager"),
    "lora_r": integer(1),
    "lora_alpha": number(above=True),
    "lora_dropout": number(0, 0.99),
    "lora_target_modules": text_or_list,
    "item_text": text,
    "item_text_max_tokens": integer(4),
    "prompt": text,
    "loss": one_of(*LOSSES),
    "beta": number(above=True),
    "rejected": one_of(*REJECTED),
    "rejected_num": integer(0),
    "rating_threshold": number(float("-inf")),
    "preference_epochs": integer(0),
    "preference_learning_rate": number(above=True),
    "preference_positions": integer(0),
    "sft_positions": integer(0),
    "lr_scheduler": one_of("cosine", "linear", "constant"),
    "warmup_ratio": number(0, 1),
    "token_budget": integer(64),
    "score_norm": one_of(*SCORE_NORMS),
    "rerank_model": text,
    "rerank_topk": integer(1),
}
OWN_KEYS = PROTOCOL_KEYS | LLM_KEYS

# Keys that RecBole reads but lists in no YAML of its own.
UNLISTED_RECBOLE_KEYS = {
    "model", "dataset", "config_files", "nproc", "ip", "port", "world_size", "group_offset", "tail_ratio",
    "reg_weight", "loss_type", "numerical_features", "saved", "metrics_smaller", "discretization",
}


def unknown_keys(keys: Iterable[str], known: Iterable[str]) -> list[str]:
    """One sentence for each key that nothing reads, with the closest that something does."""
    known = sorted(known)
    problems = []
    for key in keys:
        if key in known:
            continue
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        hint = f"did you mean `{close[0]}`?" if close else "`recbole-llm ls --keys` lists those there are."
        problems.append(f"--{key}: no such key; {hint}")
    return problems


def wrong_values(values: Mapping[str, Any], recbole_defaults: Mapping[str, Any]) -> list[str]:
    """One sentence for each value of the wrong type or out of range.

    Args:
        values: what the user gave.
        recbole_defaults: RecBole's own default of each of its keys, whose type is the type allowed.
    """
    problems = []
    for key, value in values.items():
        told = OWN_KEYS[key](value) if key in OWN_KEYS else _unlike_default(value, recbole_defaults.get(key))
        if told:
            problems.append(f"--{key}={value!r}: {told}.")
    return problems


def _unlike_default(value: Any, default: Any) -> str | None:
    """RecBole's keys: a number stays a number and a switch a switch. Texts and tables RecBole checks itself."""
    if isinstance(default, bool):
        return flag(value)
    if isinstance(default, int):
        return None if isinstance(value, int) and not isinstance(value, bool) else "must be a whole number"
    if isinstance(default, float):
        fine = isinstance(value, (int, float)) and not isinstance(value, bool)
        return None if fine else "must be a number"
    return None
