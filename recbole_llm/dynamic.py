"""DynamicPO: which rejected completions a preference loss learns from, and a beta for each of them.

A rejected completion is at the boundary if the policy finds it at least as likely as the chosen one; the others are
easy. With many rejected completions the easy ones make up most of the gradient, and accuracy falls while the loss does.
Both functions look at the policy's log-probs alone, [B] of the chosen and [B, N] of the rejected completions in nats,
and give no gradient. Their results are the ``kept`` and ``beta`` of the losses in loss.py.

Source: DynamicPO, DASFAA 2026, arXiv 2605.00327, and its released code (xingyuHuxingyu/DynamicPO).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def boundary_negatives(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor) -> Tensor:
    """The rejected completions at the boundary, [B, N] bool, at least one in each row.

    They are those whose log-prob is at least the chosen one's. In a row without any they are the likeliest cluster of
    a 3-means on the row's log-probs (of as many clusters as there are distinct log-probs, if fewer). The released code
    asks scikit-learn's KMeans, which may stop at a local optimum; here the clusters are the best ones.

    Raises:
        ValueError: the shapes are not [B] and [B, N] with B >= 1 and N >= 1.
    """
    _check_shapes(policy_chosen_logps, policy_rejected_logps)
    harder = policy_rejected_logps >= policy_chosen_logps[:, None]
    return torch.where(harder.any(dim=1, keepdim=True), harder, _top_cluster(policy_rejected_logps))


@torch.no_grad()
def dynamic_beta(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, boundary: Tensor, *, beta: float, margin: float
) -> Tensor:
    """A beta for each rejected completion, [B, N], between beta / 2 and 3 beta / 2, at least float32.

    beta_i = beta * (1 + tanh((d_pos - d_neg - margin) / (|d_pos| + |d_neg|)) / 2), where d_pos is the chosen log-prob
    less this one, and d_neg this one less the mean of the row's easy ones (of all, if none is easy). If both are 0 the
    fraction is its limit, minus or plus infinity by the sign of the margin, and 0 for a margin of 0: beta_i is then
    beta / 2, 3 beta / 2 or beta. Those that are not at the boundary have a value too; the loss does not read it.

    Args:
        boundary: [B, N] bool, of `boundary_negatives`.
        beta: the mid value, > 0.
        margin: nats; 6 in the released code as it is now, 2 in an earlier state of it.

    Raises:
        ValueError: the shapes do not fit, boundary is not bool, or beta is not a positive finite number.
    """
    _check_shapes(policy_chosen_logps, policy_rejected_logps)
    if boundary.shape != policy_rejected_logps.shape or boundary.dtype != torch.bool:
        wanted = list(policy_rejected_logps.shape)
        raise ValueError(f"boundary must be bool {wanted}, got {boundary.dtype} {list(boundary.shape)}")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be a positive finite number, got {beta}")
    dtype = torch.promote_types(
        torch.promote_types(policy_chosen_logps.dtype, policy_rejected_logps.dtype), torch.float
    )
    chosen, rejected = policy_chosen_logps.to(dtype)[:, None], policy_rejected_logps.to(dtype)
    easy = ~boundary | boundary.all(dim=1, keepdim=True)
    easy_mean = rejected.masked_fill(~easy, 0).sum(dim=1, keepdim=True) / easy.sum(dim=1, keepdim=True)
    above, below = chosen - rejected, rejected - easy_mean
    width = (above.abs() + below.abs()).clamp(min=torch.finfo(dtype).tiny)
    return beta * (1 + torch.tanh((above - below - margin) / width) / 2)


def _top_cluster(values: Tensor) -> Tensor:
    """The cluster of the largest values in each row's best split into at most three, [B, N] bool.

    Clusters of numbers are stretches of the sorted row, so that two cuts say all: every pair of cuts is tried. Of
    splits equally good the one with the smallest top cluster is taken.
    """
    n = values.shape[1]
    ranked = values.double().sort(dim=1, descending=True).values
    sums = (ranked - ranked.mean(dim=1, keepdim=True)).cumsum(dim=1)  # the whole row sums to 0
    # Last places of the top and the middle cluster; the middle and the bottom one may be empty, for rows of one or two.
    first, second = torch.triu_indices(n, n, device=values.device)
    # With the row's mean at 0, the squares within clusters are least where sum^2 / size over clusters is largest.
    between = sums[:, first] ** 2 / (first + 1)
    between += (sums[:, second] - sums[:, first]) ** 2 / (second - first).clamp(min=1)
    between += sums[:, second] ** 2 / (n - 1 - second).clamp(min=1)
    # Rounding must not choose between equals; the pairs are in rising order of the first cut.
    best = (between >= between.amax(dim=1, keepdim=True) * (1 - 1e-12)).int().argmax(dim=1)
    # By value, not by place: a best split parts equal values only where there are fewer distinct ones than clusters.
    # Not <, rather than >=: a NaN then stays in, and the trainer stops at a loss that is not finite.
    return ~(values.double() < ranked.gather(1, first[best][:, None]))


def _check_shapes(chosen: Tensor, rejected: Tensor) -> None:
    if chosen.dim() != 1 or rejected.dim() != 2 or len(chosen) != len(rejected) or 0 in rejected.shape:
        raise ValueError(
            "policy_chosen_logps must be [B] and policy_rejected_logps [B, N], with B >= 1 and N >= 1; "
            f"got {list(chosen.shape)} and {list(rejected.shape)}"
        )
