"""RosePO's smoothed loss against closed forms, soft-label cross-entropy and its own identities."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from recbole_llm.loss import dmpo_loss, dpo_loss, rosepo_loss, sdpo_loss


def drawn(n: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "policy_chosen_logps": (4,),
        "policy_rejected_logps": (4, n),
        "ref_chosen_logps": (4,),
        "ref_rejected_logps": (4, n),
    }
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def margins(logps: dict[str, torch.Tensor], beta: float) -> torch.Tensor:
    chosen = logps["policy_chosen_logps"] - logps["ref_chosen_logps"]
    return beta * (chosen[:, None] - (logps["policy_rejected_logps"] - logps["ref_rejected_logps"]))


def test_hand_worked() -> None:
    """h = ln 3, so s(h) = 3/4; eps = 1/4: -(3/4) ln(3/4) - (1/4) ln(1/4) = 0.562335."""
    zero = torch.zeros(1)
    result = rosepo_loss(
        policy_chosen_logps=torch.tensor([math.log(3)]),
        policy_rejected_logps=torch.zeros(1, 1),
        ref_chosen_logps=zero,
        ref_rejected_logps=torch.zeros(1, 1),
        beta=1.0,
        smoothing=0.25,
    )
    assert result.loss.item() == pytest.approx(0.5623351446)


@pytest.mark.parametrize("robust", [False, True])
def test_without_smoothing_it_is_dpo(robust: bool) -> None:
    one, many = drawn(1), drawn(5)
    alone = rosepo_loss(**one, beta=0.3, smoothing=0.0, robust=robust).loss
    for other in (dpo_loss, dmpo_loss, sdpo_loss):
        torch.testing.assert_close(alone, other(**one, beta=0.3).loss)
    torch.testing.assert_close(
        rosepo_loss(**many, beta=0.3, smoothing=0.0, robust=robust).loss,
        dmpo_loss(**many, beta=0.3, pairwise_mean=True).loss,
    )


@pytest.mark.parametrize("shape", [(), (4,), (4, 1), (4, 3)])
def test_equals_soft_label_cross_entropy(shape: tuple[int, ...]) -> None:
    logps = drawn()
    eps = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) / 2
    label = 1 - (eps[:, None] if len(shape) == 1 else eps)
    h = margins(logps, 0.7)
    expected = F.binary_cross_entropy_with_logits(h, label.expand_as(h), reduction="none").mean(1)
    torch.testing.assert_close(rosepo_loss(**logps, beta=0.7, smoothing=eps).loss, expected)


@pytest.mark.parametrize("eps", [0.01, 0.1, 0.3, 0.5])
def test_optimum_is_at_the_log_odds(eps: float) -> None:
    """d loss / d h = s(h) - (1 - eps) vanishes at h* = log((1 - eps) / eps), and the loss rises on both sides."""

    def loss(h: float) -> torch.Tensor:
        chosen = torch.tensor([h], dtype=torch.float64, requires_grad=True)
        zero = torch.zeros(1, dtype=torch.float64)
        value = rosepo_loss(
            policy_chosen_logps=chosen,
            policy_rejected_logps=zero[:, None],
            ref_chosen_logps=zero,
            ref_rejected_logps=zero[:, None],
            beta=1.0,
            smoothing=eps,
        ).loss.sum()
        return value, torch.autograd.grad(value, chosen)[0]

    best = math.log((1 - eps) / eps)
    value, slope = loss(best)
    assert slope.item() == pytest.approx(0, abs=1e-12)
    assert loss(best + 0.1)[0] > value and loss(best - 0.1)[0] > value


def test_robust_form_is_unbiased_under_flipped_labels() -> None:
    """(1 - eps) robust(w, l) + eps robust(l, w) = DPO(w, l)."""
    logps, eps = drawn(1), 0.2
    swapped = {
        "policy_chosen_logps": logps["policy_rejected_logps"][:, 0],
        "policy_rejected_logps": logps["policy_chosen_logps"][:, None],
        "ref_chosen_logps": logps["ref_rejected_logps"][:, 0],
        "ref_rejected_logps": logps["ref_chosen_logps"][:, None],
    }
    right = rosepo_loss(**logps, beta=0.5, smoothing=eps, robust=True).loss
    wrong = rosepo_loss(**swapped, beta=0.5, smoothing=eps, robust=True).loss
    torch.testing.assert_close((1 - eps) * right + eps * wrong, dpo_loss(**logps, beta=0.5).loss)


@pytest.mark.parametrize("robust", [False, True])
def test_gradcheck_start_value_and_no_overflow(robust: bool) -> None:
    logps = drawn()
    inputs = [t.requires_grad_() for t in logps.values()]
    names = list(logps)
    assert torch.autograd.gradcheck(
        lambda *x: rosepo_loss(**dict(zip(names, x, strict=True)), beta=0.5, smoothing=0.1, robust=robust).loss, inputs
    )
    same = {
        **drawn(),
        "ref_chosen_logps": drawn()["policy_chosen_logps"],
        "ref_rejected_logps": drawn()["policy_rejected_logps"],
    }
    torch.testing.assert_close(
        rosepo_loss(**same, beta=0.5, smoothing=0.1, robust=robust).loss,
        torch.full((4,), math.log(2), dtype=torch.float64),
    )
    for huge in (1e4, -1e4):
        chosen = torch.full((1,), huge, requires_grad=True)
        loss = rosepo_loss(
            policy_chosen_logps=chosen,
            policy_rejected_logps=torch.zeros(1, 1),
            ref_chosen_logps=torch.zeros(1),
            ref_rejected_logps=torch.zeros(1, 1),
            beta=1.0,
            smoothing=0.1,
            robust=robust,
        ).loss.sum()
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(chosen.grad).all()


@pytest.mark.parametrize(("smoothing", "robust"), [(-0.1, False), (0.6, False), (0.5, True), (float("nan"), False)])
def test_smoothing_out_of_range_is_refused(smoothing: float, robust: bool) -> None:
    with pytest.raises(ValueError, match="smoothing must lie"):
        rosepo_loss(**drawn(), beta=1.0, smoothing=smoothing, robust=robust)


@pytest.mark.parametrize("shape", [(3,), (4, 2), (1, 3), (4, 3, 1)])
def test_smoothing_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="smoothing must be"):
        rosepo_loss(**drawn(), beta=1.0, smoothing=torch.full(shape, 0.1))


def test_smoothing_gets_no_gradient() -> None:
    eps = torch.full((4,), 0.1, dtype=torch.float64, requires_grad=True)
    logps = {k: v.requires_grad_() for k, v in drawn().items()}
    rosepo_loss(**logps, beta=1.0, smoothing=eps).loss.sum().backward()
    assert eps.grad is None
