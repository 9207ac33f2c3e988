"""Training losses as pure functions of completion log-probabilities: SFT, DPO, DMPO, S-DPO, RosePO, Mult-DPO.

A log-probability here is that of a whole completion given its prompt: the sum over the completion's tokens,
in nats, never divided by its length. The preference losses share one shape, one chosen completion per example
and N rejected ones, so that DPO is the N = 1 case of all of them; Mult-DPO alone takes several chosen ones.

Notation: D(y) = log pi(y|x) - log ref(y|x) is the log-ratio of the trained policy to the frozen reference,
y_w the chosen completion, y_1..y_N the rejected ones, s the logistic function, h_i = beta_i * (D(y_w) - D(y_i)).
Losses come per example; the mean over the batch is the caller's.

What all preference losses take, by name:
    policy_chosen_logps: [B], nats.
    policy_rejected_logps: [B, N], nats.
    ref_chosen_logps, ref_rejected_logps: the same shapes, nats; computed without gradient.
    beta: strength of the pull towards the reference, > 0: one number, or [B, N], one for each rejected completion,
        which gets no gradient.
    kept: [B, N] bool, the rejected completions that take part, at least one in each row; None: all. The others
        change neither loss nor gradient, whatever their log-probs are.

They return a PreferenceLoss, at least float32, and raise ValueError if the shapes do not fit, beta is not positive and
finite, or a row keeps nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_llm.pairs import PreferenceLoss, checked_beta, checked_kept, log_ratios, mean_kept, pairs_of


def sft_loss(*, chosen_logps: Tensor) -> Tensor:
    """Negative log-likelihood of the observed completions: [B] nats in, [B] nats out, at least float32.

    It grows with the number of tokens. For the usual loss per token, the trainer sums this over the batch and
    divides by the number of supervised tokens (those of every accumulation step and process together).

    Raises:
        ValueError: `chosen_logps` is not [B] with B >= 1.
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
    beta: float | Tensor,
    kept: Tensor | None = None,
) -> PreferenceLoss:
    """Direct preference optimization: -log s(h_1). N must be 1. It starts at ln 2, the policy being the reference.

    Source: Rafailov et al., NeurIPS 2023, arXiv 2305.18290, Eq. 7.
    """
    pairs = pairs_of(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, kept)
    if pairs.margins.shape[1] != 1:
        raise ValueError(
            f"DPO takes one rejected completion per chosen one, got N = {pairs.margins.shape[1]} "
            f"(rejected log-probs {list(pairs.margins.shape)}). Use SDPO or DMPO for several, or keep one for DPO."
        )
    return pairs.result(-F.logsigmoid(pairs.margins[:, 0]))


def dmpo_loss(
    *,
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float | Tensor,
    kept: Tensor | None = None,
    pairwise_mean: bool = False,
    reference_free: bool = False,
) -> PreferenceLoss:
    """Direct multi-preference optimization: -log s(mean_i h_i). It starts at ln 2 (not with `reference_free`).

    In the gradient every rejected completion weighs beta_i / N, however hard it is.

    Source: arXiv 2405.16127 (CIKM 2024), Eq. 3, as two independent restatements give it. The code released
    with the paper differs in two ways that have a switch here. It also adds the mean token NLL of the chosen
    completion, which is not part of this loss.

    Args:
        pairwise_mean: take the mean outside, mean_i of -log s(h_i). The released code does: N rejected completions
            become N rows of plain DPO. By convexity never below the default.
        reference_free: compute the loss with log pi in place of D. The released code does: it subtracts the
            chosen completion's reference on both sides, where it cancels. Rewards stay beta * D.
    """
    pairs = pairs_of(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, kept)
    margins = pairs.margins
    if reference_free:
        # Cast first: the difference of two long sums of log-probs needs the digits that half precision lacks.
        gaps = policy_chosen_logps.to(margins)[:, None] - policy_rejected_logps.to(margins)
        margins = (pairs.beta * gaps).masked_fill(~pairs.kept, 0)
    if pairwise_mean:
        return pairs.result(mean_kept(-F.logsigmoid(margins), pairs.kept))
    return pairs.result(-F.logsigmoid(mean_kept(margins, pairs.kept)))


def sdpo_loss(
    *,
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float | Tensor,
    kept: Tensor | None = None,
) -> PreferenceLoss:
    """Softmax DPO: log(1 + sum_i exp(-h_i)). It starts at ln(1 + N), N counting those kept.

    With one beta this is the cross-entropy of picking y_w among all 1 + N completions with logits beta * D. In the
    gradient the rejected completions are weighted by a softmax over beta * D(y_i): hard ones count most.

    Source: Chen et al., On Softmax Direct Preference Optimization for Recommendation, NeurIPS 2024,
    arXiv 2406.09215, there written as -log s(-log sum_i exp(-h_i)).
    """
    pairs = pairs_of(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, kept)
    # As published, the exp overflows float32 once a rejected completion leads by more than 88 nats of reward.
    # logsumexp over {0, ...} takes the largest term out before exp.
    logits = F.pad((-pairs.margins).masked_fill(~pairs.kept, -math.inf), (1, 0))  # [B, 1 + N], the zero in front
    return pairs.result(torch.logsumexp(logits, dim=1))


def rosepo_loss(
    *,
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float | Tensor,
    kept: Tensor | None = None,
    smoothing: Tensor | float,
    robust: bool = False,
) -> PreferenceLoss:
    """Smoothed DPO: mean_i of -(1 - eps) * log s(h_i) - eps * log s(-h_i). It starts at ln 2.

    eps is the probability that the pair's label is wrong, that is that this user would prefer the rejected item. The
    loss has its minimum at h = log((1 - eps) / eps) in place of infinity; eps = 0 is DPO on each pair.

    Source: RosePO, arXiv 2410.12519. The paper says: a DPO form smoothed by a personalised factor. Its equation could
    not be read; this is our reading (label smoothing, as in conservative DPO), and ``robust`` the other usual one.

    Args:
        smoothing: eps in [0, 1/2], one number, [B], or [B, N]; computed without gradient.
        robust: the form that is unbiased under wrong labels, [(1 - eps) L(w, i) - eps L(i, w)] / (1 - 2 eps); it may
            be negative, and eps must be below 1/2.

    Raises:
        ValueError: also if eps is out of range or of another shape.
    """
    pairs = pairs_of(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, kept)
    h, (b, n) = pairs.margins, pairs.margins.shape
    eps = torch.as_tensor(smoothing, dtype=h.dtype, device=h.device).detach()
    if list(eps.shape) not in ([], [b], [b, 1], [b, n]):
        raise ValueError(f"smoothing must be a number, [B] or [B, N]; got {list(eps.shape)} for {[b, n]}")
    if not ((eps >= 0) & (eps < 0.5 if robust else eps <= 0.5)).all():
        raise ValueError(f"smoothing must lie in [0, 1/2{')' if robust else ']'}, got {eps.min():g} to {eps.max():g}")
    eps = eps[:, None] if eps.dim() == 1 else eps
    right, wrong = -F.logsigmoid(h), -F.logsigmoid(-h)
    loss = ((1 - eps) * right - eps * wrong) / (1 - 2 * eps) if robust else (1 - eps) * right + eps * wrong
    return pairs.result(mean_kept(loss, pairs.kept))


def multdpo_loss(
    *,
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
    kept: Tensor | None = None,
) -> PreferenceLoss:
    """Set-wise DPO with P chosen completions: sum_p of -log(w_p / sum_j w_j), w = exp(beta * D), j over all P + N.

    A sum over the chosen ones, not a mean: it starts at P * ln(P + N). P = 1 is S-DPO.

    The loss less log(P!) is never below the Plackett-Luce loss of ranking the P chosen ones first in whatever order,
    -log of the sum over their P! orders: the exact form takes the weights already ranked out of each denominator, this
    one leaves them in. The two are equal for P = 1 and meet as the rejected ones outweigh the chosen ones.

    Source: Mult-DPO, arXiv 2606.10078. Its equation could not be read; this one has the properties that the abstract
    names (that upper bound, S-DPO for one chosen completion).

    Args:
        policy_chosen_logps: [B, P], nats, or [B] for P = 1; ref_chosen_logps alike.
        beta: one number.
    """
    if isinstance(beta, Tensor):
        raise ValueError(f"Mult-DPO takes one beta for all completions, got a tensor of shape {list(beta.shape)}")
    chosen, rejected = log_ratios(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, several_chosen=True
    )
    strength, kept = checked_beta(beta, rejected)[:, :1], checked_kept(kept, rejected)
    chosen_rewards, rejected_rewards = strength * chosen.reshape(len(chosen), -1), strength * rejected
    rivals = torch.cat([chosen_rewards, rejected_rewards.masked_fill(~kept, -math.inf)], dim=1)  # [B, P + N]
    # Subtract first: a chosen completion's own term is then an exact 0, however large the rewards are.
    loss = torch.logsumexp(rivals[:, None, :] - chosen_rewards[:, :, None], dim=2).sum(dim=1)
    return PreferenceLoss(loss, chosen_rewards.detach().mean(dim=1), rejected_rewards.detach())


PREFERENCE_LOSSES: dict[str, Callable[..., PreferenceLoss]] = {
    "DPO": dpo_loss,
    "DMPO": dmpo_loss,
    "SDPO": sdpo_loss,
    "RosePO": rosepo_loss,
    "MultDPO": multdpo_loss,
}
