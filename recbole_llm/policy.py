"""An LLM as the policy of a training stage: log-probs and losses of windows, whatever their prompts are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from recbole.config import Config

from recbole_llm.data.pair_prompt import PairPrompt
from recbole_llm.data.prompt import Prompt, Window
from recbole_llm.distributed import divided
from recbole_llm.llm.budget import TokenBudget
from recbole_llm.llm.logps import batch_logps, completion_logps
from recbole_llm.llm.sharded import even_passes
from recbole_llm.loss import sft_loss
from recbole_llm.preference import preference_loss


@dataclass(frozen=True)
class LossSum:
    """A loss summed over what it is averaged over, so that steps may be split at will.

    Attributes:
        total: scalar, differentiable, nats.
        count: tokens of chosen answers (SFT) or pairs (preference).
        logged: name -> sum over pairs, a scalar.
    """

    total: torch.Tensor
    count: int
    logged: dict[str, torch.Tensor]


_Module: Any = object  # to a type checker a mixin has whatever the class has that it is mixed into


class WindowPolicy(_Module):
    """Mixed into a module whose ``policy`` is trained on windows of its ``prompt``."""

    config: Config
    policy: torch.nn.Module
    prompt: Prompt | PairPrompt
    budget: TokenBudget

    def window_logps(self, windows: Sequence[Window]) -> torch.Tensor:
        """Log-probs of windows that fit one pass: ``[T, P + k]`` nats over all their targets, chosen first."""
        targets = sum(len(w.targets) for w in windows)
        logps = batch_logps(self.policy, [self.prompt.window_tree(w) for w in windows])
        return self.prompt.combined(logps.view(targets, -1))

    def window_loss(self, windows: Sequence[Window], loss: str) -> LossSum:
        """SFT or a preference loss over windows that fit one pass."""
        logps = self.window_logps(windows)
        if loss == "SFT":
            tokens = sum(n for w in windows for n in self.prompt.chosen_lengths(w))
            return LossSum(sft_loss(chosen_logps=logps[:, 0]).sum(), tokens, {})
        reference = torch.tensor([r for w in windows for r in w.reference], device=logps.device)
        smoothing = [e for w in windows for e in w.smoothing]
        given = torch.tensor(smoothing, device=logps.device) if smoothing else None
        result, logged = preference_loss(self.config, loss, logps, reference, given)
        start, _ = preference_loss(self.config, loss, reference, reference, given)
        logged["loss/from_start"] = (result.loss - start.loss).detach()
        total = result.loss.sum()
        if self.config["sft_weight"]:
            lengths = torch.tensor([n for w in windows for n in self.prompt.chosen_lengths(w)], device=logps.device)
            nll = sft_loss(chosen_logps=logps[:, 0]) / lengths  # mean nats a token of each chosen answer
            total = total + self.config["sft_weight"] * nll.sum()
            logged["sft"] = nll.detach()
        return LossSum(total, len(logps), {name: value.sum() for name, value in logged.items()})

    @torch.no_grad()
    def reference_logps(self, windows: Sequence[Window]) -> list[list[list[float]]]:
        """Log-probs of the policy as it is now, for each window and target: chosen first, then rejected, nats.

        The model is left in evaluation mode: dropout would blur what the loss is measured against.
        """
        self.eval()
        return divided(windows, [self.prompt.window_size(w) for w in windows], self._own_logps)

    def _own_logps(self, windows: Sequence[Window]) -> list[list[list[float]]]:
        trees = [self.prompt.window_tree(w) for w in windows]
        with even_passes(self.policy):
            logps = self.budget.run(lambda tokens: completion_logps(self.policy, trees, token_budget=tokens))
        by_target = [p.view(len(w.targets), -1) for p, w in zip(logps, windows, strict=True)]
        return [self.prompt.combined(p).tolist() for p in by_target]
