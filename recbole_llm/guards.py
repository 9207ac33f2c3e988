"""What would go wrong in silence: a loss that is no number, an adapter that never moved, a file that is another one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recbole_llm.data.prompt import Window
from recbole_llm.data.protocol import Protocol
from recbole_llm.errors import UserError
from recbole_llm.llm.adapter import adapter_state, digest, load_adapter, set_adapter_state
from recbole_llm.policy import WindowPolicy
from recbole_llm.stages import Stage

STOOD_STILL = 1e-3  # nats a pair
LEAST_STEPS = 10  # a shorter stage has hardly begun to move


def refuse_loss(
    total: float, windows: Sequence[Window], stage: Stage, key: str, protocol: Protocol, epoch: int, step: int
) -> None:
    """Raises ``UserError`` for a loss that is no number; the adapters are still those of the step before.

    Args:
        key: the learning rate's, as the user types it.
    """
    dataset = protocol.dataset
    users = sorted({str(dataset.id2token(dataset.uid_field, window.user)) for window in windows})
    kept = f"; the last good epoch is in {stage.folder}" if (stage.folder / "adapter_base.json").is_file() else ""
    raise UserError(
        f"--{key}: the {stage.loss} loss became {total} in epoch {epoch}, step {step} "
        f"(users {', '.join(users[:5])}). Lower it{kept}."
    )


@dataclass(frozen=True)
class Standing:
    """Where a model is: hash of what is trained, and the scores of one window, nats."""

    weights: str
    scores: torch.Tensor

    @classmethod
    def of(cls, model: WindowPolicy, windows: Sequence[Window]) -> Standing:
        """As it is now, by the shortest of these windows: one pass of one prompt."""
        (scores,) = model.reference_logps([min(windows, key=model.prompt.window_size)])
        return cls(digest(adapter_state(model.llm)), torch.tensor(scores))


def check_moved(model: WindowPolicy, before: Standing, stage: Stage, steps: int, key: str) -> None:
    """Whether a stage changed what it trained.

    Args:
        before: when the stage began; of a preference stage, the SFT adapter.
        steps: that it took.
        key: as in ``refuse_loss``.

    Raises:
        UserError: weights or scores are equal to the last bit, or LoRA adds nothing (all its B are zero).
    """
    if not steps or not stage.learning_rate:
        return
    b = [tensor for name, tensor in adapter_state(model.llm).items() if "lora_B" in name]
    now = Standing.of(model, stage.windows)
    if b and not any(bool(tensor.any()) for tensor in b):
        found = "LoRA adds nothing, all its B matrices are zero"
    elif now.weights == before.weights:
        found = "all weights are as they were before"
    elif torch.equal(now.scores, before.scores):
        found = "scores are as they were before, to the last bit"
    else:
        return
    raise UserError(
        f"--{key}={stage.learning_rate:g}: {steps} steps of {stage.loss} trained nothing ({found}), and what was not "
        "trained is not evaluated. The learning rate may be too small for the type of the weights, --warmup_ratio may "
        "leave it at 0, the windows may hold nothing to learn from, or --lora_target_modules may name layers that this "
        "LLM does not use."
    )


def check_saved(model: WindowPolicy, windows: Sequence[Window], folder: Path) -> None:
    """Whether the adapter in a folder is the one in the model: it is read back into a model without any.

    The shortest window is scored before and after; that takes two passes of one prompt.

    Raises:
        UserError: other tensors or other scores; the model has its own adapter again.
    """
    llm, kept, before = model.llm, adapter_state(model.llm), Standing.of(model, windows)
    if any("lora_" in name for name in kept):  # of full weights the tensors alone are compared
        set_adapter_state(llm, {name: torch.zeros_like(tensor) for name, tensor in kept.items()})
    try:
        load_adapter(llm, folder)
        now = Standing.of(model, windows)
    finally:
        set_adapter_state(llm, kept)
    same, off = now.weights == before.weights, float((now.scores - before.scores).abs().max())
    if not same or not off <= 1e-3:
        raise UserError(
            f"{folder}: the adapter that was saved is not the one that was trained ({'equal' if same else 'other'} "
            f"tensors, scores of its shortest window differ by up to {off:.3g} nats). The run does not count; give the "
            "same command again, with another --checkpoint_dir if it comes again."
        )


def standstill(metrics_file: Path, loss: str) -> dict[str, Any]:
    """How far a preference loss came from where it starts: its value while the policy is the reference (ln 2 for DPO).

    Returns:
        ``loss_from_start``: mean over the last tenth of the steps of the distance, nats a pair; and ``stood_still``,
        whether that is below 1e-3 after at least 10 steps.
    """
    lines = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
    moved = [abs(line["loss/from_start"]) for line in lines if line["stage"] == loss]
    last = float(np.mean(moved[-max(1, len(moved) // 10) :])) if moved else 0.0
    return {"loss_from_start": last, "stood_still": len(moved) >= LEAST_STEPS and last < STOOD_STILL}
