"""Item id -> the text that the LLM reads and ranks: cleaned, complete, and no two the same."""

from __future__ import annotations

import html
import logging
import re
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from string import Formatter

from recbole.config import Config
from recbole.data.dataset import Dataset

from recbole_llm.data.atomic import read_items
from recbole_llm.errors import UserError

TITLE_COLUMNS = ("title", "movie_title", "item_title", "name", "item_name", "product_title", "book_title")
YEAR_COLUMNS = ("release_year", "year", "publication_year")
TAG = re.compile(r"</?[A-Za-z][^<>]*>")
EMPTY_BRACKETS = re.compile(r"(?<!\s)\s*\(\s*\)")  # only from the first blank of a run: else the time is its square

logger = logging.getLogger()


def item_texts(
    config: Config,
    dataset: Dataset,
    count_tokens: Callable[[Sequence[str]], list[int]],
    wanted: str | None = None,
    title_first: bool = False,
) -> list[str]:
    """The text of every internal item id; entry 0 (padding) is empty.

    HTML entities and tags are resolved, control characters and runs of blanks become one blank. A text over
    ``item_text_max_tokens`` loses whole words at its end. An item without text becomes ``untitled <item token>``.
    Of items with equal text the first (by item token) keeps it and the others get `` (2)``, `` (3)`` and so on,
    because a ranker must be able to tell items apart. Each of these is counted in the log, with examples.

    Args:
        config: needs ``item_text`` (``auto`` or a template such as ``{title} ({year})``) and ``item_text_max_tokens``.
        count_tokens: texts -> their lengths in tokens.
        wanted: in the place of ``item_text``.
        title_first: an item that lacks the template's first column has no text.

    Raises:
        UserError: no ``.item`` file, a column that it does not have, or more than half of the items without text.
    """
    tokens = _item_tokens(dataset)
    texts = whole_texts(config, dataset, wanted, title_first)
    texts = _name_the_untitled(texts, tokens, config["dataset"])
    texts = _cut_the_long(texts, config["item_text_max_tokens"], count_tokens)
    return ["", *_tell_apart(texts, tokens)]


def whole_texts(config: Config, dataset: Dataset, wanted: str | None = None, title_first: bool = False) -> list[str]:
    """Cleaned texts of the items from internal id 1 on, uncut; empty where there is none. As ``item_texts`` else."""
    columns, rows = read_items(config.final_config_dict, config["dataset"])
    wanted = wanted or config["item_text"]
    template = text_template(wanted, columns, config["dataset"])
    # Of the columns that `auto` finds the year may lack, and the title may not.
    needed = text_columns(template)[:1] if wanted == "auto" or title_first else []
    found = (rows.get(token) for token in _item_tokens(dataset))
    return [clean(_fill(template, row)) if row is not None and all(row[c] for c in needed) else "" for row in found]


def _item_tokens(dataset: Dataset) -> list[str]:
    return [str(token) for token in dataset.field2id_token[dataset.iid_field][1:]]


def clean(text: str) -> str:
    """One line of plain text: entities and tags resolved, control characters and runs of blanks one blank."""
    for _ in range(2):  # shops escape twice: "&amp;quot;"
        text = html.unescape(text)
    text = TAG.sub(" ", text)
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in text)
    return " ".join(text.split())


def text_template(wanted: str, columns: list[str], dataset: str) -> str:
    """The template to fill: the user's, or for ``auto`` the title column and the year where there is one.

    Raises:
        UserError: a column that the file does not have, or no title column; lists those it has.
    """
    found = f"{dataset}.item has the columns {', '.join(columns) or '(none)'}"
    if wanted != "auto":
        try:
            used = text_columns(wanted)
        except ValueError as error:
            raise UserError(
                f"--item_text={wanted!r}: {error}; write columns in braces, for example {{title}}."
            ) from None
        unknown = [name for name in used if name not in columns]
        if unknown or not used:
            what = f"no column {', '.join(f'{{{u}}}' for u in unknown)}" if unknown else "no column in braces"
            raise UserError(f"--item_text={wanted!r}: {what}; {found}.")
        return wanted
    title = next((c for c in TITLE_COLUMNS if c in columns), None)
    if title is None:
        raise UserError(
            f"--item_text=auto: no title column ({', '.join(TITLE_COLUMNS)}); {found}. "
            f"Name yours, for example --item_text='{{{(columns or ['title'])[0]}}}'."
        )
    year = next((c for c in YEAR_COLUMNS if c in columns), None)
    return f"{{{title}}}" + (f" ({{{year}}})" if year else "")


def text_columns(template: str) -> list[str]:
    """Names in braces."""
    return [name for _, name, _, _ in Formatter().parse(template) if name is not None]


def _fill(template: str, row: dict[str, str]) -> str:
    """The template with an item's columns; no format language, so a column cannot reach into objects."""
    parts = [before + (row[name] if name is not None else "") for before, name, _, _ in Formatter().parse(template)]
    text = "".join(parts)
    return EMPTY_BRACKETS.sub("", text) if any(row[name] for name in text_columns(template)) else ""


def _name_the_untitled(texts: list[str], tokens: list[str], dataset: str) -> list[str]:
    missing = [token for text, token in zip(texts, tokens, strict=True) if not text]
    if len(missing) * 2 > len(texts):
        raise UserError(
            f"--dataset={dataset}: {len(missing)} of {len(texts)} items have no text (for example item {missing[0]}). "
            "Check that the .item file belongs to this .inter file, or name other columns with --item_text."
        )
    if missing:
        logger.warning(
            f"Item text: {len(missing)} items have none and are called `untitled <id>` (for example {missing[:3]})."
        )
    return [text or f"untitled {token}" for text, token in zip(texts, tokens, strict=True)]


def _cut_the_long(texts: list[str], most: int, count_tokens: Callable[[Sequence[str]], list[int]]) -> list[str]:
    long = [i for i, n in enumerate(count_tokens(texts)) if n > most]
    if long:
        logger.warning(
            f"Item text: {len(long)} texts are over item_text_max_tokens={most} and lose their last words "
            f"(for example {texts[long[0]][:60]!r}...)."
        )
    texts = list(texts)
    for i in long:
        words = texts[i].split(" ")
        fits = bisect_right(range(len(words)), most, key=lambda n: count_tokens([" ".join(words[:n])])[0]) - 1
        text = " ".join(words[: max(1, fits)])
        while len(text) > 1 and count_tokens([text])[0] > most:  # a single huge word loses characters
            text = text[: len(text) * 3 // 4]
        texts[i] = text
    return texts


def _tell_apart(texts: list[str], tokens: list[str]) -> list[str]:
    count = Counter(texts)
    twins = [text for text, n in count.items() if n > 1]
    if twins:
        total = sum(count[t] - 1 for t in twins)
        logger.warning(
            f"Item text: {len(twins)} texts belong to several items; {total} items get ` (2)`, ` (3)`... "
            f"(for example {twins[:3]})."
        )
    taken, texts = set(count), list(texts)
    following: dict[str, int] = {}  # the next number of a text that was met
    for i in sorted(range(len(texts)), key=lambda i: tokens[i]):
        text = texts[i]
        if text in following:
            while (numbered := f"{text} ({following[text]})") in taken:
                following[text] += 1
            taken.add(numbered)
            texts[i] = numbered
        else:
            following[text] = 2
    return texts
