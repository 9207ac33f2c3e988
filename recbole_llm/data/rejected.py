"""Who is rejected: k items for each trained position, by one strategy or several that take turns.

A strategy is an order of items, the first of which are rejected. No draw looks at the target or at held-out events: it
is seeded with (seed, user token, number of the position), and what is left out are the user's training items alone.
Held-out items of the user may be drawn, as in any training on implicit data: to leave them out would tell them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from recbole.config import Config

from recbole_llm.data.prompt import Window
from recbole_llm.data.protocol import Protocol
from recbole_llm.data.seeds import seeded
from recbole_llm.errors import UserError
from recbole_llm.progress import bar

WINDOWS_AT_ONCE = 64

Policy = Callable[[Sequence[Window]], list[list[list[float]]]]  # windows -> log-probs of each target, chosen first
Recommend = Callable[[Sequence[Sequence[int]]], np.ndarray]  # histories -> scores of all items [B, n_items]


@dataclass(frozen=True)
class Sources:
    """What strategies draw on besides the data.

    Attributes:
        policy: the SFT policy's log-probs of windows, for ``self_hard``.
        vectors: unit vectors of the titles by item id ``[n_items, d]``, for ``semantic``.
        recommend: scores of a recommender trained on training data, for ``from_model``.
    """

    policy: Policy | None = None
    vectors: np.ndarray | None = None
    recommend: Recommend | None = None


@dataclass(frozen=True)
class Place:
    """A trained position of a user, and what strategies may know of it.

    Attributes:
        user: internal id.
        history: items before the target in its window, oldest first: of a stretch (stream prompt) those of the stretch.
        rng: seeded with (seed, user token, number of the position).
        free: the catalogue without the user's training items.
        scores: of all items after this history, for ``from_model``.
        hard: wrong items by the SFT policy's log-prob, best first, for ``self_hard``.
    """

    user: int
    history: tuple[int, ...]
    rng: np.random.Generator
    free: np.ndarray
    scores: np.ndarray = None  # type: ignore[assignment]  # both are there where their strategy is asked for
    hard: np.ndarray = None  # type: ignore[assignment]


class RejectedItems:
    """Fills windows with rejected items as a configuration asks for (``rejected``, ``rejected_num``), or as told here.

    ``uniform``: any item but the user's training items. ``popularity``: the same, with odds by training count to
    the power ``popularity_exponent``. ``low_rating``: what the user rated at or below ``rating_threshold`` in
    training; then only items rated above it are chosen. ``self_hard``: of ``rejected_pool`` uniform draws those that
    the SFT policy finds likeliest, whether or not it ranks the target above them. ``semantic``: of the
    ``rejected_pool`` free items nearest to the history's mean title vector. ``from_model``: of the ``rejected_pool``
    free items that a recommender scores highest. What a strategy lacks is filled up uniformly.

    Raises:
        UserError: low_rating without ratings.
    """

    def __init__(
        self,
        config: Config,
        protocol: Protocol,
        sources: Sources,
        *,
        strategies: Sequence[str] | None = None,
        number: int | None = None,
    ) -> None:
        self.config, self.protocol, self.sources = config, protocol, sources
        self.strategies = strategies or config["rejected"].split("+")
        self.number, self.pool = number or config["rejected_num"], config["rejected_pool"]
        self.events, self.train_ends = protocol.events, protocol.train_ends
        if "low_rating" in self.strategies and np.isnan(self.events.rating).all():
            raise UserError(
                "--rejected=low_rating: the data set has no rating column; use --rejected=uniform or popularity."
            )
        self.user_tokens = protocol.dataset.field2id_token[protocol.dataset.uid_field]
        self.catalogue = self.events.catalogue
        self.counts = np.array([protocol.item_counter[i] for i in range(protocol.dataset.item_num)], dtype=float)

    def fill(self, windows: Sequence[Window], show_progress: bool = False) -> list[Window]:
        """The windows with their rejected items; targets that are not liked go (low_rating), and empty windows.

        Raises:
            UserError: no target is left, or a user has fewer than k items to reject.
        """
        windows = self.usable(windows)
        filled: list[Window] = []
        numbers: dict[int, int] = {}
        firsts = range(0, len(windows), WINDOWS_AT_ONCE)
        for first in bar(iterable=firsts, desc="Rejected items", disable=not show_progress):
            some = windows[first : first + WINDOWS_AT_ONCE]
            drawn = iter([self.draw(place) for place in self._places(some, numbers)])
            filled += [replace(w, rejected=tuple(next(drawn) for _ in w.targets)) for w in some]
        return filled

    def usable(self, windows: Sequence[Window]) -> list[Window]:
        """The windows that can be filled, with the targets that may be chosen; it draws nothing and asks no source.

        Raises:
            UserError: as ``fill``.
        """
        if not windows:
            raise UserError(
                f"--chosen_num={self.config['chosen_num']}: no user has a training position with so many items to "
                "choose. Ask for fewer, or for more training users."
            )
        windows = [liked for w in windows if (liked := self.liked(w)).targets]
        if not windows:
            raise UserError(
                f"--rating_threshold={self.config['rating_threshold']}: no training position has liked items "
                "to choose, rated above it and with a history before them."
            )
        for user in dict.fromkeys(w.user for w in windows):
            could = self._free(user)
            if "low_rating" in self.strategies:
                could = np.union1d(could, self._disliked(user))
            if len(could) < self.number:
                raise self._too_few(user, len(could))
        return windows

    def _too_few(self, user: int, number: int) -> UserError:
        instead = "set a smaller number" if number else "leave out users who met all items"
        return UserError(
            f"--rejected_num={self.number}: user {self.user_tokens[user]} has only {number} items that could be "
            f"rejected; {instead}."
        )

    def _disliked(self, user: int) -> np.ndarray:
        """What the user rated low in training."""
        return self.events.disliked(user, int(self.train_ends[user]))

    def liked(self, window: Window) -> Window:
        """The window with the targets that may be chosen: all, or with low_rating those not rated low."""
        if "low_rating" not in self.strategies:
            return window
        disliked = set(self._disliked(window.user).tolist())
        also = window.also or ((),) * len(window.targets)
        chosen = [{window.items[t], *more} for t, more in zip(window.targets, also, strict=True)]
        kept = [i for i, items in enumerate(chosen) if not items & disliked]
        return replace(window, targets=tuple(window.targets[i] for i in kept), also=tuple(also[i] for i in kept))

    def draw(self, place: Place) -> tuple[int, ...]:
        """k distinct items for a position; each of m strategies gives about k / m, in turns from a random first one."""
        turn = int(place.rng.integers(len(self.strategies)))
        slots = [self.strategies[(turn + slot) % len(self.strategies)] for slot in range(self.number)]
        chosen: list[int] = []
        for strategy in dict.fromkeys(slots):
            order = self._order(strategy, place)
            fresh = order[~np.isin(order, chosen)]
            chosen += [int(i) for i in fresh[: slots.count(strategy)]]
        if len(chosen) < self.number:
            rest = place.rng.permutation(place.free)
            chosen += [int(i) for i in rest[~np.isin(rest, chosen)][: self.number - len(chosen)]]
        if len(chosen) < self.number:
            raise self._too_few(place.user, len(chosen))
        return tuple(chosen)

    def _order(self, strategy: str, place: Place) -> np.ndarray:
        """Items in the order in which a strategy rejects them."""
        if strategy == "popularity":
            # An exponential race: shorter waits for popular items, the same odds as drawing one after the other.
            odds = self.counts[place.free] ** self.config["popularity_exponent"] * (self.counts[place.free] > 0)
            wait = place.rng.exponential(size=len(place.free))[odds > 0] / odds[odds > 0]
            return place.free[odds > 0][np.argsort(wait)]
        if strategy == "low_rating":
            return place.rng.permutation(self._disliked(place.user))
        if strategy == "semantic":
            vectors = self.sources.vectors
            assert vectors is not None  # whoever asks for a strategy gives its source
            return self._from_top(vectors[place.free] @ vectors[list(place.history)].mean(0), place)
        if strategy == "from_model":
            return self._from_top(place.scores[place.free], place)
        if strategy == "self_hard":
            return place.hard
        return place.rng.permutation(place.free)

    def _from_top(self, scores: np.ndarray, place: Place) -> np.ndarray:
        """The ``rejected_pool`` best free items in random order."""
        best = np.argsort(-scores, kind="stable")[: self.pool]
        return place.rng.permutation(place.free[best])

    def _places(self, windows: Sequence[Window], numbers: dict[int, int]) -> Iterator[Place]:
        """Every trained position of some windows, with what the strategies need to know of it."""
        free = {user: self._free(user) for user in {w.user for w in windows}}  # shared: it may be a large catalogue
        places = [self._place(w, t, numbers, free[w.user]) for w in windows for t in w.targets]
        if "from_model" in self.strategies:
            assert self.sources.recommend is not None
            scores = self.sources.recommend([p.history for p in places])
            places = [replace(p, scores=s) for p, s in zip(places, scores, strict=True)]
        if "self_hard" in self.strategies:
            places = [replace(p, hard=h) for p, h in zip(places, self._hard(windows, places), strict=True)]
        yield from places

    def _free(self, user: int) -> np.ndarray:
        """The catalogue without the user's training items."""
        kept = np.ones(self.catalogue.max() + 1, dtype=bool)
        kept[self.events.items_of(user)[: self.train_ends[user]]] = False
        return self.catalogue[kept[self.catalogue]]

    def _place(self, window: Window, target: int, numbers: dict[int, int], free: np.ndarray) -> Place:
        user = window.user
        numbers[user] = numbers.get(user, 0) + 1
        rng = seeded(self.config["seed"], self.user_tokens[user], numbers[user])
        return Place(user, window.items[:target], rng, free)

    def _hard(self, windows: Sequence[Window], places: Sequence[Place]) -> Iterator[np.ndarray]:
        """For each position its pool, ordered by the SFT policy's log-prob, best first."""
        pools = [p.rng.choice(p.free, min(self.pool, len(p.free)), replace=False) for p in places]
        drawn = iter(pools)
        asked = [replace(w, also=(), rejected=tuple(tuple(map(int, next(drawn))) for _ in w.targets)) for w in windows]
        assert self.sources.policy is not None
        logps = (np.array(target[1:]) for window in self.sources.policy(asked) for target in window)
        for pool, found in zip(pools, logps, strict=True):
            yield pool[np.argsort(-found, kind="stable")]
