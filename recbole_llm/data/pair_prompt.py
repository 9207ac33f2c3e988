"""DMPO's two-candidate ranking (arXiv 2405.16127): the prompt lists two titles, the answer puts them in order.

History, then both candidates, then both titles with the preferred one first. The history comes before the candidates,
so that all pairs of a history hang off one trunk. A title has the same tokens wherever it stands: it is tokenised apart
from what surrounds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.data.prompt import Prompt, Window, chat_parts, newest, plain_tokens, start_tokens
from recbole_llm.llm.token_tree import TokenTree, TreeBuilder


def make_prompt(template: dict[str, Any], texts: Sequence[str], tokenizer: Any) -> Prompt | PairPrompt:
    """The prompt of a template's family; arguments as of ``Prompt``."""
    kind = PairPrompt if template["family"] == "pair" else Prompt
    return kind(template, texts, tokenizer)


class PairPrompt:
    """Tokens of two-candidate prompts and their answers, with the methods of ``Prompt``.

    Args:
        template: a parsed template file of family ``pair``.
        texts: text of each internal item id, entry 0 empty.
        tokenizer: a transformers tokenizer.

    Attributes:
        every_position: False; a window has one target.
        prefix, suffix: token ids before and after the history, up to the first candidate.
        lines: token ids of each item in the history.
        answers: token ids of each item's title alone; an answer holds two of them (``answer``).
    """

    every_position = False

    def __init__(self, template: dict[str, Any], texts: Sequence[str], tokenizer: Any) -> None:
        parts = chat_parts(template["question"], ("history", "first", "second"), tokenizer)
        self.prefix, self.suffix, self._between, self._after = parts
        self.prefix = self.prefix or start_tokens(tokenizer)
        self.answers = plain_tokens(tokenizer, texts)
        before, after = plain_tokens(tokenizer, template["line"].split("{title}"))
        self.lines = [before + title + after for title in self.answers]
        opening, rest = template["answer"].split("{chosen}")
        self._opening, self._middle, closing = plain_tokens(tokenizer, [opening, *rest.split("{rejected}")])
        self._closing = [*closing, tokenizer.eos_token_id]

    def trunk(self, history: Sequence[int]) -> list[int]:
        """Tokens that all pairs of a history share, up to the first candidate; items oldest first."""
        return self.prefix + [t for item in history for t in self.lines[item]] + self.suffix

    def listing(self, first: int, second: int) -> list[int]:
        """Tokens from the first candidate to the end of the question."""
        return self.answers[first] + self._between + self.answers[second] + self._after

    def answer(self, preferred: int, other: int) -> list[int]:
        """Tokens of the answer, its end included."""
        return self._opening + self.answers[preferred] + self._middle + self.answers[other] + self._closing

    def longest(self, items: int) -> int:
        """Tokens of the longest prompt of that many items with two candidates and an answer."""
        lines = sorted(map(len, self.lines), reverse=True)[:items]
        return len(self.prefix) + sum(lines) + len(self.suffix) + self._longest_pair

    def fit(self, history: Sequence[int], most: int) -> Sequence[int]:
        """The history without as many of its oldest items as it takes to leave room for any two candidates.

        Args:
            most: tokens of prompt and answer together.
        """
        room = most - len(self.prefix) - len(self.suffix) - self._longest_pair
        return newest([len(self.lines[i]) for i in history], history, room)

    def candidate_tree(self, history: Sequence[int], candidates: Sequence[int]) -> TokenTree:
        """Two candidates, listed as they come; completion i puts candidate i first.

        Raises:
            ValueError: not two candidates.
        """
        if len(candidates) != 2:
            raise ValueError(f"a pair prompt ranks two candidates, not {len(candidates)}")
        first, second = candidates
        tree = TreeBuilder()
        end = tree.chain(-1, self.trunk(history) + self.listing(first, second))[-1]
        for preferred, other in ((first, second), (second, first)):
            tree.completion(tree.chain(end, self.answer(preferred, other)))
        return tree.build()

    def window_tree(self, window: Window) -> TokenTree:
        """A listing for each rejected item, beside the target; ``2 k`` completions.

        Completions 0 to k - 1 put the target first in listing 0 to k - 1, the others put its rejected item first.

        Raises:
            ValueError: no rejected item, several targets, or several chosen items.
        """
        target, rejected = self._pairs(window)
        tree = TreeBuilder()
        end = tree.chain(-1, self.trunk(window.items[: window.targets[0]]))[-1]
        chosen_first, rejected_first = [], []
        for place, item in enumerate(rejected):
            asked = tree.chain(end, self.listing(*self.order(window, place)))[-1]
            chosen_first.append(tree.chain(asked, self.answer(target, item)))
            rejected_first.append(tree.chain(asked, self.answer(item, target)))
        for nodes in (*chosen_first, *rejected_first):
            tree.completion(nodes)
        return tree.build()

    def window_size(self, window: Window) -> int:
        """Tokens of a window's tree that go through the model."""
        target, rejected = self._pairs(window)
        pairs = (len(self.listing(target, r)) + 2 * (len(self.answer(target, r)) - 1) for r in rejected)
        return len(self.trunk(window.items[: window.targets[0]])) + sum(pairs)

    def chosen_lengths(self, window: Window) -> list[int]:
        """Tokens of the answer that puts the target first, in the mean over the listings, rounded."""
        target, rejected = self._pairs(window)
        return [round(sum(len(self.answer(target, r)) for r in rejected) / len(rejected))]

    def combined(self, logps: Tensor) -> Tensor:
        """Log-probs of windows as the losses take them, from those of the completions.

        With c_i and r_i the log-probs of target and rejected item first in listing i, and c their mean over i: the
        chosen one is c, the rejected ones are ``c - (c_i - r_i)``. So a loss sees each pair's own difference.

        Args:
            logps: ``[T, 2 k]``, nats, as ``window_tree`` orders them.

        Returns:
            ``[T, 1 + k]``.
        """
        chosen_first, rejected_first = logps.chunk(2, dim=1)
        mean = chosen_first.mean(dim=1, keepdim=True)
        return torch.cat([mean, rejected_first - chosen_first + mean], dim=1)

    def _pairs(self, window: Window) -> tuple[int, tuple[int, ...]]:
        """The target and its rejected items."""
        rejected = window.rejected[0] if window.rejected else ()
        if len(window.targets) != 1 or not rejected or any(window.also):
            raise ValueError("a pair prompt needs one target a window, one chosen item and at least one rejected item")
        return window.items[window.targets[0]], rejected

    def order(self, window: Window, place: int) -> tuple[int, int]:
        """The two candidates of a listing in an order that is the same whichever of them is chosen."""
        low, high = sorted((window.items[window.targets[0]], window.rejected[0][place]))
        coin = np.random.default_rng([window.user, window.targets[0], place, low, high]).integers(2)
        return (high, low) if coin else (low, high)

    @cached_property
    def _longest_pair(self) -> int:
        """Tokens of the longest listing and answer."""
        titles = sum(sorted(map(len, self.answers))[-2:])
        frame = self._between + self._after + self._opening + self._middle + self._closing
        return 2 * titles + len(frame)
