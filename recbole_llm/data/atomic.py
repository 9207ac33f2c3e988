"""RecBole's atomic files, read as plain text: the header of ``.inter`` and the rows of ``.item``.

RecBole's own reader goes through pandas with quoting and NA parsing: a title that begins with a quote
swallows rows, and a film called "None" loses its title. Titles are therefore read here, line by line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import recbole

from recbole_llm.errors import UserError
from recbole_llm.files import stamp

# What pandas, and so RecBole, reads as a missing value.
MISSING = {
    "",
    "#N/A",
    "#N/A N/A",
    "#NA",
    "-1.#IND",
    "-1.#QNAN",
    "-NaN",
    "-nan",
    "1.#IND",
    "1.#QNAN",
    "<NA>",
    "N/A",
    "NA",
    "NULL",
    "NaN",
    "None",
    "n/a",
    "nan",
    "null",
}
QUOTED = re.compile('"([^"]|"")*"')  # a field in quotes, as pandas knows it
PADDING = "[PAD]"  # RecBole's own name of id 0
KINDS = {"USER_ID_FIELD": "token", "ITEM_ID_FIELD": "token", "TIME_FIELD": "float", "RATING_FIELD": "float"}


def atomic_file(settings: Mapping[str, Any], dataset: str, suffix: str) -> Path:
    """The path of an atomic file; ``data_path`` is the data set's own folder, as RecBole leaves it."""
    return Path(settings["data_path"]) / f"{dataset}.{suffix}"


def dataset_folder(data_path: str, dataset: str) -> Path:
    """The folder of a data set's files; ml-100k lies in RecBole's wheel."""
    if dataset == "ml-100k":
        return Path(recbole.__file__).parent / "dataset_example" / dataset
    return Path(data_path) / dataset


def read_header(file: Path, separator: str = "\t") -> dict[str, str]:
    """Column name -> RecBole type of an atomic file's first line, for example ``{"item_id": "token"}``.

    Raises:
        UserError: the line is empty, or is not UTF-8 columns with a type each.
    """
    try:
        with open(file, "rb") as lines:
            header = lines.readline().decode("utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}); save it as UTF-8.") from None
    columns = [column.partition(":") for column in header.split(separator)]
    if header.startswith("\ufeff"):
        raise UserError(f"{file} begins with a byte-order mark, read as part of a name; save it without.")
    if any(not kind for _, _, kind in columns):
        raise UserError(
            f"{file}, line 1: {header[:80]!r} is no header of an atomic file; each column needs a type, as "
            f"in `user_id:token<TAB>item_id:token`, and --field_separator={separator!r} between them."
        )
    return {name: kind for name, _, kind in columns}


def inter_columns(settings: Mapping[str, Any], dataset: str) -> list[str]:
    """The columns of the ``.inter`` file that the protocol needs: user, item, time, and the rating if any.

    Raises:
        UserError: no such file, no column of that name (lists those found), or a line that cannot be read.
    """
    file = atomic_file(settings, dataset, "inter")
    if not file.is_file():
        raise UserError(
            f"--dataset={dataset}: no file {file}. Put RecBole atomic files there, or say where they are "
            "with --data_path=<folder that holds the data set's folder>. ml-100k needs no file."
        )
    found = read_header(file, settings["field_separator"])
    needed = {key: settings[key] for key in ("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD")}
    lacks = [f"--{key}={name}" for key, name in needed.items() if name not in found]
    if lacks:
        raise UserError(
            f"{', '.join(lacks)}: {file} has no such column; it has {', '.join(found)}. Name the one that is meant; "
            "users, items and times are needed."
        )
    rating = settings["RATING_FIELD"]
    used = needed | ({"RATING_FIELD": rating} if rating in found else {})
    wrong = [
        f"--{key}={name}: {file} calls it `{name}:{found[name]}`, and it must be `{name}:{KINDS[key]}`."
        for key, name in used.items()
        if found[name] != KINDS[key]
    ]
    if wrong:
        raise UserError(" ".join(wrong) + " Change the header, or name another column.")
    _check_lines(file, settings["field_separator"], tuple(found), tuple(used.values()), stamp(file))
    return list(used.values())


def check_text(settings: Mapping[str, Any], dataset: str, suffix: str) -> None:
    """Whether RecBole reads a file other than ``.inter`` as it stands.

    Raises:
        UserError: a line that it would pass over, or read as another.
    """
    file, separator = atomic_file(settings, dataset, suffix), settings["field_separator"]
    _check_lines(file, separator, tuple(read_header(file, separator)), (), stamp(file))


@lru_cache(maxsize=8)  # a comparison makes a configuration for each model, and another for each run
def _check_lines(
    file: Path, separator: str, columns: Sequence[str], used: Sequence[str], changed: tuple[int, int]
) -> None:
    """Refuse what RecBole would read as something else: short lines, quotes, missing users or times.

    Args:
        used: columns of user, item, time and perhaps rating; none in another file than ``.inter``.
        changed: the file's ``stamp``, by which a changed one is read again.
    """
    places, number = [columns.index(c) for c in used], 1
    with open(file, "rb") as lines:
        next(lines)
        for number, line in enumerate(lines, start=2):
            try:
                fields = line.decode("utf-8").rstrip("\r\n").split(separator)
                wrong: str | None = f"{len(fields)} fields where the header has {len(columns)}"
                if len(fields) == len(columns):
                    wrong = (_wrong_fields(*(fields[p] for p in places)) if used else None) or _wrong_text(fields)
            except UnicodeDecodeError:
                wrong = "not UTF-8 text"
            if wrong and line.strip():
                told = line[:80].decode("utf-8", "replace")
                raise UserError(f"{file}, line {number}: {wrong}: {told!r}. Mend the line or leave it out.")
    if used and number == 1:
        raise UserError(f"{file} holds a header and no interactions.")


def _wrong_text(fields: Sequence[str]) -> str | None:
    """What pandas, and so RecBole, would read past, whichever column it stands in."""
    if any("\r" in field or "\0" in field for field in fields):
        return "RecBole ends a line or a field at a carriage return or NUL inside it"
    if any(field.startswith('"') and not QUOTED.fullmatch(field) for field in fields):
        return "a field begins with a quote and does not end with its pair, so RecBole would read past it or stop there"
    return None


def _wrong_fields(user: str, item: str, time: str, rating: str = "0") -> str | None:
    for token in (user, item):
        if token in MISSING or token == PADDING or token.startswith('"'):
            return f"RecBole cannot read {token!r} as the id of a user or item"
    try:
        if not math.isfinite(float(time)):
            return f"the time {time!r} is no number"
        float(rating if rating not in MISSING else 0)  # RecBole fills missing ratings with their mean
    except ValueError:
        return "the time or the rating is no number"
    return None


def item_columns(settings: Mapping[str, Any], dataset: str) -> list[str]:
    """Columns of the ``.item`` file besides the item id.

    Raises:
        UserError: no such file, or no item id column.
    """
    file, item_field = atomic_file(settings, dataset, "item"), settings["ITEM_ID_FIELD"]
    if not file.is_file():
        raise UserError(
            f"--dataset={dataset}: an LLM ranks items by their titles, and there is no {file}. It needs a "
            "header such as `item_id:token<TAB>title:token_seq` and one line an item."
        )
    columns = list(read_header(file, settings["field_separator"]))
    if item_field not in columns:
        told = ", ".join(columns)
        raise UserError(f"--ITEM_ID_FIELD={item_field}: {file} has no such column; it has {told}.")
    return [c for c in columns if c != item_field]


def read_items(settings: Mapping[str, Any], dataset: str) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Every row of the ``.item`` file as text.

    Returns:
        The column names besides the item id, and item token -> column -> text (stripped).

    Raises:
        UserError: no such file, no item id column, a line with another number of fields, or not UTF-8,
            an item in two lines that differ.
    """
    others, file = item_columns(settings, dataset), atomic_file(settings, dataset, "item")
    return others, _item_rows(file, settings["field_separator"], settings["ITEM_ID_FIELD"])


def check_items(settings: Mapping[str, Any], dataset: str) -> None:
    """Whether ``read_items`` will read the rows of a file whose columns are fine (``item_columns``); raises as it does.

    Each file is read once, however many configurations ask.
    """
    file = atomic_file(settings, dataset, "item")
    _check_rows(file, settings["field_separator"], settings["ITEM_ID_FIELD"], stamp(file))


@lru_cache(maxsize=8)
def _check_rows(file: Path, separator: str, item_field: str, changed: tuple[int, int]) -> None:
    _item_rows(file, separator, item_field)


def _item_rows(file: Path, separator: str, item_field: str) -> dict[str, dict[str, str]]:
    columns = list(read_header(file, separator))
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{file}, line {number}: not UTF-8 text; save the file as UTF-8.") from None
    rows: dict[str, dict[str, str]] = {}
    lines: dict[str, int] = {}
    # Only a newline ends a line: titles may hold U+0085 or U+2028, which str.splitlines would break at.
    for number, line in enumerate(text.split("\n")[1:], start=2):
        line = line.rstrip("\r")
        if not line:
            continue
        fields = line.split(separator)
        if len(fields) != len(columns):
            told = f"{len(fields)} fields where the header has {len(columns)}"
            raise UserError(f"{file}, line {number}: {told}: {line[:80]!r}. Mend the line or leave it out.")
        row = dict(zip(columns, fields, strict=True))
        token = row.pop(item_field)  # as it stands, for RecBole strips no ids of interactions
        row = {name: told.strip() for name, told in row.items()}
        if rows.setdefault(token, row) != row:
            raise UserError(
                f"{file}, line {number}: item {token!r} stands in line {lines[token]} with other text. Leave one out."
            )
        lines.setdefault(token, number)
    for token in list(rows):
        rows.setdefault(token.strip(), rows[token])  # of ids with blanks in this file alone
    return rows
