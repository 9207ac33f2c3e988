"""Which history items move a score, and whether that is so: leave-one-out, and deletion tests against random deletion.

Deletion and keeping are the comprehensiveness and sufficiency of ERASER (DeYoung et al., ACL 2020, arXiv 1911.03429).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import ttest_rel

from recbole_llm.explain.history_logps import History

Score = Callable[[Sequence[History]], np.ndarray]  # histories -> log-probs of the explained titles [H, I], nats

SIZES = (1, 2, 3)  # items that are removed, or kept
DRAWS = 20  # random sets of each size


@dataclass(frozen=True)
class Deletion:
    """What it costs a title when history items go, in nats of its log-prob: larger = they mattered more.

    Attributes:
        size: how many items.
        places: the most influential ones, 0 = the oldest item of the history.
        removed, removed_random: drop without these; without each random set ``[draws]``.
        kept, kept_random: drop with these alone; with each random set alone ``[draws]``. Smaller = they say more.
    """

    size: int
    places: tuple[int, ...]
    removed: float
    removed_random: tuple[float, ...]
    kept: float
    kept_random: tuple[float, ...]


def influences(score: Score, history: History) -> np.ndarray:
    """Leave-one-out: how much the log-prob of each title falls without each history item ``[n, I]``, nats.

    Positive = the item makes the title likelier.
    """
    every = score([history, *(_without(history, (place,)) for place in range(len(history)))])
    return every[0] - every[1:]


def deletion_tests(
    score: Score, history: History, influence: np.ndarray, rng: np.random.Generator, draws: int = DRAWS
) -> list[list[Deletion]]:
    """Deletion and keeping of the most influential items, against random sets of as many.

    At size 1 the deletion test holds by construction, because leave-one-out is that deletion; from size 2 on, and for
    keeping, nothing makes it hold.

    Args:
        score: of I titles.
        history: n items.
        influence: as ``influences`` gives it ``[n, I]``.
        rng: draws the random sets, uniformly; all titles are asked with the same ones.

    Returns:
        For each title a test for each of ``SIZES`` that is smaller than the history.
    """
    length, titles = influence.shape
    sizes = [size for size in SIZES if size < length]
    order = np.argsort(-influence, axis=0, kind="stable")
    sets = []  # of each size: the chosen places of each title, then the random ones
    for size in sizes:
        chosen = [tuple(sorted(order[:size, title].tolist())) for title in range(titles)]
        sets.append(chosen + [tuple(sorted(rng.choice(length, size, replace=False).tolist())) for _ in range(draws)])
    flat = [places for group in sets for places in group]
    asked = [history, *(_without(history, p) for p in flat), *(_only(history, p) for p in flat)]
    logps = score(asked)
    drops = (logps[0] - logps[1:]).reshape(2, len(sizes), titles + draws, titles)
    return [
        [_test(sizes[row], sets[row], drops[:, row, :, title], title, titles) for row in range(len(sizes))]
        for title in range(titles)
    ]


def _test(size: int, sets: list[tuple[int, ...]], drops: np.ndarray, title: int, titles: int) -> Deletion:
    (removed, kept), (removed_random, kept_random) = drops[:, title], drops[:, titles:]
    return Deletion(
        size, sets[title], float(removed), tuple(removed_random.tolist()), float(kept), tuple(kept_random.tolist())
    )


def _without(history: History, places: Sequence[int]) -> History:
    return tuple(item for place, item in enumerate(history) if place not in places)


def _only(history: History, places: Sequence[int]) -> History:
    return tuple(item for place, item in enumerate(history) if place in places)


@dataclass(frozen=True)
class Comparison:
    """The influential items against random ones over users, one value a user (random: the mean of the draws).

    Attributes:
        test: "removed" (larger is better) or "kept" (smaller is better).
        size: how many items.
        users: with histories longer than that.
        influential, random: mean drop, nats.
        difference: its mean, influential less random, nats; ``low`` and ``high`` its 95 % interval.
        wins, ties: share of users whose influential items did better, or as well.
        p: paired t test, two-sided, not corrected for several sizes; None where it is undefined (fewer than two users,
            or no difference at all).
    """

    test: str
    size: int
    users: int
    influential: float
    random: float
    difference: float
    low: float | None
    high: float | None
    wins: float
    ties: float
    p: float | None


def over_users(tests: Sequence[Sequence[Deletion]]) -> list[Comparison]:
    """Deletion tests of several users -> a comparison of each test and size."""
    found = []
    for test, sign in (("removed", 1), ("kept", -1)):
        for size in SIZES:
            mine = [d for user in tests for d in user if d.size == size]
            if mine:
                influential = np.array([getattr(d, test) for d in mine])
                random = np.array([np.mean(getattr(d, f"{test}_random")) for d in mine])
                found.append(_compared(test, size, influential, random, sign))
    return found


def _compared(test: str, size: int, influential: np.ndarray, random: np.ndarray, sign: int) -> Comparison:
    difference = influential - random
    tied = np.abs(difference) <= 1e-6  # a float32 log-prob is no more exact
    p = low = high = None
    if len(difference) > 1 and np.ptp(difference) > 0 and not tied.all():
        result = ttest_rel(influential, random)
        p, interval = float(result.pvalue), result.confidence_interval(0.95)
        low, high = float(interval.low), float(interval.high)
    return Comparison(
        test,
        size,
        len(difference),
        float(influential.mean()),
        float(random.mean()),
        float(difference.mean()),
        low,
        high,
        float(((sign * difference > 0) & ~tied).mean()),
        float(tied.mean()),
        p,
    )
