"""Statistics against scipy, statsmodels, ranx and hand-worked examples; and that they keep what they promise."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import NormalIndPower

from recbole_llm.report import stats

# scipy calls it rng since 1.15.
SEED = "rng" if "rng" in inspect.signature(scipy_stats.bootstrap).parameters else "random_state"
ALTERNATIVES = ("two-sided", "better")
UP, DOWN = np.array([1.0]), np.array([-1.0])


def random_pairs(n: int, seed: int = 0, shift: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Two metrics of ``n`` users in [0, 1], many of them 0, as ranking metrics are."""
    rng = np.random.default_rng(seed)
    base = rng.random(n) * (rng.random(n) < 0.6)
    return np.clip(base + rng.normal(shift, 0.3, n), 0, 1), base


# Tests


@pytest.mark.parametrize("n", [2, 10, 943])
@pytest.mark.parametrize(("alternative", "side"), [("two-sided", "two-sided"), ("better", "greater")])
def test_paired_t_is_scipys(n: int, alternative: str, side: str) -> None:
    ours, base = random_pairs(n, seed=n)
    expected = scipy_stats.ttest_rel(ours, base, alternative=side)
    t, p = stats.paired_t((ours - base)[None], UP, alternative)
    assert t[0] == pytest.approx(expected.statistic, rel=1e-10) and p[0] == pytest.approx(expected.pvalue, rel=1e-10)


def test_direction_decides_what_better_is() -> None:
    """The mistake of RecBole's own script: a model that is clearly better has a small one-sided p, not a large one."""
    ours, base = random_pairs(300, shift=0.2)
    better = (ours - base)[None]
    assert stats.paired_t(better, UP, "better")[1][0] < 1e-4 and stats.paired_t(better, DOWN, "better")[1][0] > 0.999
    assert stats.sign_flip(better, UP, "better")[0] < 1e-3 and stats.sign_flip(better, DOWN, "better")[0] > 0.999
    t, p = stats.paired_t(better, DOWN)  # the statistic keeps the sign of the difference, whatever is good
    assert t[0] > 0 and p[0] == pytest.approx(stats.paired_t(better, UP)[1][0], rel=1e-12)


@pytest.mark.parametrize(("alternative", "side"), [("two-sided", "two-sided"), ("better", "greater")])
def test_sign_flip_is_scipys_where_all_flips_are_tried(alternative: str, side: str) -> None:
    ours, base = random_pairs(9, seed=3)
    difference = ours - base
    expected = scipy_stats.permutation_test(
        (difference,), np.mean, permutation_type="samples", alternative=side, n_resamples=np.inf
    )
    found = stats.sign_flip(difference[None], UP, alternative)
    assert found[0] == pytest.approx(expected.pvalue, rel=1e-10)


def test_sign_flip_by_hand() -> None:
    """Differences 1, 2, 3: of the eight sums +-1 +-2 +-3 only 6 and -6 are as far from 0 as 6."""
    assert stats.sign_flip(np.array([[1.0, 2.0, 3.0]]), UP)[0] == 2 / 8
    assert stats.sign_flip(np.array([[1.0, 2.0, 3.0]]), UP, "better")[0] == 1 / 8
    assert stats.sign_flip(np.array([[1.0, -2.0, 3.0]]), UP, "better")[0] == 3 / 8  # 2, 4 and 6 reach 2; 0 does not


def test_drawn_flips_agree_with_scipys() -> None:
    """Within the error of 9,999 draws each, and with the t-test, whose null they share in large samples."""
    rng = np.random.default_rng(0)
    rows = rng.normal(0.02 * np.arange(6)[:, None], 0.5, (6, 400)) * (rng.random((6, 400)) < 0.7)
    found = stats.sign_flip(rows, np.ones(6))
    for row, p in zip(rows, found, strict=True):
        theirs = scipy_stats.permutation_test(
            (row,), np.mean, permutation_type="samples", n_resamples=9999, vectorized=True, **{SEED: 1}
        ).pvalue
        assert (
            abs(p - theirs) < 4 * math.sqrt(2 * 0.25 / 9999) and abs(p - scipy_stats.ttest_1samp(row, 0).pvalue) < 0.03
        )
    assert len(set(found)) == 6 and (found == stats.sign_flip(rows, np.ones(6))).all()


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.stack([np.subtract(*random_pairs(50, seed=s)) for s in range(3)])
    whole = stats.sign_flip(rows, np.ones(3), resamples=999), stats.bootstrap_interval(rows, resamples=999)
    monkeypatch.setattr(stats, "AT_ONCE", 50 * 100)
    assert stats.sign_flip(rows, np.ones(3), resamples=999) == pytest.approx(whole[0], abs=1e-12)
    np.testing.assert_allclose(stats.bootstrap_interval(rows, resamples=999), whole[1], atol=1e-12)


# Intervals and effects


@pytest.mark.parametrize("n", [5, 943])
def test_bootstrap_is_scipys(n: int) -> None:
    difference = np.subtract(*random_pairs(n, seed=n))
    expected = scipy_stats.bootstrap(
        (difference,), np.mean, n_resamples=2000, method="percentile", **{SEED: np.random.default_rng(0)}
    ).confidence_interval
    low, high = stats.bootstrap_interval(difference[None], resamples=2000)
    assert (low[0], high[0]) == pytest.approx((expected.low, expected.high), rel=1e-10)


def test_effect_size() -> None:
    """t is d times the root of n."""
    difference = np.subtract(*random_pairs(100))[None]
    assert stats.effect_size(difference)[0] == pytest.approx(stats.paired_t(difference, UP)[0][0] / 10, rel=1e-12)
    assert stats.effect_size(np.array([[1.0, 2.0, 3.0]]))[0] == pytest.approx(2.0)
    assert stats.effect_size(np.zeros((1, 3)))[0] == 0


def test_a_spread_of_rounding_is_none() -> None:
    """.3 - .2, .2 - .1 and .4 - .3 are the same difference, whose standard deviation is 0."""
    rows = np.array([[0.3 - 0.2, 0.2 - 0.1, 0.4 - 0.3], [0.2 - 0.3, 0.1 - 0.2, 0.3 - 0.4]])
    assert stats.effect_size(rows).tolist() == [np.inf, -np.inf] and stats.detectable(rows).tolist() == [0, 0]


def test_win_tie_loss() -> None:
    assert stats.win_tie_loss(np.array([[0.1, 0.0, -0.2, 0.3, np.nan]])).tolist() == [[2, 1, 1]]


def test_holm_by_hand() -> None:
    """.01 x 4, .02 x 3, .03 x 2, .04 x 1, none below the one before it."""
    assert stats.holm(np.array([0.04, 0.01, 0.03, 0.02])) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert stats.holm(np.array([])).tolist() == []


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_statsmodels(p_values: list[float]) -> None:
    expected = multipletests(p_values, method="holm")[1]
    np.testing.assert_allclose(stats.holm(np.array(p_values)), expected, rtol=1e-10)


def test_detectable_is_what_a_test_finds() -> None:
    """Simulated: the true difference that it names is found in four of five tries."""
    rng = np.random.default_rng(0)
    size = stats.detectable(rng.normal(0, 1, (1, 100_000)))[0] * math.sqrt(100_000 / 50)
    found = stats.paired_t(rng.normal(size, 1, (4000, 50)), np.ones(4000))[1] < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(("alternative", "theirs"), [("two-sided", "two-sided"), ("better", "larger")])
def test_detectable_is_statsmodels(alternative: str, theirs: str) -> None:
    """In standard deviations, by the normal approximation with one sample (``ratio=0``)."""
    differences = np.random.default_rng(0).normal(0.1, 2, (3, 400))
    found = stats.detectable(differences, 0.01, 0.9, alternative) / differences.std(1, ddof=1)
    expected = NormalIndPower().solve_power(nobs1=400, alpha=0.01, power=0.9, ratio=0, alternative=theirs)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# Users without a value, and differences that do not vary


def test_who_has_no_value_is_left_out() -> None:
    difference = np.subtract(*random_pairs(60))
    with_gaps = np.insert(difference, [3, 20, 60], np.nan)[None]
    np.testing.assert_allclose(stats.paired_t(with_gaps, UP), stats.paired_t(difference[None], UP), rtol=1e-12)
    assert stats.effect_size(with_gaps) == pytest.approx(stats.effect_size(difference[None]))
    short = difference[:7]
    gaps = np.insert(short, 2, np.nan)[None]
    assert stats.sign_flip(gaps, UP)[0] == pytest.approx(stats.sign_flip(short[None], UP)[0])
    low, high = stats.bootstrap_interval(with_gaps)
    near = stats.bootstrap_interval(difference[None])
    assert low[0] == pytest.approx(near[0][0], abs=0.01) and high[0] == pytest.approx(near[1][0], abs=0.01)


def test_no_difference_at_all() -> None:
    same = np.zeros((1, 30))
    assert stats.paired_t(same, UP)[1][0] == stats.sign_flip(same, UP)[0] == 1
    assert stats.bootstrap_interval(same)[0][0] == stats.bootstrap_interval(same)[1][0] == 0


def test_the_same_difference_for_all() -> None:
    t, p = stats.paired_t(np.full((1, 30), 0.25), UP)
    assert t[0] == np.inf and p[0] == 0.5**29 and stats.sign_flip(np.full((1, 30), 0.25), UP)[0] == 1 / 10000
    for alternative in ALTERNATIVES:  # of few users too, where every way to flip is tried
        thirds = [0.3 - 0.2, 0.2 - 0.1, 0.4 - 0.3]  # not the same to the last bit
        for values in ([1.0] * 2, [-1.0] * 5, [1.0, np.nan, 1.0], thirds, [-d for d in thirds]):
            rows = np.array([values])
            known = rows[:, ~np.isnan(rows[0])]
            assert stats.paired_t(rows, UP, alternative)[1][0] == stats.sign_flip(known, UP, alternative)[0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.5, -0.5, 1.0, -1.0, 0.3]), min_size=2, max_size=30))
def test_p_values_are_p_values(values: list[float]) -> None:
    rows, low_high = np.array([values]), stats.bootstrap_interval(np.array([values]), resamples=99)
    for alternative in ALTERNATIVES:
        for p in (stats.paired_t(rows, UP, alternative)[1][0], stats.sign_flip(rows, UP, alternative, 99)[0]):
            assert 0 <= p <= 1
    rounding = 1e-12  # sums of .3 are not whole multiples of it
    assert min(values) - rounding <= low_high[0][0] <= low_high[1][0] <= max(values) + rounding


# Another implementation of the whole


def test_ranx_finds_the_same() -> None:
    """Three runs over 80 queries with one relevant document of 20: means, t-tests and wins as ranx has them."""
    ranx = pytest.importorskip("ranx")
    rng = np.random.default_rng(5)
    scores = {name: rng.normal(0, 1, (80, 20)) for name in ("base", "alike", "better")}
    scores["better"][:, 0] += 0.8
    documents = [f"d{i}" for i in range(20)]
    runs = [
        ranx.Run(
            {f"q{i}": dict(zip(documents, map(float, row), strict=True)) for i, row in enumerate(table)}, name=name
        )
        for name, table in scores.items()
    ]
    qrels = ranx.Qrels({f"q{i}": {"d0": 1} for i in range(80)})
    report = ranx.compare(qrels, runs, ["ndcg@10"], stat_test="student", max_p=0.05, make_comparable=True)
    rank = {name: (table > table[:, :1]).sum(1) for name, table in scores.items()}
    ndcg = {name: np.where(r < 10, 1 / np.log2(r + 2), 0.0) for name, r in rank.items()}
    for name, values in ndcg.items():
        assert report.results[name]["ndcg@10"] == pytest.approx(values.mean(), rel=1e-9)
        for other in set(ndcg) - {name}:
            told = report.comparisons[name, other]["ndcg@10"]
            difference = (values - ndcg[other])[None]
            assert told["p_value"] == pytest.approx(stats.paired_t(difference, UP)[1][0], rel=1e-9)
            wins, ties, losses = stats.win_tie_loss(difference)[0]
            counted = report.win_tie_loss[name, other]["ndcg@10"]
            assert (counted["W"], counted["T"], counted["L"]) == (wins, ties, losses)


# What the whole promises


@pytest.mark.parametrize("shape", ["normal", "hits"])
def test_family_wise_error_under_the_null(shape: str) -> None:
    """Five models no better than the baseline they share: any of them is told apart in 5 % of 1,000 studies at most.

    Holm is valid under any dependence, so below .05 is fine; above it by three Monte-Carlo errors is not.
    """
    rng, studies, users, models = np.random.default_rng(1), 1000, 120, 5
    taste = rng.normal(0, 1, (studies, 1, users))  # users differ; the models share that
    values = rng.normal(taste, 1, (studies, models + 1, users))
    if shape == "hits":
        values = (values > 1).astype(float)
    most = 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)
    for p in both_tests(values):
        wrong = sum((stats.holm(row) < 0.05).any() for row in p)
        assert 0.01 < wrong / studies < most


def both_tests(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """p-values of every model against model 0, of many studies at once ``[studies, models - 1]``."""
    differences = values[:, 1:] - values[:, :1]
    rows, sign = differences.reshape(-1, differences.shape[2]), np.ones(differences.shape[0] * differences.shape[1])
    found = stats.paired_t(rows, sign)[1], stats.sign_flip(rows, sign, resamples=399)
    return found[0].reshape(differences.shape[:2]), found[1].reshape(differences.shape[:2])


def test_without_correction_the_error_would_be_larger() -> None:
    """That the test above can fail: without Holm five comparisons are wrong far more often."""
    for p in both_tests(np.random.default_rng(2).normal(0, 1, (500, 6, 120))):
        assert (p < 0.05).any(axis=1).mean() > 0.1


def test_an_effect_is_found() -> None:
    """One of five models is better by .35 standard deviations; it is found, the others mostly are not."""
    values = np.random.default_rng(3).normal(0, 1, (200, 6, 300))
    values[:, 1] += 0.35
    for p in both_tests(values):
        adjusted = np.array([stats.holm(row) for row in p])
        assert (adjusted[:, 0] < 0.05).mean() > 0.9 and (adjusted[:, 1:] < 0.05).any(axis=1).mean() < 0.1


def test_intervals_cover() -> None:
    """The true mean of hit rates lies in about 95 % of the intervals."""
    rng = np.random.default_rng(4)
    hits = (rng.random((1500, 200)) < 0.3).astype(float)
    low, high = stats.bootstrap_interval(hits, resamples=999)
    assert ((low <= 0.3) & (high >= 0.3)).mean() == pytest.approx(0.95, abs=0.02)


def test_sign_flips_of_many_users() -> None:
    """More users than a float has powers of two; p as the normal approximation has it, to the draws' own error."""
    rng = np.random.default_rng(0)
    given = rng.normal(0.04, 1.0, (3, 2000))
    p = stats.sign_flip(given, np.ones(3), resamples=4000)
    z = np.abs(given.sum(1)) / np.sqrt((given**2).sum(1))
    assert p == pytest.approx(2 * scipy_stats.norm.sf(z), abs=0.03)
