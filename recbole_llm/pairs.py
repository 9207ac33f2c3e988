"""What the preference losses share: chosen against rejected completions as checked, masked log-ratios and margins.

Notation and arguments are those of ``loss.py``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class PreferenceLoss(NamedTuple):
    """What a preference loss returns.

    Attributes:
        loss: [B], nats; differentiable.
        chosen_rewards: [B], nats; beta * D(y_w), detached, for logging. Where each rejected completion has its beta,
            their mean over those kept; where there are several chosen completions, the mean over them.
        rejected_rewards: [B, N], nats; beta_i * D(y_i), detached, for logging; also of those not kept.
    """

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class Pairs(NamedTuple):
    """The chosen completion of each example against its rejected ones."""

    margins: Tensor  # [B, N]; h_i, and 0 with gradient 0 where not kept
    beta: Tensor  # [B, N]
    kept: Tensor  # [B, N]
    chosen_rewards: Tensor  # [B]
    rejected_rewards: Tensor  # [B, N]

    def result(self, loss: Tensor) -> PreferenceLoss:
        """A loss of these pairs with their rewards."""
        return PreferenceLoss(loss, self.chosen_rewards, self.rejected_rewards)


def pairs_of(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float | Tensor,
    kept: Tensor | None,
) -> Pairs:
    """Margins, rewards and the checked arguments of a loss with one chosen completion."""
    chosen, rejected = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    beta, kept = checked_beta(beta, rejected), checked_kept(kept, rejected)
    # Masked before any loss: 0 times an infinite slope would be NaN in the gradient.
    margins = (beta * (chosen[:, None] - rejected)).masked_fill(~kept, 0)
    return Pairs(margins, beta, kept, mean_kept(beta, kept) * chosen.detach(), beta * rejected.detach())


def log_ratios(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    several_chosen: bool = False,
) -> tuple[Tensor, Tensor]:
    """Check the shapes; return D of the chosen, in their shape, and of the rejected [B, N], at least float32."""
    # Broadcasting would take a wrong tensor in silence: [B, N] - [B] is legal if N = B, [B] - [B, 1] always.
    chosen, rejected = list(policy_chosen.shape), list(policy_rejected.shape)
    dims = len(rejected) == 2 and (len(chosen) == 1 or several_chosen and len(chosen) == 2)
    fits = dims and chosen[0] == rejected[0] and 0 not in chosen + rejected
    if not fits or list(ref_chosen.shape) != chosen or list(ref_rejected.shape) != rejected:
        raise ValueError(
            f"chosen log-probs must have shape [B]{' or [B, P]' if several_chosen else ''}, rejected ones [B, N], "
            "with B >= 1 and N >= 1; got "
            f"policy_chosen_logps {chosen}, policy_rejected_logps {rejected}, "
            f"ref_chosen_logps {list(ref_chosen.shape)}, ref_rejected_logps {list(ref_rejected.shape)}"
        )
    dtype = torch.float32
    for logps in (policy_chosen, policy_rejected, ref_chosen, ref_rejected):
        dtype = torch.promote_types(dtype, logps.dtype)
    return policy_chosen.to(dtype) - ref_chosen.to(dtype), policy_rejected.to(dtype) - ref_rejected.to(dtype)


def checked_beta(beta: float | Tensor, rejected: Tensor) -> Tensor:
    """Check beta; return it for each rejected completion, [B, N], detached."""
    if not isinstance(beta, Tensor):
        if not 0 < beta < math.inf:
            raise ValueError(f"beta must be a positive finite number, got {beta}")
        return torch.full_like(rejected, beta, requires_grad=False)
    if beta.shape != rejected.shape:
        raise ValueError(f"beta must be a number or [B, N]; got {list(beta.shape)} for {list(rejected.shape)}")
    if not ((beta > 0) & (beta < math.inf)).all():
        raise ValueError(f"beta must be positive and finite, got {beta.min():g} to {beta.max():g}")
    return beta.detach().to(rejected)


def checked_kept(kept: Tensor | None, rejected: Tensor) -> Tensor:
    """Check the mask; return it, or one that keeps all, [B, N]."""
    if kept is None:
        return torch.ones_like(rejected, dtype=torch.bool)
    if kept.dtype != torch.bool or kept.shape != rejected.shape:
        raise ValueError(f"kept must be bool [B, N]; got {kept.dtype} {list(kept.shape)} for {list(rejected.shape)}")
    if not kept.any(dim=1).all():
        raise ValueError(f"kept must be True for one rejected completion a row at least, got {kept.tolist()}")
    return kept


def mean_kept(values: Tensor, kept: Tensor) -> Tensor:
    """Mean over the kept rejected completions: [B, N] in, [B] out."""
    return values.masked_fill(~kept, 0).sum(dim=1) / kept.sum(dim=1)
