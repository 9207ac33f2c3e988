"""Mult-DPO against a sum over all orders of the chosen ones, cross-entropies, S-DPO and hand arithmetic."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F

from recbole_llm.loss import multdpo_loss, sdpo_loss

NAMES = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")


def drawn(p: int, n: int, seed: int = 0, lead: float = 0.0) -> dict[str, torch.Tensor]:
    """Random log-probs of 4 examples in float64; the rejected ones lead by so many nats."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(4, k, generator=generator, dtype=torch.float64) for k in (p, n, p, n)]
    drawn[1] += lead
    return dict(zip(NAMES, drawn, strict=True))


def logits(logps: dict[str, torch.Tensor], beta: float) -> torch.Tensor:
    """beta * D, chosen ones first, [B, P + N]."""
    chosen = logps["policy_chosen_logps"] - logps["ref_chosen_logps"]
    return beta * torch.cat([chosen, logps["policy_rejected_logps"] - logps["ref_rejected_logps"]], dim=1)


def plackett_luce(scores: torch.Tensor, p: int) -> torch.Tensor:
    """-log of the probability that the first p items are drawn first, in any order: draw by draw, all orders, [B]."""
    weights = scores.exp()
    total = torch.zeros(len(scores), dtype=scores.dtype)
    for order in permutations(range(p)):
        probability, left = torch.ones_like(total), weights.sum(dim=1)
        for item in order:
            probability, left = probability * weights[:, item] / left, left - weights[:, item]
        total += probability
    return -total.log()


def test_hand_worked() -> None:
    """Weights 2 and 3 chosen, 5 rejected: -log(2/10) - log(3/10) = log(100 / 6); rewards log 2, log 3 and log 5.

    Drawn in order, 2/10 * 3/8 + 3/10 * 2/7 = 9/56; log(100 / 12) is above log(56 / 9).
    """
    scores = torch.tensor([[2.0, 3.0, 5.0]], dtype=torch.float64).log()
    zero = torch.zeros_like(scores)
    result = multdpo_loss(
        policy_chosen_logps=scores[:, :2],
        policy_rejected_logps=scores[:, 2:],
        ref_chosen_logps=zero[:, :2],
        ref_rejected_logps=zero[:, 2:],
        beta=1.0,
    )
    assert result.loss.item() == pytest.approx(math.log(100 / 6))
    assert result.chosen_rewards.item() == pytest.approx(math.log(6) / 2)
    assert result.rejected_rewards.item() == pytest.approx(math.log(5))
    assert plackett_luce(scores, 2).item() == pytest.approx(math.log(56 / 9))


@pytest.mark.parametrize(("p", "n"), [(1, 1), (2, 1), (2, 5), (4, 3)])
def test_sum_of_cross_entropies(p: int, n: int) -> None:
    """Each chosen one as the label among all P + N."""
    logps = drawn(p, n)
    scores = logits(logps, 0.7)
    expected = sum(F.cross_entropy(scores, torch.full((4,), i), reduction="none") for i in range(p))
    torch.testing.assert_close(multdpo_loss(**logps, beta=0.7).loss, expected)


@pytest.mark.parametrize("n", [1, 4])
def test_one_chosen_completion_is_sdpo(n: int) -> None:
    two_dims = drawn(1, n)
    one_dim = {name: t[:, 0] if "chosen" in name else t for name, t in two_dims.items()}
    expected = sdpo_loss(**one_dim, beta=0.7)
    for logps in (one_dim, two_dims):
        for got, want in zip(multdpo_loss(**logps, beta=0.7), expected, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("p", "n"), [(1, 4), (2, 1), (3, 4), (4, 2)])
def test_start_value_and_rewards(p: int, n: int) -> None:
    logps = drawn(p, n)
    result = multdpo_loss(**logps, beta=0.7)
    scores = logits(logps, 0.7)
    torch.testing.assert_close(result.chosen_rewards, scores[:, :p].mean(dim=1))
    torch.testing.assert_close(result.rejected_rewards, scores[:, p:])
    start = multdpo_loss(**dict(zip(NAMES, [*logps.values()][2:] * 2, strict=True)), beta=0.7)
    torch.testing.assert_close(start.loss, torch.full((4,), p * math.log(p + n), dtype=torch.float64))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("p", "n"), [(2, 1), (2, 6), (3, 3), (5, 2)])
def test_bounds_the_plackett_luce_loss_over_all_orders(p: int, n: int, seed: int) -> None:
    """loss - log P! > Plackett-Luce, strictly for P > 1: so the bound with the constant holds, and without it too."""
    logps = drawn(p, n, seed)
    gap = multdpo_loss(**logps, beta=1.0).loss - math.lgamma(p + 1) - plackett_luce(logits(logps, 1.0), p)
    assert (gap > 1e-3).all()


def test_the_bound_is_tight_for_one_and_where_the_rejected_outweigh() -> None:
    one = drawn(1, 4)
    torch.testing.assert_close(multdpo_loss(**one, beta=1.0).loss, plackett_luce(logits(one, 1.0), 1))
    gaps = []
    for lead in (0.0, 5.0, 10.0, 15.0):
        logps = drawn(3, 4, lead=lead)
        exact = plackett_luce(logits(logps, 1.0), 3)
        gaps.append((multdpo_loss(**logps, beta=1.0).loss - math.log(6) - exact).max().item())
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > 0.1 and 0 <= gaps[-1] < 1e-4


def test_gradcheck_with_a_mask() -> None:
    logps = drawn(3, 4)
    kept = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1], [0, 1, 1, 0]]).bool()
    assert torch.autograd.gradcheck(
        lambda *x: multdpo_loss(**dict(zip(NAMES, x, strict=True)), beta=0.7, kept=kept).loss,
        [t.requires_grad_() for t in logps.values()],
    )


@pytest.mark.parametrize("lost", [-1.0, math.nan, -math.inf, math.inf])
def test_masking_equals_leaving_out(lost: float) -> None:
    logps = drawn(2, 4)
    kept = torch.tensor([True, False, True, False]).repeat(4, 1)
    small = {name: t[:, kept[0]] if "rejected" in name else t for name, t in logps.items()}
    leaf = logps["policy_rejected_logps"].masked_fill(~kept, lost).requires_grad_()
    chosen = logps["policy_chosen_logps"].clone().requires_grad_()
    full = {**logps, "policy_rejected_logps": leaf, "policy_chosen_logps": chosen}
    result = multdpo_loss(**full, beta=0.7, kept=kept)
    torch.testing.assert_close(result.loss, multdpo_loss(**small, beta=0.7).loss)
    result.loss.sum().backward()
    assert (leaf.grad[~kept] == 0).all() and (leaf.grad[kept] > 0).all() and chosen.grad.isfinite().all()


def test_no_overflow_at_huge_log_ratios() -> None:
    """Two chosen ones 2e4 nats above or below, beta 1/2: log 2 each, or 1e4 each; the gradient stays finite."""
    sides = torch.tensor([[1e4, 1e4], [-1e4, -1e4]], requires_grad=True)
    result = multdpo_loss(
        policy_chosen_logps=sides,
        policy_rejected_logps=-sides.detach()[:, :1],
        ref_chosen_logps=torch.zeros(2, 2),
        ref_rejected_logps=torch.zeros(2, 1),
        beta=0.5,
    )
    assert result.loss.tolist() == pytest.approx([2 * math.log(2), 2e4])
    result.loss.sum().backward()
    # Two at the top share the mass, so that nothing moves; at the bottom each is pulled by beta.
    torch.testing.assert_close(sides.grad, torch.tensor([[0.0, 0.0], [-0.5, -0.5]]))


def test_half_precision_is_raised_before_any_arithmetic() -> None:
    half = {name: (3 * t).bfloat16() for name, t in drawn(2, 3).items()}
    got, want = (multdpo_loss(**x, beta=0.3) for x in (half, {k: t.float() for k, t in half.items()}))
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == torch.float32 and torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "shapes",
    [
        ((4, 2), (4, 3), (4, 1), (4, 3)),
        ((4, 2), (4, 3), (4,), (4, 3)),
        ((4, 0), (4, 3), (4, 0), (4, 3)),
        ((4, 2, 1), (4, 3), (4, 2, 1), (4, 3)),
        ((3, 2), (4, 3), (3, 2), (4, 3)),
        ((4, 2), (4,), (4, 2), (4,)),
        ((4, 2), (4, 3), (4, 2), (4, 1)),
    ],
)
def test_wrong_shapes_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \[B\] or \[B, P\], rejected ones \[B, N\]"):
        multdpo_loss(**{name: torch.zeros(shape) for name, shape in zip(NAMES, shapes, strict=True)}, beta=1.0)


def test_a_beta_for_each_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one beta for all completions, got a tensor of shape \[4, 3\]"):
        multdpo_loss(**drawn(2, 3), beta=torch.ones(4, 3))
