"""From log-probs of windows to a preference loss, with the switches that a configuration sets, and what is logged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from recbole.config import Config
from torch import Tensor

from recbole_llm.dynamic import boundary_negatives, dynamic_beta
from recbole_llm.loss import PREFERENCE_LOSSES
from recbole_llm.pairs import PreferenceLoss


def preference_loss(
    config: Config, loss: str, logps: Tensor, reference: Tensor, smoothing: Tensor | None
) -> tuple[PreferenceLoss, dict[str, Tensor]]:
    """A configured loss over pairs.

    Args:
        loss: a key of ``PREFERENCE_LOSSES``.
        logps: the policy's ``[B, P + N]``, nats; P chosen items first (P = ``chosen_num`` for MultDPO, else 1).
        reference: the reference's, likewise.
        smoothing: RosePO's epsilon ``[B, N]``; None = ``smoothing`` of the configuration for all.

    Returns:
        The loss of each pair ``[B]`` and what is logged, each ``[B]``.
    """
    many = config["chosen_num"] if loss == "MultDPO" else 1
    chosen, rejected = logps[:, :many], logps[:, many:]
    options: dict[str, Any] = {"beta": config["beta"], **_own_options(config, loss, smoothing)}
    if loss != "MultDPO":
        chosen = chosen[:, 0]
        options |= _dynamic(config, chosen, rejected)
    result = PREFERENCE_LOSSES[loss](
        policy_chosen_logps=chosen,
        policy_rejected_logps=rejected,
        ref_chosen_logps=reference[:, :many] if loss == "MultDPO" else reference[:, 0],
        ref_rejected_logps=reference[:, many:],
        **options,
    )
    return result, _logged(logps.detach(), reference, many, config["beta"], options.get("kept"))


def _logged(logps: Tensor, reference: Tensor, many: int, beta: float, kept: Tensor | None) -> dict[str, Tensor]:
    """What is logged of each pair ``[B]``; rewards are beta times the log-ratio, over the rejected that take part."""
    shift = logps - reference
    chosen, rejected = shift[:, :many].mean(1), shift[:, many:]
    part = torch.ones_like(rejected) if kept is None else kept.to(rejected)

    def mean(values: Tensor) -> Tensor:
        return (values * part).sum(1) / part.sum(1)

    margin = beta * (chosen[:, None] - rejected)
    logged = {
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * mean(rejected),
        "rewards/margins": mean(margin),
        "rewards/accuracies": mean((margin > 0).to(margin)),
        "logps/chosen": logps[:, :many].mean(1),
        "logps/rejected": mean(logps[:, many:]),
        "logps/chosen_shift": chosen,
        "logps/rejected_shift": mean(rejected),
    }
    return logged if kept is None else {**logged, "boundary_share": part.mean(1)}


def _own_options(config: Config, loss: str, smoothing: Tensor | None) -> Mapping[str, Any]:
    """Switches of one loss alone."""
    if loss == "DMPO":
        return {"pairwise_mean": config["pairwise_mean"], "reference_free": config["reference_free"]}
    if loss == "RosePO":
        return {"smoothing": config["smoothing"] if smoothing is None else smoothing, "robust": config["robust"]}
    return {}


def _dynamic(config: Config, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """DynamicPO's two parts, by the policy's log-probs as they are now."""
    if not (config["boundary_negatives"] or config["dynamic_beta"]):
        return {}
    chosen, rejected = chosen.detach(), rejected.detach()
    if not (torch.isfinite(chosen).all() and torch.isfinite(rejected).all()):
        return {}  # the loss will not be finite either, which the trainer tells
    boundary = boundary_negatives(chosen, rejected)
    found: dict[str, Tensor] = {}
    if config["boundary_negatives"]:
        found["kept"] = boundary
    if config["dynamic_beta"]:
        found["beta"] = dynamic_beta(chosen, rejected, boundary, beta=config["beta"], margin=config["dynamic_margin"])
    return found


class Displacement:
    """Watches the chosen log-prob: a preference loss may push it down while the margin grows (a known failure of DPO).

    It has collapsed when, over the last ``STEPS`` optimizer steps, chosen titles are on average e^5 (150) times less
    likely than under the reference.
    """

    STEPS, LEAST = 10, -5.0  # steps; nats

    def __init__(self) -> None:
        self.recent: list[float] = []
        self.lowest = 0.0
        self.collapsed = False

    def add(self, shift: float) -> bool:
        """Take a step's mean of policy less reference log-prob of the chosen (nats); True when it first collapses."""
        self.recent = [*self.recent[-self.STEPS + 1 :], shift]
        mean = sum(self.recent) / len(self.recent)
        self.lowest = min(self.lowest, mean)
        first = len(self.recent) == self.STEPS and mean < self.LEAST and not self.collapsed
        self.collapsed |= first
        return first

    def facts(self) -> dict[str, Any]:
        """For the record of the stage: last and lowest mean shift (nats), and whether it collapsed."""
        last = sum(self.recent) / len(self.recent) if self.recent else None
        return {"chosen_shift": last, "lowest_chosen_shift": self.lowest, "collapsed": self.collapsed}
