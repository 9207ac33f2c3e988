"""Prompt templates: ``properties/prompt/*.yaml``, or a file of the user's of the same form."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from recbole_llm.errors import UserError
from recbole_llm.settings import SettingsLoader

REQUIRED: dict[str, dict[str, type]] = {
    "stream": {"header": str, "line": str},
    "instruct": {"question": str, "line": str},
    "pair": {"question": str, "line": str, "answer": str},
    "reasoning": {"question": str, "line": str},  # DPO4Rec's question about a user, which no title answers
}
HOLE = re.compile(r"\{(\w+)\}")
FAMILIES = {"prompt": ("stream", "instruct", "pair"), "reasoning_prompt": ("reasoning",)}  # by configuration key


def load_template(name: str, folder: Path, key: str = "prompt") -> dict[str, Any]:
    """A template by name (``stream``, ``instruct``, ``pair``; ``reasoning``) or by path of a YAML file.

    Args:
        key: the configuration key that names it; says which families it may be of.

    Raises:
        UserError: no such template, or one with missing, unknown or ill-typed entries.
    """
    file = folder / "prompt" / f"{name}.yaml"
    file = file if file.is_file() else Path(name)
    if not file.is_file():
        known = ", ".join(FAMILIES[key])
        raise UserError(
            f"--{key}={name}: no such template; use {known}, or the path of a YAML file "
            "like those in properties/prompt."
        )
    try:
        template = yaml.load(file.read_text(encoding="utf-8"), Loader=SettingsLoader)
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise UserError(f"--{key}={name}: {file} is not plain YAML: {' '.join(str(error).split())}.") from None
    family = template.get("family") if isinstance(template, dict) else None
    if not isinstance(family, str) or family not in FAMILIES[key]:
        *others, last = (f"`family: {f}`" for f in FAMILIES[key])
        needed = f"{', '.join(others)} or {last}" if others else last
        raise UserError(f"--{key}={name}: {file} needs {needed}.")
    wrong = [k for k, kind in REQUIRED[family].items() if not isinstance(template.get(k), kind)]
    wrong += [str(k) for k in template if k not in REQUIRED[family] and k != "family"]
    holes = {"line": ["title"], "question": ["history"]}
    if family == "pair":
        holes |= {"question": ["history", "first", "second"], "answer": ["chosen", "rejected"]}
    holes = {k: names for k, names in holes.items() if k in REQUIRED[family]}
    wrong += [k for k, names in holes.items() if not _has_holes(str(template.get(k)), names)]
    if wrong:
        called = f"an {family}" if family == "instruct" else f"a {family}"
        told = "; ".join(f"`{k}` {', '.join(f'{{{n}}}' for n in names)}" for k, names in holes.items())
        raise UserError(
            f"--{key}={name}: {file}: wrong or missing {', '.join(dict.fromkeys(wrong))}; {called} template has "
            f"{', '.join(REQUIRED[family])}, and holds once, in this order: {told}."
        )
    for k in REQUIRED[family]:
        if foreign := set(HOLE.findall(str(template.get(k)))) - set(holes.get(k, ())):
            raise UserError(
                f"--{key}={name}: {file}: nothing fills {{{min(foreign)}}} of `{k}`, so that it would stand in every "
                "prompt. Leave it out; columns of items go into --item_text."
            )
    if family == "stream" and template["line"].endswith("{title}"):
        raise UserError(
            f"--{key}={name}: {file}: `line` must go on after {{title}}, for example with \\n: the answer is "
            "a line, and a title without an end is as likely as all that begin with it."
        )
    return template


def _has_holes(text: str, names: Sequence[str]) -> bool:
    """Whether each of ``{name}`` stands in the text once, in this order."""
    places = [text.find(f"{{{name}}}") for name in names]
    return -1 not in places and places == sorted(places) and all(text.count(f"{{{name}}}") == 1 for name in names)
