"""The losses against hand arithmetic, closed forms, each other, and TRL's own DPO loss."""

from __future__ import annotations

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import expit, logsumexp, softmax

from recbole_llm.loss import PREFERENCE_LOSSES, dmpo_loss, dpo_loss, multdpo_loss, rosepo_loss, sdpo_loss, sft_loss

# RosePO has an argument of its own; its values are in test_rosepo_loss.py, those of Mult-DPO in test_multdpo.py.
LOSSES = {**PREFERENCE_LOSSES, "RosePO": partial(rosepo_loss, smoothing=0.1)}

# Every form with several rejected completions, switches included.
MULTI = {
    "SDPO": sdpo_loss,
    "DMPO": dmpo_loss,
    "DMPO-pairs": partial(dmpo_loss, pairwise_mean=True),
    "DMPO-free": partial(dmpo_loss, reference_free=True),
    "DMPO-pairs-free": partial(dmpo_loss, pairwise_mean=True, reference_free=True),
}
# Every form that takes a beta for each rejected completion.
FORMS = {
    "DPO": dpo_loss,
    **MULTI,
    "RosePO": LOSSES["RosePO"],
    "RosePO-robust": partial(rosepo_loss, smoothing=0.1, robust=True),
}
multi = pytest.mark.parametrize("loss_fn", MULTI.values(), ids=MULTI)
ARGUMENTS = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
few = settings(max_examples=40, deadline=None)
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
BETA = st.floats(0.01, 5.0)


def named(policy_chosen, policy_rejected, ref_chosen, ref_rejected, dtype=torch.float64):
    """The four log-prob arguments, from anything tensor-like."""
    given_logps = (policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return {name: torch.as_tensor(x, dtype=dtype) for name, x in zip(ARGUMENTS, given_logps, strict=True)}


def normal(b=3, n=4, dtype=torch.float64, seed=0):
    """Four random tensors of a plausible size, a policy near its reference."""
    draw = np.random.default_rng(seed)
    ref_chosen, ref_rejected = draw.normal(-20, 4, b), draw.normal(-25, 4, (b, n))
    moved_chosen, moved_rejected = draw.normal(0, 2, b), draw.normal(0, 2, (b, n))
    return named(ref_chosen + moved_chosen, ref_rejected + moved_rejected, ref_chosen, ref_rejected, dtype)


def ratios(logps):
    """D(y_w) [B] and D(y_i) [B, N] as numpy."""
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = (logps[name].numpy() for name in ARGUMENTS)
    return policy_chosen - ref_chosen, policy_rejected - ref_rejected


@st.composite
def batches(draw, max_n=5):
    b, n = draw(st.integers(1, 3)), draw(st.integers(1, max_n))
    nats = st.floats(-60, 60, allow_subnormal=False)
    return named(*(draw(arrays(np.float64, shape, elements=nats)) for shape in ((b,), (b, n), (b,), (b, n))))


# Values


def test_hand_worked():
    """One example, two rejected completions, beta = 0.5.

    log-ratios: chosen -4 - -5 = 1; rejected -9 - -8 = -1 and -6 - -9 = 3. Rewards: 0.5; -0.5 and 1.5.

    DPO on the first:  h = 0.5 (1 - -1) = 1, loss log(1 + e^-1) = 0.313262
    DMPO:              mean of -1 and 3 is 1, h = 0, loss ln 2 = 0.693147
    DMPO, pairs:       h = 1 and h = 0.5 (1 - 3) = -1: (0.313262 + 1.313262) / 2 = 0.813262
    DMPO, free:        -4 + 9 = 5 and -4 + 6 = 2, mean 3.5, h = 1.75: log(1 + e^-1.75) = 0.160224
    DMPO, both:        h = 2.5 and h = 1: (0.078890 + 0.313262) / 2 = 0.196076
    S-DPO:             log(1 + e^-1 + e^1) = log 4.086161 = 1.407606
    """
    two = named([-4.0], [[-9.0, -6.0]], [-5.0], [[-8.0, -9.0]])
    expected = {
        "SDPO": 1.407606,
        "DMPO": 0.693147,
        "DMPO-pairs": 0.813262,
        "DMPO-free": 0.160224,
        "DMPO-pairs-free": 0.196076,
    }
    for name, loss_fn in MULTI.items():
        result = loss_fn(**two, beta=0.5)
        assert result.loss.tolist() == pytest.approx([expected[name]], abs=2e-6), name
        assert result.chosen_rewards.tolist() == [0.5]
        assert result.rejected_rewards.tolist() == [[-0.5, 1.5]]
    result = dpo_loss(**named([-4.0], [[-9.0]], [-5.0], [[-8.0]]), beta=0.5)
    assert result.loss.tolist() == pytest.approx([0.313262], abs=1e-6)
    assert result.chosen_rewards.tolist() == [0.5]
    assert result.rejected_rewards.tolist() == [[-0.5]]


def test_sft_is_the_summed_nll():
    """Two completions of log-prob -3 and -0.5 nats cost 3 and 0.5: no mean over examples, no length."""
    logps = torch.tensor([-3.0, -0.5], requires_grad=True)
    loss = sft_loss(chosen_logps=logps)
    assert loss.tolist() == [3.0, 0.5]
    loss.sum().backward()
    assert logps.grad.tolist() == [-1.0, -1.0]


@few
@given(batches(), BETA)
def test_closed_forms(logps, beta):
    """numpy's and scipy's log(1 + e^x) and logsumexp, example by example."""
    chosen, rejected = ratios(logps)
    for b in range(len(chosen)):
        pairs = beta * (chosen[b] - rejected[b])
        values = {
            sdpo_loss: logsumexp(np.append(-pairs, 0.0)),
            dmpo_loss: np.logaddexp(0.0, -pairs.mean()),
            MULTI["DMPO-pairs"]: np.logaddexp(0.0, -pairs).mean(),
        }
        for loss_fn, value in values.items():
            assert loss_fn(**logps, beta=beta).loss[b].item() == pytest.approx(value, rel=1e-9, abs=1e-9)


@few
@given(batches(), BETA)
def test_rewards_are_beta_times_the_log_ratio(logps, beta):
    chosen, rejected = ratios(logps)
    for loss_fn in MULTI.values():
        result = loss_fn(**logps, beta=beta)
        np.testing.assert_allclose(result.chosen_rewards, beta * chosen, rtol=1e-12)
        np.testing.assert_allclose(result.rejected_rewards, beta * rejected, rtol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("n", [1, 3, 15])
def test_start_values(n, beta):
    """A policy equal to its reference: ln 2 for DPO and DMPO whatever N, ln(1 + N) for S-DPO; rewards 0."""
    logps = normal(b=2, n=n)
    logps |= named(*list(logps.values())[2:] * 2)
    starts = {"DPO": math.log(2), "DMPO": math.log(2), "SDPO": math.log(1 + n)}
    for name in ["DPO", "DMPO", "SDPO"] if n == 1 else ["DMPO", "SDPO"]:
        result = LOSSES[name](**logps, beta=beta)
        assert result.loss.tolist() == pytest.approx([starts[name]] * 2, abs=1e-12)
        assert not result.chosen_rewards.any() and not result.rejected_rewards.any()
        assert result.rejected_rewards.shape == (2, n)


# Relations


@few
@given(batches(max_n=1), BETA)
def test_one_rejected_completion_is_dpo(logps, beta):
    expected = dpo_loss(**logps, beta=beta)
    others = [MULTI["SDPO"], MULTI["DMPO"], MULTI["DMPO-pairs"], multdpo_loss, partial(rosepo_loss, smoothing=0.0)]
    for other in others:
        for got, want in zip(other(**logps, beta=beta), expected, strict=True):
            close(got, want)


@few
@given(batches(), BETA)
def test_inequalities(logps, beta):
    """Jensen: DMPO <= mean of pair losses, and S-DPO >= log(1 + N e^-h), h being DMPO's logit."""
    inside, outside = dmpo_loss(**logps, beta=beta).loss, MULTI["DMPO-pairs"](**logps, beta=beta).loss
    softmaxed = sdpo_loss(**logps, beta=beta).loss
    chosen, rejected = ratios(logps)
    bound = np.logaddexp(0.0, math.log(rejected.shape[1]) - beta * (chosen - rejected.mean(axis=1)))
    assert (inside <= outside + 1e-9).all()
    assert (softmaxed.numpy() >= bound - 1e-9).all()


def test_inequalities_are_strict_or_tight():
    """Different rejected log-ratios: strict; equal ones: equality. So the bounds above are the right ones."""
    for rejected, tight in (([[-9.0, -3.0]], False), ([[-6.0, -6.0]], True)):
        logps = named([-4.0], rejected, [-5.0], [[-7.0, -7.0]])
        h = 1.0 - (sum(rejected[0]) / 2 + 7.0)
        gap_dmpo = (MULTI["DMPO-pairs"](**logps, beta=1.0).loss - dmpo_loss(**logps, beta=1.0).loss).item()
        gap_sdpo = sdpo_loss(**logps, beta=1.0).loss.item() - np.logaddexp(0.0, math.log(2) - h)
        for gap in (gap_dmpo, gap_sdpo):
            assert abs(gap) < 1e-12 if tight else gap > 0.1


@few
@given(batches(), BETA, st.randoms(use_true_random=False))
def test_order_of_rejected_completions_does_not_matter(logps, beta, random):
    order = list(range(logps["policy_rejected_logps"].shape[1]))
    random.shuffle(order)
    shuffled = {name: t[:, order] if t.ndim == 2 else t for name, t in logps.items()}
    for loss_fn in MULTI.values():
        before, after = loss_fn(**logps, beta=beta), loss_fn(**shuffled, beta=beta)
        close(after.loss, before.loss)
        close(after.rejected_rewards, before.rejected_rewards[:, order])


@few
@given(batches(), BETA, st.floats(-50, 50))
def test_a_constant_in_all_log_ratios_cancels(logps, beta, constant):
    """The loss stays, while the rewards move by beta * constant. Per example, as a log-partition would be."""
    offset = constant * torch.arange(1.0, 1 + len(logps["ref_chosen_logps"]), dtype=torch.float64)
    moved = logps | {
        "policy_chosen_logps": logps["policy_chosen_logps"] + offset,
        "policy_rejected_logps": logps["policy_rejected_logps"] + offset[:, None],
    }
    for loss_fn in MULTI.values():
        before, after = loss_fn(**logps, beta=beta), loss_fn(**moved, beta=beta)
        close(after.loss, before.loss)
        close(after.chosen_rewards, before.chosen_rewards + beta * offset)


def test_pairwise_mean_is_plain_dpo_on_each_pair():
    logps = normal(b=3, n=4)
    columns = [{k: t[:, [i]] if t.ndim == 2 else t for k, t in logps.items()} for i in range(4)]
    pairs = torch.stack([dpo_loss(**column, beta=0.7).loss for column in columns])
    close(MULTI["DMPO-pairs"](**logps, beta=0.7).loss, pairs.mean(dim=0))
    assert not torch.allclose(dmpo_loss(**logps, beta=0.7).loss, pairs.mean(dim=0))


@pytest.mark.parametrize("pairwise_mean", [False, True])
def test_reference_free_ignores_the_reference_but_for_the_rewards(pairwise_mean):
    """As in the released code: the chosen completion's reference stands on both sides and cancels."""
    logps = normal()
    both_sides = logps | {"ref_rejected_logps": logps["ref_chosen_logps"][:, None].expand(-1, 4)}
    loss_fn = partial(dmpo_loss, beta=0.3, pairwise_mean=pairwise_mean)
    free, full = loss_fn(**logps, reference_free=True), loss_fn(**logps)
    close(free.loss, loss_fn(**both_sides).loss)
    assert not torch.allclose(free.loss, full.loss)
    close(free.chosen_rewards, full.chosen_rewards)
    close(free.rejected_rewards, full.rejected_rewards)


@few
@given(batches(), st.floats(0.01, 1.0))
def test_sdpo_equals_the_published_form_where_that_is_finite(logps, beta):
    """-logsigmoid(-log sum exp(.)): margins of at most 240 nats and beta <= 1 do not overflow float64."""
    chosen, rejected = (torch.from_numpy(r) for r in ratios(logps))
    published = -F.logsigmoid(-torch.log(torch.exp(beta * (rejected - chosen[:, None])).sum(dim=1)))
    close(sdpo_loss(**logps, beta=beta).loss, published)


def test_sdpo_is_finite_where_the_published_form_overflows():
    """float32, one rejected completion 100 nats ahead: e^100 is inf, but the loss is 100."""
    logps = named([-100.0], [[0.0, -100.0]], [0.0], [[0.0, 0.0]], torch.float32)
    assert torch.exp(torch.tensor(100.0)).isinf()
    assert sdpo_loss(**logps, beta=1.0).loss.item() == pytest.approx(100.0)


# A mask, and a beta for each rejected completion

KEPT = torch.tensor([[True, False, True, True], [False, False, True, False], [True, True, True, True]])
BETAS = torch.tensor([[0.2, 0.9, 1.3, 0.4], [1.1, 0.3, 0.6, 0.7], [0.5, 1.5, 0.8, 0.1]], dtype=torch.float64)


def sized(name):
    """Random log-probs, mask and betas for a form: one column for DPO, which cannot leave any out."""
    if name == "DPO":
        return normal(n=1), KEPT[:, 2:3], BETAS[:, 2:3]
    return normal(), KEPT, BETAS


def test_a_beta_for_each_by_hand():
    """D(y_w) = 1; D(y_i) = -1, 3, 7 with betas 1, 1/2, 4, the last not kept: h = 2 and -1.

    DMPO log(1 + e^-0.5); mean of pairs [log(1 + e^-2) + log(1 + e^1)] / 2; S-DPO log(1 + e^-2 + e^1).
    Rewards: chosen (1 + 1/2) / 2; rejected -1, 3/2, 28.
    """
    logps = named([-4.0], [[-9.0, -6.0, -1.0]], [-5.0], [[-8.0, -9.0, -8.0]])
    given_also = {
        "beta": torch.tensor([[1.0, 0.5, 4.0]], dtype=torch.float64),
        "kept": torch.tensor([[True, True, False]]),
    }
    expected = {"DMPO": 0.474077, "DMPO-pairs": 0.720095, "SDPO": 1.349012}
    for name, loss in expected.items():
        result = MULTI[name](**logps, **given_also)
        assert result.loss.tolist() == pytest.approx([loss], abs=2e-6), name
        assert result.chosen_rewards.tolist() == [0.75]
        assert result.rejected_rewards.tolist() == [[-1.0, 1.5, 28.0]]


@pytest.mark.parametrize("name", FORMS)
def test_keeping_all_and_one_beta_everywhere_change_nothing(name):
    logps, kept, _ = sized(name)
    plain = FORMS[name](**logps, beta=0.7)
    same = FORMS[name](**logps, beta=torch.full_like(logps["policy_rejected_logps"], 0.7), kept=torch.ones_like(kept))
    for got, want in zip(same, plain, strict=True):
        close(got, want)


@pytest.mark.parametrize("lost", [-3.0, math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("name", [n for n in FORMS if n != "DPO"])
def test_masking_equals_leaving_out(name, lost):
    """Loss, chosen reward and gradients; whatever stands in the masked places gets an exact zero."""
    logps = normal()
    rejected = logps["policy_rejected_logps"].masked_fill(~KEPT, lost)
    full = {**logps, "policy_rejected_logps": rejected}
    result = FORMS[name](**full, beta=BETAS, kept=KEPT)
    masked_form = partial(FORMS[name], kept=KEPT)
    grad_chosen, grad_rejected = with_gradients(masked_form, full, BETAS)
    assert (grad_rejected[~KEPT] == 0).all()
    for b, keep in enumerate(KEPT):
        row = {k: t[b : b + 1, keep] if t.ndim == 2 else t[b : b + 1] for k, t in logps.items()}
        alone = FORMS[name](**row, beta=BETAS[b : b + 1, keep])
        close(result.loss[b : b + 1], alone.loss)
        close(result.chosen_rewards[b : b + 1], alone.chosen_rewards)
        want_chosen, want_rejected = with_gradients(FORMS[name], row, BETAS[b : b + 1, keep])
        close(grad_chosen[b : b + 1], want_chosen)
        close(grad_rejected[b, keep], want_rejected[0])


@pytest.mark.parametrize("name", FORMS)
def test_gradcheck_with_a_mask_and_betas(name):
    logps, kept, betas = sized(name)
    betas = betas.clone().requires_grad_()
    result = FORMS[name](**logps, beta=betas, kept=kept)
    assert not any(t.requires_grad for t in result), "no gradient reaches beta"
    assert torch.autograd.gradcheck(
        lambda *args: FORMS[name](**dict(zip(ARGUMENTS, args, strict=True)), beta=betas, kept=kept).loss,
        [t.requires_grad_() for t in logps.values()],
    )


# Gradients


def with_gradients(loss_fn, logps, beta):
    """The gradients of the summed loss in the policy's chosen [B] and rejected [B, N] log-probs."""
    leaves = {name: t.clone().requires_grad_(name.startswith("policy")) for name, t in logps.items()}
    result = loss_fn(**leaves, beta=beta)
    result.loss.sum().backward()
    return leaves["policy_chosen_logps"].grad, leaves["policy_rejected_logps"].grad


@pytest.mark.parametrize("name", ["DPO", *MULTI, "SFT"])
def test_gradcheck(name):
    """Automatic against numeric differentiation in float64, in all four arguments."""
    tensors = [t.requires_grad_() for t in normal(b=2, n=1 if name == "DPO" else 3).values()]
    if name == "SFT":
        assert torch.autograd.gradcheck(lambda chosen: sft_loss(chosen_logps=chosen), tensors[:1])
    else:
        loss_fn = dpo_loss if name == "DPO" else MULTI[name]
        assert torch.autograd.gradcheck(
            lambda *args: loss_fn(**dict(zip(ARGUMENTS, args, strict=True)), beta=0.4).loss, tensors
        )


def test_dmpo_weighs_all_rejected_completions_alike():
    """With h the logit: -beta s(-h) on the chosen, beta s(-h) / N on each rejected."""
    logps, beta = normal(n=4), 0.4
    chosen, rejected = ratios(logps)
    push = beta * expit(-beta * (chosen - rejected.mean(axis=1)))
    grad_chosen, grad_rejected = with_gradients(dmpo_loss, logps, beta)
    np.testing.assert_allclose(grad_chosen, -push, rtol=1e-12)
    np.testing.assert_allclose(grad_rejected, np.repeat(push[:, None] / 4, 4, axis=1), rtol=1e-12)


def test_dmpo_pairs_weigh_hard_rejected_completions_more():
    """beta s(-h_i) / N on each: the mean outside keeps each pair's own sigmoid."""
    logps, beta = normal(n=4), 0.4
    chosen, rejected = ratios(logps)
    push = beta * expit(-beta * (chosen[:, None] - rejected)) / 4
    grad_chosen, grad_rejected = with_gradients(MULTI["DMPO-pairs"], logps, beta)
    np.testing.assert_allclose(grad_rejected, push, rtol=1e-12)
    np.testing.assert_allclose(grad_chosen, -push.sum(axis=1), rtol=1e-12)


def test_sdpo_weighs_rejected_completions_by_a_softmax():
    """beta times the probability that a softmax over all 1 + N completions gives to each rejected one."""
    logps, beta = normal(n=4), 0.4
    chosen, rejected = ratios(logps)
    picked = softmax(beta * np.column_stack([chosen, rejected]), axis=1)
    grad_chosen, grad_rejected = with_gradients(sdpo_loss, logps, beta)
    np.testing.assert_allclose(grad_rejected, beta * picked[:, 1:], rtol=1e-12)
    np.testing.assert_allclose(grad_chosen, beta * (picked[:, 0] - 1), rtol=1e-12)
    shares = grad_rejected / grad_rejected.sum(dim=1, keepdim=True)
    np.testing.assert_allclose(shares, softmax(beta * rejected, axis=1), rtol=1e-12)


@pytest.mark.parametrize("name", ["DPO", *MULTI])
def test_no_overflow_at_huge_log_ratios(name):
    """float32, log-ratios of +-1e4: finite everywhere, with the right limits.

    The policy prefers a side by 2e4 nats. If that is the chosen one, loss and gradient are zero; if not, the
    loss is beta * 2e4 and the gradient -beta on the chosen, +beta on the rejected together. float32 has
    steps of 1e-3 at 1e4, and S-DPO's gradient is the exp of such a number: hence the tolerance.
    """
    loss_fn, n = (dpo_loss, 1) if name == "DPO" else (MULTI[name], 3)
    sides = torch.tensor([1e4, -1e4])
    logps = named(sides, -sides[:, None].expand(2, n), torch.zeros(2), torch.zeros(2, n), torch.float32)
    loss = loss_fn(**logps, beta=0.5).loss
    assert loss[0] == 0.0
    assert loss[1].item() == pytest.approx(1e4 + (math.log(3) if name == "SDPO" else 0.0), rel=1e-6)
    grad_chosen, grad_rejected = with_gradients(loss_fn, logps, 0.5)
    assert grad_chosen.tolist() == pytest.approx([0.0, -0.5], rel=1e-3)
    assert grad_rejected.sum(dim=1).tolist() == pytest.approx([0.0, 0.5], rel=1e-3)
    assert grad_rejected.isfinite().all()


@multi
def test_rewards_are_detached_and_the_loss_is_not(loss_fn):
    logps = {name: t.requires_grad_() for name, t in normal().items()}
    result = loss_fn(**logps, beta=0.1)
    assert result.loss.requires_grad
    assert not result.chosen_rewards.requires_grad and not result.rejected_rewards.requires_grad


def test_dpo_rewards_are_detached():
    result = dpo_loss(**{name: t.requires_grad_() for name, t in normal(n=1).items()}, beta=0.1)
    assert result.loss.requires_grad
    assert not result.chosen_rewards.requires_grad and not result.rejected_rewards.requires_grad


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["DPO", *MULTI])
def test_half_precision_is_raised_before_any_arithmetic(name, dtype):
    """Bit-equal to float32 arithmetic on the same, already rounded numbers; gradients come back in half."""
    loss_fn, n = (dpo_loss, 1) if name == "DPO" else (MULTI[name], 3)
    half = normal(n=n, dtype=dtype)
    # Numbers within a factor of two subtract exactly even in half precision, which would hide a late cast.
    half |= {name: 0.3 * half[name] for name in ("ref_chosen_logps", "ref_rejected_logps")}
    got, want = loss_fn(**half, beta=0.3), loss_fn(**{k: t.float() for k, t in half.items()}, beta=0.3)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs)
    assert with_gradients(loss_fn, half, 0.3)[1].dtype == dtype


@multi
def test_mixed_dtypes_take_the_widest(loss_fn):
    logps = normal()
    logps["policy_rejected_logps"] = logps["policy_rejected_logps"].bfloat16()
    result = loss_fn(**logps, beta=0.3)
    assert {t.dtype for t in result} == {torch.float64}
    exact = loss_fn(**{name: t.double() for name, t in logps.items()}, beta=0.3)
    assert torch.equal(result.loss, exact.loss)


@pytest.mark.parametrize(
    ("given_dtype", "kept"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_sft_dtype(given_dtype, kept):
    assert sft_loss(chosen_logps=torch.tensor([-2.0], dtype=given_dtype)).dtype == kept


# Refusals

# The shapes of the four arguments, and what the message must name. Right would be (2,), (2, 1), (2,), (2, 1).
WRONG_SHAPES = {
    "rejected 1-D": ([(2,), (2,), (2,), (2,)], r"policy_rejected_logps \[2\]"),
    "rejected 3-D": ([(2,), (2, 1, 1), (2,), (2, 1, 1)], r"policy_rejected_logps \[2, 1, 1\]"),
    "no rejected": ([(2,), (2, 0), (2,), (2, 0)], r"N >= 1.*policy_rejected_logps \[2, 0\]"),
    "no examples": ([(0,), (0, 1), (0,), (0, 1)], r"B >= 1.*policy_chosen_logps \[0\]"),
    "B differs": ([(3,), (2, 1), (3,), (2, 1)], r"policy_chosen_logps \[3\], policy_rejected_logps \[2, 1\]"),
    "chosen 2-D": ([(2, 1), (2, 1), (2, 1), (2, 1)], r"policy_chosen_logps \[2, 1\]"),
    "chosen 0-D": ([(), (2, 1), (), (2, 1)], r"policy_chosen_logps \[\]"),
    "ref chosen 0-D": ([(2,), (2, 1), (), (2, 1)], r"ref_chosen_logps \[\]"),
    "ref chosen 2-D": ([(2,), (2, 1), (2, 1), (2, 1)], r"ref_chosen_logps \[2, 1\]"),
    "ref chosen B": ([(2,), (2, 1), (1,), (2, 1)], r"ref_chosen_logps \[1\]"),
    "ref rejected N": ([(2,), (2, 1), (2,), (2, 3)], r"ref_rejected_logps \[2, 3\]"),
    "ref rejected B": ([(2,), (2, 1), (2,), (1, 1)], r"ref_rejected_logps \[1, 1\]"),
}


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "MultDPO"])
@pytest.mark.parametrize(("shapes", "message"), WRONG_SHAPES.values(), ids=WRONG_SHAPES)
def test_wrong_shapes_are_refused(name, shapes, message):
    """Most of these would broadcast without a word."""
    with pytest.raises(ValueError, match=message):
        LOSSES[name](**named(*(torch.zeros(shape) for shape in shapes)), beta=0.1)


@multi
def test_the_chosen_reference_in_place_of_the_rejected_is_refused(loss_fn):
    """The slip in DMPO's released code. With B = N the shapes would even broadcast."""
    logps = normal(b=3, n=3)
    logps["ref_rejected_logps"] = logps["ref_chosen_logps"]
    with pytest.raises(ValueError, match=r"ref_rejected_logps \[3\]"):
        loss_fn(**logps, beta=0.1)


def test_dpo_refuses_several_rejected_completions():
    with pytest.raises(ValueError, match=r"N = 3 .*\[2, 3\].* Use SDPO or DMPO"):
        dpo_loss(**normal(b=2, n=3), beta=0.1)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan, math.inf])
def test_beta_must_be_positive_and_finite(name, beta):
    with pytest.raises(ValueError, match=f"beta must be a positive finite number, got {beta}"):
        LOSSES[name](**normal(n=1), beta=beta)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": torch.ones(3)}, r"beta must be a number or \[B, N\]; got \[3\] for \[3, [14]\]"),
        ({"beta": torch.tensor(0.5)}, r"beta must be a number or \[B, N\]; got \[\]"),
        ({"beta": 0.0}, "beta must be positive and finite, got 0 to 1"),
        ({"beta": math.inf}, "beta must be positive and finite, got 1 to inf"),
        ({"beta": math.nan}, "beta must be positive and finite"),
        ({"kept": torch.tensor([True, False, True])}, r"kept must be bool \[B, N\]; got torch.bool \[3\]"),
        ({"kept": torch.ones(3, 4, dtype=torch.long)}, r"kept must be bool \[B, N\]; got torch.int64"),
        ({"kept": False}, "kept must be True for one rejected completion a row at least"),
    ],
)
def test_unfit_masks_and_betas_are_refused(name, change, message):
    """One bad entry is enough: the last row's beta, or the last row of the mask."""
    logps, kept, betas = sized(name)
    rest = {"beta": torch.ones_like(betas), "kept": torch.ones_like(kept)}
    for key, value in change.items():
        if not isinstance(value, torch.Tensor):
            rest[key][-1] = value
            change = {key: rest[key]}
    with pytest.raises(ValueError, match=message):
        FORMS[name](**logps, **(rest | change))


@pytest.mark.parametrize("shape", [(), (0,), (2, 1)])
def test_sft_refuses_wrong_shapes(shape):
    with pytest.raises(ValueError, match="chosen_logps must be"):
        sft_loss(chosen_logps=torch.zeros(shape))


@pytest.mark.parametrize("name", LOSSES)
def test_arguments_have_names(name):
    """Four tensors in a row are easy to swap, so positions are not accepted."""
    with pytest.raises(TypeError, match="positional"):
        LOSSES[name](*normal(n=1).values(), 0.1)


# An independent source


def completion_logps(model, input_ids, completion_mask):
    """Plain sums of log-softmax over the completion's tokens, [2B]: chosen first, then rejected."""
    logps = torch.log_softmax(model(input_ids).logits[:, :-1].double(), dim=-1)
    logps = logps.gather(2, input_ids[:, 1:, None])[..., 0]
    return (logps * completion_mask[:, 1:]).sum(dim=1)


@pytest.fixture(scope="module")
def trl_batch(tmp_path_factory):
    """TRL's trainer on tiny random models, one batch of its loader, and untouched copies of both models."""
    reason = "TRL is an optional, independent source of the DPO loss"
    trl = pytest.importorskip("trl", reason=reason, exc_type=ImportError)
    datasets = pytest.importorskip("datasets", reason=reason)
    import tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefgh"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.5,
    )
    policy, ref = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    copies = copy.deepcopy(policy), copy.deepcopy(ref)
    rows = [
        {"prompt": "a b c", "chosen": " d e", "rejected": " f"},
        {"prompt": "h", "chosen": " a", "rejected": " b c d e"},
        {"prompt": "c c g a", "chosen": " h h h", "rejected": " g h"},
    ]
    trainer = trl.DPOTrainer(
        model=policy,
        ref_model=ref,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(rows),
        args=trl.DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            beta=0.3,
            loss_type="sigmoid",
            report_to="none",
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=len(rows),
        ),
    )
    return trainer, next(iter(trainer.get_train_dataloader())), *copies


@pytest.mark.parametrize("name", ["DPO", "DMPO", "SDPO"])
def test_against_trl(trl_batch, name):
    """Loss and every parameter's gradient equal those of TRL's sigmoid DPO loss on the same batch."""
    trainer, batch, policy, ref = trl_batch
    trainer.model.zero_grad()
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()

    policy.zero_grad()
    ids, mask = batch["input_ids"], batch["completion_mask"]
    policy_logps = completion_logps(policy, ids, mask).chunk(2)
    with torch.no_grad():
        ref_logps = completion_logps(ref, ids, mask).chunk(2)
    ours = LOSSES[name](
        policy_chosen_logps=policy_logps[0],
        policy_rejected_logps=policy_logps[1][:, None],
        ref_chosen_logps=ref_logps[0],
        ref_rejected_logps=ref_logps[1][:, None],
        beta=0.3,
    )
    ours.loss.mean().backward()

    assert abs(theirs.item() - math.log(2)) > 0.1, "policy and reference must differ, or any beta would pass"
    assert ours.loss.mean().item() == pytest.approx(theirs.item(), rel=1e-5)
    gradients = dict(trainer.model.named_parameters())
    for key, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key].grad, rtol=1e-4, atol=1e-6)
    assert max(p.grad.abs().max() for p in policy.parameters()) > 0.01
