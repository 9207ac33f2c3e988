"""Whether another iteration is worth it, and which one is kept."""

from __future__ import annotations

from collections.abc import Sequence


def fell(scores: Sequence[float | None], bigger: bool) -> bool:
    """Whether the last iteration is worse on validation than the one before; not where it was not validated.

    Args:
        scores: validation scores of the iterations so far.
        bigger: whether larger scores are better.
    """
    if len(scores) < 2 or scores[-1] is None or scores[-2] is None:
        return False
    return scores[-1] < scores[-2] if bigger else scores[-1] > scores[-2]


def best_iteration(scores: Sequence[float | None], bigger: bool) -> int:
    """The iteration of the best score, the first of equals; the last one where there are no scores.

    Args:
        scores, bigger: as for ``fell``.
    """
    validated = [(score if bigger else -score, -i) for i, score in enumerate(scores) if score is not None]
    return -max(validated)[1] if validated else len(scores) - 1
