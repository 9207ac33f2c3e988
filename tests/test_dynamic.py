"""DynamicPO's choice and betas: by hand, against scikit-learn's KMeans and all splits, and their symmetries."""

from __future__ import annotations

import math
import warnings
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.cluster import KMeans

from recbole_llm.dynamic import boundary_negatives, dynamic_beta
from recbole_llm.loss import dmpo_loss

few = settings(max_examples=60, deadline=None)
ABOVE = 1e6  # a chosen log-prob that no rejected one reaches: the clusters decide


def batch(chosen: list[float], rejected: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(chosen, dtype=torch.float64), torch.tensor(rejected, dtype=torch.float64)


def clusters(rejected: list[float] | np.ndarray) -> np.ndarray:
    """The top cluster alone, [N] bool."""
    rejected = torch.as_tensor(rejected, dtype=torch.float64)[None]
    return boundary_negatives(torch.tensor([ABOVE]), rejected)[0].numpy()


def squares(values: np.ndarray, cuts: tuple[int, ...]) -> float:
    """Squares within the parts of a sorted row."""
    return sum(((part - part.mean()) ** 2).sum() for part in np.split(values, cuts))


# Which


def test_those_as_likely_as_the_chosen_one() -> None:
    """Equal counts; clusters are asked only where no rejected one is as likely."""
    chosen, rejected = batch([-5.0, -5.0], [[-4.0, -5.0, -5.1, -30.0], [-6.0, -30.0, -31.0, -50.0]])
    assert boundary_negatives(chosen, rejected).tolist() == [[True, True, False, False], [True, False, False, False]]


@pytest.mark.parametrize(
    ("rejected", "top"),
    [
        ([-7.0], [1]),
        ([-7.0, -9.0], [1, 0]),
        ([-7.0, -7.0], [1, 1]),
        ([-9.0, -7.0, -8.0], [0, 1, 0]),
        ([-9.0, -7.0, -9.0], [0, 1, 0]),
        ([-9.0, -7.0, -7.0], [0, 1, 1]),
        ([-8.0, -8.0, -8.0], [1, 1, 1]),
        ([-20.0, -7.0, -20.0, -7.0], [0, 1, 0, 1]),
        ([-20.0, -7.0, -20.5, -7.5, -40.0], [0, 1, 0, 1, 0]),
        ([-20.0, -7.0, -7.0, -7.0, -40.0, -41.0], [0, 1, 1, 1, 0, 0]),
        ([-1.0, -2.0, -3.0, -4.0], [1, 0, 0, 0]),  # three splits are equally good
        ([math.nan, -2.0], [1, 1]),
    ],
)
def test_top_cluster_by_hand(rejected: list[float], top: list[int]) -> None:
    """Few items, few distinct log-probs, ties."""
    assert clusters(rejected).tolist() == [bool(t) for t in top]


@pytest.mark.parametrize("step", [0.1, 1 / 3, 1.0, 7.3])
@pytest.mark.parametrize("n", range(3, 12))
def test_of_equally_good_splits_the_smallest_top_cluster(n: int, step: float) -> None:
    """Evenly spaced rows split best into sizes that differ by one at most, in any order: the top one has n // 3."""
    for start in (-0.1, -17.77, -300.3):
        assert clusters(start - step * np.arange(n)).sum() == n // 3


@pytest.mark.parametrize("n", [3, 4, 7, 15])
def test_top_cluster_equals_kmeans_with_many_restarts(n: int) -> None:
    """Random rows have one best split; a row in five has several distinct lumps."""
    draw = np.random.default_rng(n)
    for i in range(12):
        row = draw.normal(-25, 6, n) + (draw.integers(0, 3, n) * 20 if i % 5 == 0 else 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads
            fitted = KMeans(n_clusters=3, n_init=100, random_state=0, tol=0).fit(row[:, None])
        assert (clusters(row) == (fitted.labels_ == fitted.cluster_centers_.argmax())).all()


@few
@given(st.integers(1, 8).flatmap(lambda n: arrays(np.float64, n, elements=st.integers(-12, -1).map(float))))
def test_top_cluster_belongs_to_a_best_split(row: np.ndarray) -> None:
    """Against all splits of the sorted row into at most three, ties and all; equal values are never parted."""
    top = clusters(row)
    assert top.any() and row[top].min() > (row[~top].max() if (~top).any() else -math.inf)
    ranked, size = np.sort(row)[::-1], int(top.sum())
    distinct = len(set(row))
    every = [c for k in range(min(3, distinct)) for c in combinations(range(1, len(row)), k)]
    with_ours = [(size, b) for b in range(size + 1, len(row))] + [(size,)] if size < len(row) else [()]
    assert min(squares(ranked, c) for c in with_ours) == pytest.approx(min(squares(ranked, c) for c in every), abs=1e-9)
    assert size < len(row) or distinct == 1


@few
@given(st.integers(1, 6), st.randoms(use_true_random=False), st.floats(-60, 0))
def test_order_and_neighbours_do_not_matter(n: int, random, chosen: float) -> None:
    """Both functions are equivariant under permutations, and a row's result is its own."""
    draw = np.random.default_rng(random.randint(0, 10**6))
    order = list(range(n))
    random.shuffle(order)
    lead, rejected = torch.tensor([chosen, -20.0]).double(), torch.from_numpy(draw.normal(-25, 8, (2, n)))
    kept = boundary_negatives(lead, rejected)
    beta = dynamic_beta(lead, rejected, kept, beta=0.5, margin=6.0)
    moved = boundary_negatives(lead, rejected[:, order])
    assert torch.equal(moved, kept[:, order])
    torch.testing.assert_close(dynamic_beta(lead, rejected[:, order], moved, beta=0.5, margin=6.0), beta[:, order])
    assert torch.equal(boundary_negatives(lead[1:], rejected[1:]), kept[1:])
    torch.testing.assert_close(dynamic_beta(lead[1:], rejected[1:], kept[1:], beta=0.5, margin=6.0), beta[1:])
    assert kept.any(dim=1).all() and ((beta >= 0.25) & (beta <= 0.75)).all()


def test_a_shift_of_all_log_probs_changes_nothing() -> None:
    chosen, rejected = batch([-30.0, -10.0], [[-31.0, -33.0, -50.0], [-9.0, -12.0, -40.0]])
    kept = boundary_negatives(chosen, rejected)
    assert torch.equal(boundary_negatives(chosen - 7, rejected - 7), kept)
    betas = [dynamic_beta(chosen - s, rejected - s, kept, beta=1.0, margin=2.0) for s in (0, 7)]
    torch.testing.assert_close(*betas)


# How strongly


def test_dynamic_beta_by_hand() -> None:
    """Chosen -10, rejected -9 and -12 at the boundary, -30 and -34 easy, whose mean is -32; beta 2, margin 6.

    -9: d_pos -1, d_neg 23, (-1 - 23 - 6) / 24 = -1.25; -12: d_pos 2, d_neg 20, (2 - 20 - 6) / 22 = -12/11;
    -30: d_pos 20, d_neg 2, (20 - 2 - 6) / 22 = 6/11; -34: d_pos 24, d_neg -2, (24 + 2 - 6) / 26 = 10/13.
    """
    chosen, rejected = batch([-10.0], [[-9.0, -30.0, -12.0, -34.0]])
    boundary = torch.tensor([[True, False, True, False]])
    got = dynamic_beta(chosen, rejected, boundary, beta=2.0, margin=6.0)
    expected = [2 * (1 + math.tanh(x) / 2) for x in (-1.25, 6 / 11, -12 / 11, 10 / 13)]
    assert got[0].tolist() == pytest.approx(expected)


def test_without_easy_ones_the_mean_is_over_all() -> None:
    """Chosen -10, rejected -8 and -4, mean -6: d_pos -2, d_neg -2 and d_pos -6, d_neg 2; margin 1, beta 1."""
    chosen, rejected = batch([-10.0], [[-8.0, -4.0]])
    got = dynamic_beta(chosen, rejected, torch.tensor([[True, True]]), beta=1.0, margin=1.0)
    assert got[0].tolist() == pytest.approx([1 + math.tanh(-1 / 4) / 2, 1 + math.tanh(-9 / 8) / 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("margin", "expected"), [(6.0, 0.5), (0.0, 1.0), (-6.0, 1.5)])
def test_both_differences_zero(margin: float, expected: float, dtype: torch.dtype) -> None:
    """One rejected completion as likely as the chosen one is its own mean: the limit, which the losses take."""
    logps = torch.tensor([-10.0], dtype=dtype)
    beta = dynamic_beta(logps, logps[:, None], torch.tensor([[True]]), beta=1.0, margin=margin)
    assert beta.tolist() == [[expected]] and beta.dtype == dtype


def test_gives_no_gradient_and_float32_for_half() -> None:
    chosen, rejected = batch([-10.0], [[-9.0, -30.0]])
    chosen, rejected = chosen.bfloat16().requires_grad_(), rejected.bfloat16().requires_grad_()
    kept = boundary_negatives(chosen, rejected)
    beta = dynamic_beta(chosen, rejected, kept, beta=0.3, margin=6.0)
    assert not kept.requires_grad and not beta.requires_grad and beta.dtype == torch.float32
    # d_pos -1, d_neg 21: (-1 - 21 - 6) / 22
    assert beta[0, 0].item() == pytest.approx(0.3 * (1 + math.tanh(-28 / 22) / 2), rel=1e-6)


def test_dmpo_on_the_boundary_by_hand() -> None:
    """The released DMPO form: -log s of the mean over the boundary of beta_i * (D(y_w) - D(y_i)), reference 0."""
    chosen, rejected = batch([-10.0], [[-9.0, -30.0, -10.0, -34.0]])
    kept = boundary_negatives(chosen, rejected)
    beta = dynamic_beta(chosen, rejected, kept, beta=1.0, margin=6.0)
    zeros = torch.zeros_like(chosen), torch.zeros_like(rejected)
    loss = dmpo_loss(
        policy_chosen_logps=chosen,
        policy_rejected_logps=rejected,
        ref_chosen_logps=zeros[0],
        ref_rejected_logps=zeros[1],
        beta=beta,
        kept=kept,
    ).loss
    # -9: d_pos -1, d_neg 23, so h = -beta_1; -10: d_pos 0, h = 0.
    logit = -(1 + math.tanh(-30 / 24) / 2) / 2
    assert loss.item() == pytest.approx(math.log1p(math.exp(-logit)))


# Refusals


@pytest.mark.parametrize(("chosen", "rejected"), [((3,), (3,)), ((3, 1), (3, 2)), ((2,), (3, 2)), ((3,), (3, 0))])
def test_wrong_shapes_are_refused(chosen: tuple[int, ...], rejected: tuple[int, ...]) -> None:
    for call in (
        lambda: boundary_negatives(torch.zeros(chosen), torch.zeros(rejected)),
        lambda: dynamic_beta(torch.zeros(chosen), torch.zeros(rejected), torch.ones(3, 2) > 0, beta=1.0, margin=6.0),
    ):
        with pytest.raises(ValueError, match=r"must be \[B\] and policy_rejected_logps \[B, N\]"):
            call()


@pytest.mark.parametrize(
    ("boundary", "beta", "message"),
    [
        (torch.ones(3, 2), 1.0, r"boundary must be bool \[3, 2\], got torch.float32 \[3, 2\]"),
        (torch.ones(3, 1) > 0, 1.0, r"boundary must be bool \[3, 2\], got torch.bool \[3, 1\]"),
        (torch.ones(3, 2) > 0, 0.0, "beta must be a positive finite number, got 0.0"),
        (torch.ones(3, 2) > 0, math.nan, "beta must be a positive finite number, got nan"),
    ],
)
def test_unfit_arguments_are_refused(boundary: torch.Tensor, beta: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dynamic_beta(torch.zeros(3), torch.zeros(3, 2), boundary, beta=beta, margin=6.0)
