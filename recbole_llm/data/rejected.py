"""Who is rejected: k items for each trained position, drawn without a look at the target or at held-out events."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from recbole.config import Config

from recbole_llm.data.dataset import Events
from recbole_llm.data.prompt import Window
from recbole_llm.data.protocol import Protocol
from recbole_llm.errors import UserError


def rejected_items(config: Config, protocol: Protocol) -> RejectedItems:
    """The sampler that a configuration asks for; popularity is that of the training users who are kept."""
    dataset = protocol.dataset
    counts = np.array([protocol.item_counter[i] for i in range(dataset.item_num)])
    return RejectedItems(
        config["rejected"],
        config["rejected_num"],
        protocol.events,
        protocol.train_ends,
        counts,
        dataset.field2id_token[dataset.uid_field],
        threshold=config["rating_threshold"],
        seed=config["seed"],
    )


class RejectedItems:
    """Draws rejected items by one strategy.

    ``uniform``: any item of the catalogue that is not among the user's training items. ``popularity``: the same, with
    odds in proportion to training interactions. ``low_rating``: items the user rated at or below the threshold in
    training (filled up uniformly where there are fewer than k); then only items rated above it are chosen.

    Held-out items of the user may be drawn, as in any training on implicit data: to leave them out would tell them.

    Args:
        strategy: one of the above.
        number: rejected items for each position, k.
        events: all interactions; only the first ``train_ends[u]`` of a user are read.
        counts: training interactions of each item ``[n_items]``.
        user_tokens: user token of each internal id; seeds the draw together with the position.
        threshold: ratings above it are liked.

    Raises:
        UserError: low_rating without ratings, or a catalogue smaller than k.
    """

    def __init__(
        self,
        strategy: str,
        number: int,
        events: Events,
        train_ends: np.ndarray,
        counts: np.ndarray,
        user_tokens: np.ndarray,
        *,
        threshold: float,
        seed: int,
    ) -> None:
        if strategy == "low_rating" and np.isnan(events.rating).all():
            raise UserError(
                "--rejected=low_rating: the data set has no rating column; use --rejected=uniform or popularity."
            )
        self.strategy, self.number, self.threshold, self.seed = strategy, number, threshold, seed
        self.events, self.train_ends, self.counts, self.user_tokens = events, train_ends, counts, user_tokens
        self.catalogue = np.unique(events.item)

    def liked(self, window: Window) -> tuple[int, ...]:
        """The targets of a window that may be chosen: all, or those rated above the threshold."""
        if self.strategy != "low_rating":
            return window.targets
        items, ratings = self._training(window.user)
        rating = dict(zip(items.tolist(), ratings.tolist(), strict=True))
        return tuple(t for t in window.targets if rating[window.items[t]] > self.threshold)

    def fill(self, windows: Sequence[Window]) -> list[Window]:
        """The windows with their rejected items; windows left without a liked target are dropped."""
        filled, seen = [], {}
        for window in windows:
            targets = self.liked(window)
            if not targets:
                continue
            drawn = []
            for _ in targets:
                seen[window.user] = seen.get(window.user, 0) + 1
                drawn.append(self.draw(window.user, seen[window.user]))
            filled.append(replace(window, targets=targets, rejected=tuple(drawn)))
        if not filled:
            raise UserError(f"--rating_threshold={self.threshold}: no training interaction is rated above it.")
        return filled

    def draw(self, user: int, position: int) -> tuple[int, ...]:
        """k distinct items for a user's trained position, seeded by (seed, user token, position)."""
        told = f"{self.seed}|{self.user_tokens[user]}|{position}"
        rng = np.random.default_rng(np.frombuffer(hashlib.sha256(told.encode()).digest(), dtype=np.uint32))
        own, ratings = self._training(user)
        chosen: np.ndarray = np.empty(0, dtype=np.int64)
        if self.strategy == "low_rating":
            low = np.unique(own[ratings <= self.threshold])
            chosen = rng.permutation(low)[: self.number]
        free = np.setdiff1d(self.catalogue, own)
        odds = self.counts[free].astype(float) if self.strategy == "popularity" else np.ones(len(free))
        missing = self.number - len(chosen)
        if (odds > 0).sum() < missing:
            raise UserError(
                f"--rejected_num={self.number}: user {self.user_tokens[user]} has only {int((odds > 0).sum())} items "
                "could be rejected; set a smaller number."
            )
        more = rng.choice(free, missing, replace=False, p=odds / odds.sum()) if missing else []
        return tuple(int(i) for i in (*chosen, *more))

    def _training(self, user: int) -> tuple[np.ndarray, np.ndarray]:
        rows = slice(self.events.start[user], self.events.start[user] + self.train_ends[user])
        return self.events.item[rows], self.events.rating[rows]
