"""One row's answers in order, and what rank an item has among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recbole_llm.evaluator import expected_rank


@dataclass(frozen=True)
class Ranked:
    """A row's answers in order.

    Attributes:
        items: the best first, ties in an order that says nothing ``[C]``.
        scores: theirs, descending ``[C]``.
    """

    items: np.ndarray
    scores: np.ndarray

    @staticmethod
    def of(scores: np.ndarray, items: np.ndarray) -> Ranked:
        """From scores in any order; -inf is no answer."""
        order = np.argsort(-scores, kind="stable")
        order = order[scores[order] > -np.inf]
        return Ranked(items[order], scores[order])

    def score(self, item: int) -> float | None:
        """An item's score; None where it is no answer."""
        place = np.flatnonzero(self.items == item)
        return float(self.scores[place[0]]) if len(place) else None

    def rank(self, items: Sequence[int]) -> float | None:
        """Expected rank of the first of these items, ties in random order; None where none is an answer."""
        mine = self.scores[np.isin(self.items, items)]
        if not len(mine):
            return None
        best = mine.max()
        return float(expected_rank((self.scores > best).sum(), (self.scores == best).sum(), (mine == best).sum()))

    def may_be(self, items: Sequence[int], rank: float, rounding: float) -> bool:
        """Whether these items' rank would be ``rank`` if scores were a little different."""
        best = self.scores[np.isin(self.items, items)].max()
        return 1 + (self.scores > best + rounding).sum() <= rank <= (self.scores >= best - rounding).sum()
