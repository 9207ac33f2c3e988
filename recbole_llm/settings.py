"""Settings as people write them, on the command line or in YAML; nothing in them is run as code.

No torch here: `recbole-llm ls` shall not wait for it.
"""

from __future__ import annotations

import ast
import math
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from recbole_llm.errors import ConfigError

HERE = Path(__file__).resolve().parent
PROPERTIES = next(p for p in (HERE / "properties", HERE.parent / "properties") if p.is_dir())
MOST_VALUES = 100_000  # in a YAML file
# Values that stay as typed, although they may look like numbers or lists.
TEXT_FLAGS = {
    "model",
    "dataset",
    "models",
    "config_files",
    "config",
    "modes",
    "seeds",
    "baseline",
    "table_metrics",
    "out",
    "cluster",
    "search",
    "run_folder",
    "html",
    "user",
    "item",
    "gpu_id",
    "data_path",
    "checkpoint_dir",
    "llm",
    "prompt",
    "item_text",
    "reasoning_prompt",
    "reasoning_item",
    "text_encoder",
    "endpoint",
    "endpoint_model",
    "user_inter_num_interval",
    "item_inter_num_interval",
    "entity_kg_num_interval",
    "relation_kg_num_interval",
    "field_separator",
    "seq_separator",
}


# Files and folders, in which a leading ~ is the home folder: a shell leaves it in --key=~/x.
PATHS = {"checkpoint_dir", "data_path", "html", "out", "prompt", "reasoning_prompt", "run_folder", "search"}
WORDS = re.compile(r"\[([\w.@+-]+(?:\s*,\s*[\w.@+-]+)*)\]")  # a list as a shell leaves it: [NDCG,Hit]
LISTS = {"metrics", "lora_target_modules", "selected_features"}  # which may be typed without brackets


def parse_value(text: str) -> Any:
    """A value as typed: a Python literal, true/false/none in any case, else text. Never run as code.

    >>> parse_value("1e-3"), parse_value("1,5"), parse_value("true"), parse_value("{title}")
    (0.001, [1, 5], True, '{title}')
    """
    named = {"true": True, "false": False, "none": None, "null": None, "~": None}
    if text.lower() in named:
        return named[text.lower()]
    try:
        with warnings.catch_warnings(action="ignore"):  # Python's doubts about texts such as "1or"
            value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        words = WORDS.fullmatch(text)
        return [parse_value(word.strip()) for word in words[1].split(",")] if words else text
    if isinstance(value, tuple):
        return list(value)
    return text if isinstance(value, (set, bytes, complex)) or value is ... else value


def parse_flag(key: str, text: str) -> Any:
    """A value as typed for this key: some stay text, and lists of words need no brackets."""
    if key in TEXT_FLAGS:
        return text
    listed = f"[{text}]"
    return parse_value(listed if key in LISTS and "," in text and WORDS.fullmatch(listed) else text)


class SettingsLoader(yaml.SafeLoader):
    """Plain values alone; YAML 1.1 reads ``1e-4`` as text, RecBole's users write it as a number.

    A few lines of aliases of aliases can stand for billions of values: they are counted before any is made.
    """

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _values(node, {}) > MOST_VALUES:
            raise yaml.YAMLError(f"with its aliases it holds more than {MOST_VALUES} values, or itself")
        if node is not None and (twice := next(_twice(node), None)):
            raise yaml.YAMLError(f"line {twice.start_mark.line + 1}: `{twice.value}` stands there a second time")
        return node


def _values(node: yaml.Node, known: dict[yaml.Node, float]) -> float:
    """Values under a node, those behind aliases each time; infinitely many where it holds itself."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if node not in known:
        known[node] = math.inf
        inner = node.value if isinstance(node, yaml.SequenceNode) else [n for pair in node.value for n in pair]
        known[node] = 1 + sum(_values(n, known) for n in inner)
    return known[node]


def _twice(node: yaml.Node) -> Iterator[yaml.ScalarNode]:
    """Keys that stand before in the same table, of which YAML would take the last."""
    seen: set[str] = set()
    inner = [] if isinstance(node, yaml.ScalarNode) else node.value
    for entry in inner:
        key, value = entry if isinstance(node, yaml.MappingNode) else (None, entry)
        if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge"):  # of which several may stand
            if key.value in seen:
                yield key
            seen.add(key.value)
        yield from _twice(value)


SettingsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def shipped(file: str) -> Path:
    """A file or folder here or at home (``~``); of ``properties/...`` the package's own where there is none here."""
    ours = Path(file).parts[:1] == ("properties",) and not Path(file).exists()
    return PROPERTIES.parent / file if ours else Path(os.path.expanduser(file))


def at_home(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, ``~`` at the beginning of a path being the home folder."""
    paths = {k: v for k, v in settings.items() if k in PATHS and isinstance(v, str) and v.startswith("~")}
    return settings | {key: os.path.expanduser(value) for key, value in paths.items()}


def read_yaml(file: str) -> dict[str, Any]:
    """Settings of a YAML file; only plain values, no object tags.

    Args:
        file: as ``shipped`` finds it.

    Raises:
        ConfigError: no such file, not plain ``key: value`` YAML, or dates, sets and keys that are not text in it.
    """
    try:
        loaded = yaml.load(shipped(file).read_text(encoding="utf-8"), Loader=SettingsLoader)
    except OSError as error:
        raise ConfigError([f"--config_files: cannot read `{file}` ({error.strerror})."]) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        told = " ".join(str(error).split())
        raise ConfigError([f"--config_files: `{file}` is not plain YAML: {told}."]) from None
    if loaded is None:  # comments alone
        return {}
    if not isinstance(loaded, dict):
        kind = type(loaded).__name__
        raise ConfigError([f"--config_files: `{file}` must hold `key: value` lines, not a {kind}."])
    if problems := [*unlike_settings(loaded)]:
        raise ConfigError([f"--config_files: `{file}`, {problem}" for problem in problems])
    return at_home(loaded)


def unlike_settings(value: Any, where: str = "") -> Iterator[str]:
    """A sentence for each key that is not text, and each date or set: neither can be kept or hashed as JSON.

    Args:
        where: the keys above, with dots between.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(key, str):
                yield from unlike_settings(inner, f"{where}.{key}" if where else key)
            else:
                yield f"{where or 'at the top'}: the key {key!r} is not text; put it in quotes."
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from unlike_settings(inner, where)
    elif not (value is None or isinstance(value, (str, int, float))):
        yield f"{where}: `{value}` is read as a {type(value).__name__}; put it in quotes."


def read_yamls(files: list[str]) -> dict[str, Any]:
    """Settings of several files, later ones win as in ``laid_over``.

    Raises:
        ConfigError: what is wrong with all of them.
    """
    settings: dict[str, Any] = {}
    problems = []
    for file in files:
        try:
            own = read_yaml(file)
            if "MODEL_TYPE" in own:
                told = "is the record of a run, with what followed from its settings; its README.md has its command"
                raise ConfigError([f"--config_files: `{file}` {told}."])
            settings = laid_over(settings, own)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return settings


def laid_over(settings: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Both; where they disagree ``own`` wins, which changes of ``eval_args``, and of its mode, only what it names."""
    asked = [s["eval_args"] for s in (settings, own) if isinstance(s.get("eval_args"), dict)]
    if len(asked) < 2:
        return settings | own
    merged = asked[0] | asked[1]
    if "mode" in asked[0] and isinstance(asked[1].get("mode"), dict):
        before = asked[0]["mode"]
        merged["mode"] = (before if isinstance(before, dict) else {"valid": before, "test": before}) | asked[1]["mode"]
    return settings | own | {"eval_args": merged}
