"""What the LLM is asked about a user: a chat question that holds titles and genres of the history."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from recbole.config import Config
from recbole.data.dataset import Dataset

from recbole_llm.data.atomic import item_columns
from recbole_llm.data.item_text import TITLE_COLUMNS, item_texts, text_template
from recbole_llm.data.prompt import chat_parts, newest, plain_tokens
from recbole_llm.data.template import load_template
from recbole_llm.errors import UserError

GENRE_COLUMNS = ("genres", "genre", "class", "categories", "category", "tags")


def item_template(settings: Mapping[str, Any], dataset: str) -> str:
    """The template over .item columns of an item's line; ``auto`` is the title, and genres where there are any.

    Args:
        settings: with ``data_path`` as the data set's own folder.

    Raises:
        UserError: no such column, or no .item file.
    """
    wanted, columns = settings["reasoning_item"], item_columns(settings, dataset)
    if wanted == "auto":
        title = next((c for c in TITLE_COLUMNS if c in columns), None)
        genre = next((c for c in GENRE_COLUMNS if c in columns), None)
        wanted = f"{{{title}}}" + (f" ({{{genre}}})" if genre else "") if title else wanted
    with _by_its_own_key():
        return text_template(wanted, columns, dataset)


@contextmanager
def _by_its_own_key() -> Iterator[None]:
    """What is wrong with an item's text is told by the key that names it here."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("--item_text", "--reasoning_item")) from None


def described_items(config: Config, dataset: Dataset, tokenizer: Any = None) -> list[str]:
    """The text of every internal item id, title and genres; entry 0 is empty.

    Args:
        tokenizer: counts the tokens of a text; None = its words are counted.

    Raises:
        UserError: as ``item_texts``.
    """

    def count(texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in (plain_tokens(tokenizer, texts) if tokenizer else map(str.split, texts))]

    template = item_template(config.final_config_dict, config["dataset"])
    with _by_its_own_key():
        return item_texts(config, dataset, count, template, title_first=config["reasoning_item"] == "auto")


class Question:
    """Prompts of histories, as text for a server and as tokens for our LLM.

    Args:
        config: with ``reasoning_prompt``, ``reasoning_history`` and ``reasoning_tokens``.
        texts: of each item id.
        tokenizer: of the LLM; None where a server writes.
        context: tokens of prompt and text together at most.

    Raises:
        UserError: a template that is none, or no room for one item and a text.
    """

    def __init__(self, config: Config, texts: Sequence[str], tokenizer: Any, context: int) -> None:
        self.template = load_template(config["reasoning_prompt"], config.properties, "reasoning_prompt")
        self.most = config["reasoning_history"]
        self.texts = texts
        self.lines = [self.template["line"].replace("{title}", text) for text in texts]
        self.tokenizer = tokenizer
        if tokenizer is None:
            return
        self.line_tokens = plain_tokens(tokenizer, self.lines)
        try:
            self.prefix, self.suffix = chat_parts(self.template["question"], ("history",), tokenizer)
        except UserError as error:
            told = str(error).replace("--prompt:", "--reasoning_prompt:")
            raise UserError(told.replace("use --prompt=stream", "use another --llm")) from error
        self.room = context - config["reasoning_tokens"] - len(self.prefix) - len(self.suffix)
        longest = max(map(len, self.line_tokens))
        if self.room < longest:
            raise UserError(
                f"--reasoning_tokens={config['reasoning_tokens']}: the LLM's context of {context} tokens leaves "
                f"{self.room} for the history, and one item takes up to {longest}. Lower it, or use another --llm."
            )

    def history(self, items: Sequence[int] | np.ndarray) -> Sequence[int]:
        """The newest items that are told: ``reasoning_history`` at most, and as many as fit."""
        kept = [int(i) for i in items][-self.most :]
        return kept if self.tokenizer is None else newest([len(self.line_tokens[i]) for i in kept], kept, self.room)

    def text(self, items: Sequence[int] | np.ndarray) -> str:
        """The question in words, without what a chat template adds."""
        return self.template["question"].replace("{history}", "".join(self.lines[i] for i in self.history(items)))

    def tokens(self, items: Sequence[int] | np.ndarray) -> list[int]:
        """The prompt as our LLM reads it."""
        told = [t for i in self.history(items) for t in self.line_tokens[i]]
        return [*self.prefix, *told, *self.suffix]
