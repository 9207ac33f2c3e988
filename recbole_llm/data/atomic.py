"""RecBole's atomic files, read as plain text: the header of ``.inter`` and the rows of ``.item``.

RecBole's own reader goes through pandas with quoting and NA parsing: a title that begins with a quote swallows
rows, and a film called "None" loses its title. Titles are therefore read here, line by line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import recbole

from recbole_llm.errors import UserError


def atomic_file(settings: Mapping[str, Any], dataset: str, suffix: str) -> Path:
    """The path of ``<data_path>/<dataset>/<dataset>.<suffix>``; ml-100k lies in RecBole's wheel.

    Args:
        settings: RecBole settings before (a root folder) or after (the data set's own folder) it joins the name.
    """
    if dataset == "ml-100k":
        return Path(recbole.__file__).parent / "dataset_example" / dataset / f"{dataset}.{suffix}"
    folder = Path(settings["data_path"])
    if folder.name != dataset:
        folder = folder / dataset
    return folder / f"{dataset}.{suffix}"


def read_header(file: Path, separator: str = "\t") -> dict[str, str]:
    """Column name -> RecBole type of an atomic file's first line, for example ``{"item_id": "token"}``."""
    with open(file, encoding="utf-8") as lines:
        columns = lines.readline().rstrip("\r\n").split(separator)
    return {name: kind for name, _, kind in (column.partition(":") for column in columns)}


def inter_columns(settings: Mapping[str, Any], dataset: str) -> list[str]:
    """The columns of the ``.inter`` file that the protocol needs: user, item, time, and the rating where there is one.

    Raises:
        UserError: no such file, or no column of that name; lists the columns found.
    """
    file = atomic_file(settings, dataset, "inter")
    if not file.is_file():
        raise UserError(
            f"--dataset={dataset}: no file {file}. Put RecBole atomic files there, or say where they are with "
            "--data_path=<folder that holds the data set's folder>. ml-100k needs no file."
        )
    found = read_header(file, settings["field_separator"])
    needed = [settings["USER_ID_FIELD"], settings["ITEM_ID_FIELD"], settings["TIME_FIELD"]]
    for key, name in zip(("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD"), needed, strict=True):
        if name not in found:
            raise UserError(f"--{key}={name}: {file} has no such column; it has {', '.join(found)}.")
    rating = settings["RATING_FIELD"]
    return needed + ([rating] if rating in found else [])


def read_items(settings: Mapping[str, Any], dataset: str) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Every row of the ``.item`` file as text.

    Returns:
        The column names besides the item id, and item token -> column -> text (stripped).

    Raises:
        UserError: no such file, no item id column, or a line with another number of fields.
    """
    file = atomic_file(settings, dataset, "item")
    if not file.is_file():
        raise UserError(
            f"--dataset={dataset}: an LLM ranks items by their titles, and there is no {file}. It needs a header "
            "such as `item_id:token<TAB>title:token_seq` and one line an item."
        )
    separator, item_field = settings["field_separator"], settings["ITEM_ID_FIELD"]
    columns = list(read_header(file, separator))
    if item_field not in columns:
        raise UserError(f"--ITEM_ID_FIELD={item_field}: {file} has no such column; it has {', '.join(columns)}.")
    rows: dict[str, dict[str, str]] = {}
    # Only a newline ends a line: titles may hold U+0085 or U+2028, which str.splitlines would break at.
    for number, line in enumerate(file.read_bytes().decode("utf-8", "replace").split("\n")[1:], start=2):
        line = line.rstrip("\r")
        if not line:
            continue
        fields = line.split(separator)
        if len(fields) != len(columns):
            raise UserError(f"{file}, line {number}: {len(fields)} fields where the header has {len(columns)}: {line[:80]!r}.")
        row = dict(zip(columns, map(str.strip, fields), strict=True))
        rows[row.pop(item_field)] = row
    return [c for c in columns if c != item_field], rows
