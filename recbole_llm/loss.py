"""Training losses as pure functions of completion log-probabilities: SFT, DPO, DMPO, S-DPO.

A log-probability here is that of a whole completion given its prompt: the sum over the completion's tokens,
in nats, never divided by its length. The preference losses share one shape, one chosen completion per example
and N rejected ones, so that DPO is the N = 1 case of both DMPO and S-DPO.

Notation: D(y) = log pi(y|x) - log ref(y|x) is the log-ratio of the trained policy to the frozen reference,
y_w the chosen completion, y_1..y_N the rejected ones, s the logistic function. Losses come per example; the
mean over the batch is the caller's.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PreferenceLoss(NamedTuple):
    """What a preference loss returns.

    Attributes:
        loss: [B], nats; differentiable.
        chosen_rewards: [B], nats; beta * D(y_w), detached, for logging.
        rejected_rewards: [B, N], nats; beta * D(y_i), detached, for logging.
    """

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def sft_loss(*, chosen_logps: Tensor) -> Tensor:
    """Negative log-likelihood of the observed completions.

    It grows with the number of tokens. For the usual loss per token, the trainer sums this over the batch and
    divides by the number of supervised tokens (those of every accumulation step and process together).

    Args:
        chosen_logps: [B], nats; log-probability of each completion under the policy.

    Returns:
        [B], nats; at least float32.

    Raises:
        ValueError: `chosen_logps` is not [B] with B >= 1.

    Example:
        >>> sft_loss(chosen_logps=torch.tensor([-3.0, -0.5]))
        tensor([3.0000, 0.5000])
    """
    if chosen_logps.ndim != 1 or len(chosen_logps) == 0:
        raise ValueError(f"chosen_logps must be [B] with B >= 1, got shape {list(chosen_logps.shape)}")
    return -chosen_logps.to(torch.promote_types(chosen_logps.dtype, torch.float32))


def dpo_loss(
    *,
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
) -> PreferenceLoss:
    """Direct preference optimization: -log s(beta * (D(y_w) - D(y_1))).

    Source: Rafailov et al., NeurIPS 2023, arXiv 2305.18290, Eq. 7.

    Args:
        policy_chosen_logps: [B], nats.
        policy_rejected_logps: [B, 1], nats.
        ref_chosen_logps: [B], nats; computed without gradient.
        ref_rejected_logps: [B, 1], nats; computed without gradient.
        beta: strength of the pull towards the reference, > 0.

    Returns:
        Loss and rewards, at least float32. The loss is ln 2 while the policy equals the reference.

    Raises:
        ValueError: the shapes do not fit, N is not 1, or beta is not a positive finite number.

    Example:
        >>> dpo_loss(
        ...     policy_chosen_logps=torch.tensor([-4.0]), policy_rejected_logps=torch.tensor([[-9.0]]),
        ...     ref_chosen_logps=torch.tensor([-5.0]), ref_rejected_logps=torch.tensor([[-8.0]]), beta=0.5,
        ... ).loss
        tensor([0.3133])
    """
    chosen, rejected = _log_ratios(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta
    )
    if rejected.shape[1] != 1:
        raise ValueError(
            f"DPO takes one rejected completion per chosen one, got N = {rejected.shape[1]} "
            f"(rejected log-probs {list(rejected.shape)}). Use SDPO or DMPO for several, or keep one for DPO."
        )
    loss = -F.logsigmoid(beta * (chosen - rejected[:, 0]))
    return PreferenceLoss(loss, beta * chosen.detach(), beta * rejected.detach())


def dmpo_loss(
    *,
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
    pairwise_mean: bool = False,
    reference_free: bool = False,
) -> PreferenceLoss:
    """Direct multi-preference optimization: -log s(beta * (D(y_w) - mean_i D(y_i))).

    In the gradient every rejected completion weighs 1/N, however hard it is.

    Source: arXiv 2405.16127 (CIKM 2024), Eq. 3, as two independent restatements give it. The code released
    with the paper differs in two ways that have a switch here. It also adds the mean token NLL of the chosen
    completion, which is not part of this loss.

    Args:
        policy_chosen_logps: [B], nats.
        policy_rejected_logps: [B, N], nats.
        ref_chosen_logps: [B], nats; computed without gradient.
        ref_rejected_logps: [B, N], nats; computed without gradient.
        beta: strength of the pull towards the reference, > 0.
        pairwise_mean: take the mean outside, mean_i of -log s(beta * (D(y_w) - D(y_i))). The released code
            does: N rejected completions become N rows of plain DPO. By convexity never below the default.
        reference_free: compute the loss with log pi in place of D. The released code does: it subtracts the
            chosen completion's reference on both sides, where it cancels. Rewards stay beta * D.

    Returns:
        Loss and rewards, at least float32. The loss is ln 2 for every N while the policy equals the reference
        (not with `reference_free`).

    Raises:
        ValueError: the shapes do not fit, or beta is not a positive finite number.
    """
    chosen, rejected = _log_ratios(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta
    )
    margins = chosen[:, None] - rejected  # [B, N]
    if reference_free:
        # Cast first: the difference of two long sums of log-probs needs the digits that half precision lacks.
        margins = policy_chosen_logps.to(margins)[:, None] - policy_rejected_logps.to(margins)
    if not pairwise_mean:
        margins = margins.mean(dim=1, keepdim=True)  # [B, 1]
    loss = -F.logsigmoid(beta * margins).mean(dim=1)
    return PreferenceLoss(loss, beta * chosen.detach(), beta * rejected.detach())


def sdpo_loss(
    *,
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
) -> PreferenceLoss:
    """Softmax DPO: -log s(-log sum_i exp(beta * (D(y_i) - D(y_w)))).

    This is the cross-entropy of picking y_w among all 1 + N completions with logits beta * D. In the gradient
    the rejected completions are weighted by a softmax over beta * D(y_i): hard ones count most.

    Source: Chen et al., On Softmax Direct Preference Optimization for Recommendation, NeurIPS 2024,
    arXiv 2406.09215.

    Args:
        policy_chosen_logps: [B], nats.
        policy_rejected_logps: [B, N], nats.
        ref_chosen_logps: [B], nats; computed without gradient.
        ref_rejected_logps: [B, N], nats; computed without gradient.
        beta: strength of the pull towards the reference, > 0.

    Returns:
        Loss and rewards, at least float32. The loss is ln(1 + N) while the policy equals the reference.

    Raises:
        ValueError: the shapes do not fit, or beta is not a positive finite number.
    """
    chosen, rejected = _log_ratios(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta
    )
    # As published, the exp overflows float32 once beta times a rejected completion's lead exceeds 88 nats. It
    # equals log(1 + sum exp), that is logsumexp over {0, ...}, which takes the largest term out before exp.
    logits = F.pad(beta * (rejected - chosen[:, None]), (1, 0))  # [B, 1 + N], the zero in front
    return PreferenceLoss(torch.logsumexp(logits, dim=1), beta * chosen.detach(), beta * rejected.detach())


def rosepo_loss(
    *,
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
    smoothing: Tensor | float,
    robust: bool = False,
) -> PreferenceLoss:
    """Smoothed DPO, mean over pairs of -(1 - eps) * log s(h_i) - eps * log s(-h_i), h_i = beta * (D(y_w) - D(y_i)).

    eps is the probability that the pair's label is wrong, that is that this user would prefer the rejected item. The
    loss has its minimum at h = log((1 - eps) / eps) in place of infinity; eps = 0 is DPO.

    Source: RosePO, arXiv 2410.12519. The paper says: a DPO form smoothed by a personalised factor. Its equation could
    not be read; this is our reading (label smoothing, as in conservative DPO), and ``robust`` the other usual one.

    Args:
        policy_chosen_logps: [B], nats.
        policy_rejected_logps: [B, N], nats.
        ref_chosen_logps: [B], nats; computed without gradient.
        ref_rejected_logps: [B, N], nats; computed without gradient.
        beta: strength of the pull towards the reference, > 0.
        smoothing: eps in [0, 1/2], one number, [B], or [B, N]; computed without gradient.
        robust: the form that is unbiased under wrong labels, [(1 - eps) L(w, i) - eps L(i, w)] / (1 - 2 eps); it may
            be negative, and eps must be below 1/2.

    Returns:
        Loss and rewards, at least float32. The loss is ln 2 while the policy equals the reference.

    Raises:
        ValueError: the shapes do not fit, beta is not a positive finite number, or eps is out of range.
    """
    chosen, rejected = _log_ratios(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta
    )
    eps = torch.as_tensor(smoothing, dtype=rejected.dtype, device=rejected.device).detach()
    if eps.dim() == 1:
        eps = eps[:, None]
    if (
        eps.dim() == 2
        and (eps.shape[0] != rejected.shape[0] or eps.shape[1] not in (1, rejected.shape[1]))
        or eps.dim() > 2
    ):
        raise ValueError(f"smoothing must be a number, [B] or [B, N]; got {list(eps.shape)} for {list(rejected.shape)}")
    if not ((eps >= 0) & (eps < 0.5 if robust else eps <= 0.5)).all():
        raise ValueError(f"smoothing must lie in [0, 1/2{')' if robust else ']'}, got {eps.min():g} to {eps.max():g}")
    h = beta * (chosen[:, None] - rejected)  # [B, N]
    right, wrong = -F.logsigmoid(h), -F.logsigmoid(-h)
    loss = ((1 - eps) * right - eps * wrong) / (1 - 2 * eps) if robust else (1 - eps) * right + eps * wrong
    return PreferenceLoss(loss.mean(dim=1), beta * chosen.detach(), beta * rejected.detach())


def _log_ratios(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Check what all preference losses need; return D(y_w) [B] and D(y_i) [B, N], at least float32."""
    # Broadcasting would take a wrong tensor in silence: [B, N] - [B] is legal if N = B, [B] - [B, 1] always.
    chosen, rejected = list(policy_chosen.shape), list(policy_rejected.shape)
    fits = len(rejected) == 2 and 0 not in rejected and chosen == rejected[:1]
    if not fits or list(ref_chosen.shape) != chosen or list(ref_rejected.shape) != rejected:
        raise ValueError(
            "chosen log-probs must have shape [B], rejected ones [B, N], with B >= 1 and N >= 1; got "
            f"policy_chosen_logps {chosen}, policy_rejected_logps {rejected}, "
            f"ref_chosen_logps {list(ref_chosen.shape)}, ref_rejected_logps {list(ref_rejected.shape)}"
        )
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be a positive finite number, got {beta}")
    dtype = torch.float32
    for logps in (policy_chosen, policy_rejected, ref_chosen, ref_rejected):
        dtype = torch.promote_types(dtype, logps.dtype)
    return policy_chosen.to(dtype) - ref_chosen.to(dtype), policy_rejected.to(dtype) - ref_rejected.to(dtype)


PREFERENCE_LOSSES = {"DPO": dpo_loss, "DMPO": dmpo_loss, "SDPO": sdpo_loss, "RosePO": rosepo_loss}
