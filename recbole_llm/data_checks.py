"""Data that are missing or cannot be read with these settings; told before any work."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole_llm import keys
from recbole_llm.data.atomic import inter_columns, item_columns
from recbole_llm.data.item_text import text_template
from recbole_llm.data.template import load_template
from recbole_llm.dpo4rec.setting_checks import check_texts
from recbole_llm.errors import problems_of

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
)


def wrong_data(settings: Mapping[str, Any], dataset: str, properties: Path) -> list[str]:
    """Files that are missing or cannot be read with these settings.

    Args:
        settings: with ``data_path`` as the data set's own folder, and ``load_col`` as the user gave it.
    """
    problems = problems_of(lambda: inter_columns(settings, dataset))
    load = settings["load_col"]
    if isinstance(load, dict) and isinstance(load.get("inter"), (list, tuple)):
        needed = [settings[k] for k in ("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD")]
        lacks = [c for c in needed if c not in load["inter"]]
        if lacks:
            problems.append(f"--load_col: inter lacks {', '.join(lacks)}, which the protocol needs; add it.")
    problems += _needs_ratings(settings, dataset, properties)
    if settings.get("knowledge", "none") != "none":
        return problems + problems_of(lambda: check_texts(settings, dataset, properties))
    if not keys.ranks_titles(settings):
        return problems
    if Path(settings["data_path"]).is_dir():  # a missing folder is told once
        wanted = settings["item_text"]
        problems += problems_of(lambda: text_template(wanted, item_columns(settings, dataset), dataset))
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
    if problems_of(lambda: inter_columns(settings, dataset)) or name in inter_columns(settings, dataset):
        return []
    return [f"{key}: {dataset}.inter has no rating column {name!r}; name it with --RATING_FIELD, or leave this out."
            for key, is_wanted in wanted.items() if is_wanted]  # fmt: skip


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
