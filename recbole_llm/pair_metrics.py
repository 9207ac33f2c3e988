"""Metrics of rows with two candidates: the target and one other."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata

COIN_SEED = 42  # DMPO's released evaluation
PAIR_METRICS = ("paired_accuracy", "auc_global", "auc_coin_flip")


def paired_accuracy(target: np.ndarray, other: np.ndarray) -> np.ndarray:
    """1 where the target scores higher, 1/2 where both score the same, else 0 ``[R]``."""
    return np.where(target > other, 1.0, np.where(target == other, 0.5, 0.0))


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The chance that a score of label 1 is above one of label 0, ties half; NaN where a label is missing.

    Args:
        scores: ``[N]``; -inf is below all others.
        labels: 0 or 1 ``[N]``.
    """
    positive = labels == 1
    ones, zeros = int(positive.sum()), int((~positive).sum())
    if not ones or not zeros:
        return float("nan")
    return float((rankdata(scores)[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def auc_global(target: np.ndarray, other: np.ndarray) -> float:
    """AUC over the scores of all rows together, targets labelled 1."""
    return auc(np.concatenate([target, other]), np.repeat([1, 0], [len(target), len(other)]))


def auc_coin_flip(target: np.ndarray, other: np.ndarray) -> float:
    """AUC where a coin keeps one score of each row: the target's with label 1, or the other's with label 0.

    As DMPO's released evaluation, to compare with its numbers. It is weak: half of the scores are dropped, and what is
    left compares scores of different prompts only, which differ for reasons other than the answer.
    """
    heads = np.random.default_rng(COIN_SEED).random(len(target)) < 0.5
    return auc(np.where(heads, target, other), heads.astype(int))


def pair_metrics(target: np.ndarray, other: np.ndarray, decimals: int) -> dict[str, float]:
    """All of them; an AUC without both labels is left out.

    Args:
        target, other: scores ``[R]``.
        decimals: places that are kept, as RecBole's ``metric_decimal_place``.
    """
    found = {
        "paired_accuracy": float(paired_accuracy(target, other).mean()),
        "auc_global": auc_global(target, other),
        "auc_coin_flip": auc_coin_flip(target, other),
    }
    return {name: round(value, decimals) for name, value in found.items() if not np.isnan(value)}
