"""Data that are missing or cannot be read with these settings; told before any work."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from recbole_llm import keys
from recbole_llm.data.atomic import atomic_file, check_items, check_text, inter_columns, item_columns, read_header
from recbole_llm.data.item_text import text_template
from recbole_llm.data.template import load_template
from recbole_llm.dpo4rec.setting_checks import check_texts
from recbole_llm.errors import UserError, problems_of
from recbole_llm.key_checks import interval

# What the data are read with.
READ_WITH = (
    "data_path",
    "field_separator",
    "USER_ID_FIELD",
    "ITEM_ID_FIELD",
    "TIME_FIELD",
    "RATING_FIELD",
    "item_text",
    "prompt",
    "reasoning_item",
    "reasoning_prompt",
    "liked_only",
    "min_disliked",
    "load_col",
    "unload_col",
    "val_interval",
)


def wrong_data(settings: Mapping[str, Any], dataset: str, properties: Path) -> list[str]:
    """Files that are missing or cannot be read with these settings.

    Args:
        settings: with ``data_path`` as the data set's own folder, and the ``load_col`` that is read with.
    """
    problems = problems_of(lambda: inter_columns(settings, dataset))
    if not problems:  # a missing or unreadable file is told once
        problems += _wrong_columns(settings, dataset) + _wrong_intervals(settings, dataset)
        problems += _needs_ratings(settings, dataset, properties)
        problems += _wrong_features(settings, dataset)
        beside = ("item", "user", "kg", "link") if settings["load_col"] is None else settings["load_col"]
        for suffix in beside:
            if suffix != "inter" and _columns_read(settings, dataset, suffix):
                problems += problems_of(partial(check_text, settings, dataset, suffix))
    if settings.get("knowledge", "none") != "none":
        return problems + problems_of(lambda: check_texts(settings, dataset, properties))
    if not keys.ranks_titles(settings):
        return problems
    if Path(settings["data_path"]).is_dir():  # a missing folder is told once
        wanted = settings["item_text"]
        told = problems_of(lambda: text_template(wanted, item_columns(settings, dataset), dataset))
        problems += told or problems_of(lambda: check_items(settings, dataset))
    return problems + (
        problems_of(lambda: load_template(settings["prompt"], properties)) or _wrong_pairs(settings, properties)
    )


def _needs_ratings(settings: Mapping[str, Any], dataset: str, properties: Path) -> list[str]:
    """Settings that read ratings, of a data set that has none."""
    draws = settings.get("loss", "SFT") != "SFT" or _lists_a_pair(settings, properties)
    wanted = {
        "--liked_only=True": settings["liked_only"] is True,
        "--min_disliked": settings["min_disliked"] != 0,
        f"--rejected={settings.get('rejected')}": "low_rating" in str(settings.get("rejected")) and draws,
    }
    name = settings["RATING_FIELD"]
    if name in _columns_read(settings, dataset):
        return []
    lacks = f"{dataset}.inter has no rating column {name!r}; name it with --RATING_FIELD"
    if name in inter_columns(settings, dataset):
        lacks = f"the rating column {name!r} is not read; see --load_col and --unload_col"
    return [f"{key}: {lacks}, or leave this out." for key, is_wanted in wanted.items() if is_wanted]


def _columns_read(settings: Mapping[str, Any], dataset: str, suffix: str = "inter") -> dict[str, str]:
    """Columns of a file that are read, and their types."""
    load = settings["load_col"]
    wanted = "*" if load is None else load.get(suffix, ())
    left_out = (settings["unload_col"] or {}).get(suffix, ())
    return {
        name: kind
        for name, kind in _header(atomic_file(settings, dataset, suffix), settings).items()
        if (wanted == "*" or name in wanted) and left_out != "*" and name not in left_out
    }


def _header(file: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Columns and types of a file; none where it is not there or cannot be read, which is told where it is needed."""
    try:
        return read_header(file, settings["field_separator"])
    except UserError:
        return {}


def _wrong_columns(settings: Mapping[str, Any], dataset: str) -> list[str]:
    """What ``load_col`` and ``unload_col`` name and no file has, and what they leave out."""
    problems = []
    for key in ("load_col", "unload_col"):
        for suffix, names in (settings[key] or {}).items():
            file = atomic_file(settings, dataset, str(suffix))
            if not file.is_file():
                problems.append(f"--{key} names the file {file.name}, and there is none in {file.parent}.")
                continue
            header = _header(file, settings)
            unknown = [] if names == "*" else [str(name) for name in names if name not in header]
            by = "selected_features" if unknown and set(unknown) <= set(_features(settings)) else key
            told = ", ".join(header)
            problems += [f"--{by}: {file.name} has no column {', '.join(unknown)}; it has {told}."] if unknown else []
    both = [s for s in settings["unload_col"] or {} if (settings["load_col"] or {}).get(s, "*") != "*"]
    problems += [f"--load_col and --unload_col both name {', '.join(both)}; leave one of them out."] if both else []
    needed = [settings[k] for k in ("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD")]
    read = _columns_read(settings, dataset)
    lacks = [c for c in needed if c not in read]
    if lacks:
        key = "load_col" if settings["load_col"] is not None else "unload_col"
        problems.append(f"--{key}: inter lacks {', '.join(lacks)}, which the protocol needs; add it.")
    return problems


def _features(settings: Mapping[str, Any]) -> list[str]:
    """Columns of items that FDSA and its like read."""
    named = settings.get("selected_features")
    return named if isinstance(named, list) else []  # another type is told elsewhere


def _wrong_features(settings: Mapping[str, Any], dataset: str) -> list[str]:
    """Columns of items that a model needs, and that are not read."""
    file, read = atomic_file(settings, dataset, "item"), _columns_read(settings, dataset, "item")
    header = _header(file, settings)
    return [
        f"--selected_features: the column {name!r} of {file.name} is not read; add it to --load_col."
        for name in _features(settings)
        if name in header and name not in read
    ]


def _wrong_intervals(settings: Mapping[str, Any], dataset: str) -> list[str]:
    """Columns of ``val_interval`` that no file has, or whose values it names in the way of another type."""
    types: dict[str, str] = {}
    for suffix in ("item", "user", "inter"):
        types |= _columns_read(settings, dataset, suffix)
    problems = []
    for name, wanted in (settings["val_interval"] or {}).items():
        number = types.get(name, "token").startswith("float")
        if name not in types:
            problems.append(f"--val_interval: no column {name!r} is read; look at its name, or add it to --load_col.")
        elif (interval(wanted) is not None) if number else isinstance(wanted, str):
            example = "an interval such as '[3,inf)'" if number else "a list of the tokens that stay"
            problems.append(f"--val_interval: {name} is of type {types[name]}; give {example}, not {wanted!r}.")
    return problems


def _lists_a_pair(settings: Mapping[str, Any], properties: Path) -> bool:
    if "prompt" not in settings or problems_of(lambda: load_template(settings["prompt"], properties)):
        return False  # none, or told already
    return load_template(settings["prompt"], properties)["family"] == "pair"


def _wrong_pairs(settings: Mapping[str, Any], properties: Path) -> list[str]:
    """What a prompt that lists two candidates cannot do."""
    if not _lists_a_pair(settings, properties):
        return []
    mode = settings["eval_args"].get("mode", "full") if isinstance(settings["eval_args"], dict) else ""
    asked = mode if isinstance(mode, dict) else {"valid": mode, "test": mode}
    found = {
        f"--eval_args: a pair prompt ranks two candidates; set mode low1, uni1 or pop1, not {asked}.": not all(
            re.fullmatch("(low|uni|pop)1", str(m)) for m in asked.values()
        ),
        "--next_items: a pair prompt ranks two candidates; set --next_items=1.": settings["next_items"] != 1,
        "--score_norm: a pair prompt's answers hold both titles, so they are compared by their sum.": settings[
            "score_norm"
        ]
        != "sum",
        "--rerank_candidates: a pair prompt's LLM ranks the only two candidates; leave it out.": bool(
            settings["rerank_candidates"]
        ),
        "--loss=MultDPO: a pair prompt lists one liked item; use --prompt=stream.": settings["loss"] == "MultDPO",
        "--generate_users: a pair prompt's answer is no single title; use --prompt=stream.": settings["generate_users"]
        != 0,
    }
    return [told for told, wrong in found.items() if wrong]
