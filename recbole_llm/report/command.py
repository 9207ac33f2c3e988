"""The command that gives a run again, from the settings that the user gave."""

from __future__ import annotations

import shlex
from typing import Any

from recbole_llm.config import LLMConfig
from recbole_llm.keys import NONE_IS_A_CHOICE
from recbole_llm.run_folder import NOT_IN_HASH
from recbole_llm.settings import TEXT_FLAGS, parse_value


def command_of(config: LLMConfig) -> str:
    """``recbole-llm run -m ... -d ... --key=value ...``, quoted for a shell.

    Left out are keys that change no result, but for where the data lie, and texts that were set to nothing.
    """
    given = config.external_config_dict
    left_out = NOT_IN_HASH - {"data_path"} | {"model", "dataset"}
    left_out |= {key for key in TEXT_FLAGS if given.get(key) is None}
    flags = [f"--{key}={as_typed(key, value)}" for key, value in given.items() if key not in left_out]
    words = ["recbole-llm", "run", "-m", config["model"], "-d", config["dataset"], *flags]
    return " ".join(map(_quoted, words))


def as_typed(key: str, value: Any) -> str:
    """A value as the command line reads it back."""
    if value is None or (value == "none" and key in NONE_IS_A_CHOICE):
        return "none"
    if not isinstance(value, str):
        return repr(value)
    return value if key in TEXT_FLAGS or parse_value(value) == value else repr(value)


def _quoted(word: str) -> str:
    """A word for a shell; tables, which hold single quotes, between double ones where nothing in them is special."""
    plain = not set(word) & set('"$`\\!\n')
    return f'"{word}"' if "'" in word and plain else shlex.quote(word)
