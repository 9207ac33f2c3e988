"""All interactions by user and time, and which items a user rated low when."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Events:
    """All interactions by user and time, before any history is cut.

    With ``liked_only`` the events are those rated above the threshold (or not rated), and the low ones stand aside.

    Attributes:
        user, item: internal ids, sorted by (user, time, file order) ``[n]``.
        rating: as in the file, nan where there is none ``[n]``.
        start: row of a user's first event; ``start[u]:start[u + 1]`` are the events of user u ``[n_users + 1]``.
        threshold: ratings above it are liked.
        low_item: items rated at or below the threshold, by user ``[m]``.
        low_from: the least ``end`` such that the low rating comes before the user's event number ``end`` ``[m]``.
        low_start: like ``start``, for the low ones ``[n_users + 1]``.
    """

    user: np.ndarray
    item: np.ndarray
    rating: np.ndarray
    start: np.ndarray
    threshold: float
    low_item: np.ndarray
    low_from: np.ndarray
    low_start: np.ndarray

    @cached_property
    def catalogue(self) -> np.ndarray:
        """Every item that someone met, liked or not."""
        return np.unique(np.append(self.item, self.low_item))

    def items_of(self, user: int) -> np.ndarray:
        """Items of a user in order of time."""
        return self.item[self.start[user] : self.start[user + 1]]

    def met(self, user: int) -> np.ndarray:
        """Distinct items of a user, with those that ``liked_only`` set aside."""
        return np.unique(np.append(self.items_of(user), self._low(user)[0]))

    def disliked(self, user: int, end: int) -> np.ndarray:
        """Distinct items that a user rated at or below the threshold, and none above, before event number ``end``.

        An event that ``liked_only`` set aside is before event ``end`` if its time is not later.

        Args:
            end: 0-based number of one of the user's events; their number = at any time.
        """
        items, least_end = self._low(user)
        ratings = self.rating[self.start[user] : self.start[user + 1]][:end]
        liked = self.items_of(user)[:end][~(ratings <= self.threshold)]
        return np.setdiff1d(items[least_end <= end], liked)

    def disliked_counts(self) -> np.ndarray:
        """Items that each user disliked at any time ``[n_users]``."""
        lengths = np.diff(self.start)
        return np.array([len(self.disliked(user, length)) for user, length in enumerate(lengths)])

    def _low(self, user: int) -> tuple[np.ndarray, np.ndarray]:
        rows = slice(self.low_start[user], self.low_start[user + 1])
        return self.low_item[rows], self.low_from[rows]


@dataclass(frozen=True)
class LowRatings:
    """Interactions set aside by ``liked_only``.

    Attributes:
        user, item: internal ids, sorted by user ``[m]``.
        least_end: how many of the user's kept events are earlier ``[m]``.
    """

    user: np.ndarray
    item: np.ndarray
    least_end: np.ndarray

    @staticmethod
    def of(low: pd.DataFrame, kept: pd.DataFrame, user_field: str, item_field: str, time_field: str) -> LowRatings:
        """From two tables of interactions with internal ids and full times."""
        user = np.append(kept[user_field].to_numpy(), low[user_field].to_numpy())
        time = np.append(kept[time_field].to_numpy(), low[time_field].to_numpy())
        is_kept = np.arange(len(user)) < len(kept)
        order = np.lexsort((is_kept, time, user))  # of equal times the low one first: no kept event is earlier
        earlier = np.cumsum(is_kept[order]) - np.searchsorted(np.sort(user[is_kept]), user[order])
        rows = order[~is_kept[order]]
        return LowRatings(user[rows], low[item_field].to_numpy()[rows - len(kept)], earlier[~is_kept[order]])


def events_of(
    table: pd.DataFrame, fields: tuple[str, str, str], n_users: int, threshold: float, low: LowRatings | None
) -> Events:
    """Events of a table that is sorted by user and time.

    Args:
        fields: names of the user, item and rating columns; the last may lack.
        low: what ``liked_only`` set aside; None = the low ratings are among the events.
    """
    user_field, item_field, rating_field = fields
    user, item = table[user_field].to_numpy(), table[item_field].to_numpy()
    rating = table[rating_field].to_numpy(float) if rating_field in table else np.full(len(table), np.nan)
    start = np.searchsorted(user, np.arange(n_users + 1))
    if low is None:
        rows = np.flatnonzero(rating <= threshold)
        low = LowRatings(user[rows], item[rows], rows - start[user[rows]] + 1)
    low_start = np.searchsorted(low.user, np.arange(n_users + 1))
    return Events(user, item, rating, start, threshold, low.item, low.least_end, low_start)
