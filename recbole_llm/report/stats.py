"""Are two models different? Tests, intervals and effect sizes over users that both were asked about.

The unit is the user: every function takes one difference a user, model minus baseline, averaged over seeds before.
Seeds are no further observations of a user; their spread is told apart. NaN = not defined for that user, who is left
out. Paired t, sign-flip randomisation and bootstrap keep their level at recommender sample sizes, Wilcoxon and sign
tests do not (Ihemelandu & Ekstrand, SIGIR 2023, arXiv:2305.02461).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
from scipy import stats

AT_ONCE = 2**24  # random numbers held in memory


def paired_t(
    differences: np.ndarray, sign: np.ndarray, alternative: str = "two-sided"
) -> tuple[np.ndarray, np.ndarray]:
    """Paired t-test of every row: statistic and p-value ``[C]``.

    No difference for any user is t = 0, p = 1. The same difference for every user is an infinite t, whose p-value, 0,
    would be that of two users too: p is then that of ``sign_flip``, 1 / 2^n for each side.

    Args:
        differences: ``[C, n]``.
        sign: 1 where larger is better, -1 where smaller is ``[C]``.
        alternative: two-sided, or ``better``: the model is better than the baseline.
    """
    given = differences * sign[:, None]
    side = "two-sided" if alternative == "two-sided" else "greater"
    t, p = np.empty(len(given)), np.empty(len(given))
    gaps = np.isnan(given).any(axis=1)
    with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):  # differences that do not vary
        t[~gaps], p[~gaps] = stats.ttest_1samp(given[~gaps], 0.0, axis=1, alternative=side)
        for row in np.flatnonzero(gaps):  # scipy's own way of leaving NaN out is far slower
            t[row], p[row] = stats.ttest_1samp(given[row][~np.isnan(given[row])], 0.0, alternative=side)
    most, users = np.nanmax(np.abs(given), axis=1), (~np.isnan(given)).sum(axis=1)
    flips = np.minimum(0.5**users * (2 if alternative == "two-sided" else 1), 1.0)
    alike = _alike(given)
    against = (alternative != "two-sided") & (np.nanmean(given, axis=1) < 0)
    t, p = np.where(alike, np.copysign(np.inf, t), t) * sign, np.where(alike, np.where(against, 1.0, flips), p)
    return np.where(most == 0, 0.0, t), np.where(most == 0, 1.0, p)


def _alike(rows: np.ndarray) -> np.ndarray:
    """Rows of one value for several users, but for rounding: 1 - 2/3 is not 1/3 to the last bit ``[C]``."""
    span = np.nanmax(rows, axis=1) - np.nanmin(rows, axis=1)
    return (span <= 1e-9 * np.nanmax(np.abs(rows), axis=1)) & ((~np.isnan(rows)).sum(axis=1) > 1)


def sign_flip(
    differences: np.ndarray, sign: np.ndarray, alternative: str = "two-sided", resamples: int = 9999, seed: int = 0
) -> np.ndarray:
    """Randomisation test of every row ``[C]``: how often is a mean as large when each user's sign is a coin's?

    Exact where there are no more than ``resamples`` + 1 ways to flip, else over ``resamples`` draws with the observed
    one counted in (Phipson & Smyth 2010), so that p is never 0. All rows see the same flips.

    Args:
        differences, sign, alternative: as in ``paired_t``.
    """
    given = np.nan_to_num(differences) * sign[:, None]
    observed = given.sum(1)
    if alternative == "two-sided":
        observed = np.abs(observed)
    limit = observed - 1e-9 * np.abs(given).sum(1)  # sums of the same numbers in another order
    count, drawn, exact = np.zeros(len(given)), 0, 2 ** given.shape[1] <= resamples + 1
    for flips in _all_flips(given.shape[1]) if exact else _random_flips(given.shape[1], resamples, seed):
        sums = flips @ given.T
        count += ((np.abs(sums) if alternative == "two-sided" else sums) >= limit).sum(0)
        drawn += len(flips)
    return count / drawn if exact else (count + 1) / (drawn + 1)


def _all_flips(n: int) -> Iterator[np.ndarray]:
    yield 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)


def _random_flips(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    rng, chunk = np.random.default_rng(seed), max(1, AT_ONCE // n)
    for first in range(0, resamples, chunk):
        yield 1.0 - 2.0 * rng.integers(0, 2, (min(chunk, resamples - first), n))


def bootstrap_interval(
    values: np.ndarray, level: float = 0.95, resamples: int = 9999, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval of the mean of every row: low and high ``[C]``.

    Users are drawn with replacement, the same for all rows; the draws are those of ``scipy.stats.bootstrap``.

    Args:
        values: ``[C, n]``; differences, or a metric itself.
    """
    there, n = ~np.isnan(values), values.shape[1]
    filled = np.nan_to_num(values)
    rng, chunk, means = np.random.default_rng(seed), max(1, AT_ONCE // n), []
    for first in range(0, resamples, chunk):
        rows = min(chunk, resamples - first)
        drawn = rng.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(float)
        with np.errstate(invalid="ignore"):  # a draw of users none of whom has a value
            means.append((times @ filled.T) / (times @ there.T))
    low, high = np.nanpercentile(np.concatenate(means), [50 - 50 * level, 50 + 50 * level], axis=0)
    return low, high


def effect_size(differences: np.ndarray) -> np.ndarray:
    """Cohen's d of paired differences ``[C]``: their mean over their standard deviation (n - 1).

    0 where all are 0; infinite where all are the same.
    """
    mean = np.nanmean(differences, axis=1)
    with np.errstate(all="ignore"):
        d = mean / np.nanstd(differences, axis=1, ddof=1)
    return np.where(mean == 0, 0.0, np.where(_alike(differences), np.copysign(np.inf, mean), d))


def win_tie_loss(gains: np.ndarray) -> np.ndarray:
    """Users for whom the model is better, equal and worse ``[C, 3]``; a gain above 0 is better ``[C, n]``."""
    return np.stack([(gains > 0).sum(1), (gains == 0).sum(1), (gains < 0).sum(1)], axis=1)


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's adjusted p-values ``[C]`` of one family of comparisons (Holm 1979).

    Equal to statsmodels' ``multipletests``, which collects garbage at every call: a tenth of a second beside an LLM.
    """
    p_values = np.asarray(p_values, dtype=float)
    order, count = np.argsort(p_values), len(p_values)
    adjusted = np.empty(count)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p_values[order] * np.arange(count, 0, -1)))
    return adjusted


def detectable(
    differences: np.ndarray, alpha: float = 0.05, power: float = 0.8, alternative: str = "two-sided"
) -> np.ndarray:
    """The smallest true mean difference that a test of this many users would find, mostly ``[C]``.

    Normal approximation: (z of alpha + z of power) standard errors. It tells "no difference" from "too few users".

    Args:
        alternative: ``two-sided``, or ``better``, which needs less.
    """
    n = (~np.isnan(differences)).sum(1)
    z = stats.norm.ppf(1 - alpha / (2 if alternative == "two-sided" else 1)) + stats.norm.ppf(power)
    spread = np.where(_alike(differences), 0.0, np.nanstd(differences, axis=1, ddof=1))
    return z * spread / np.sqrt(n)
