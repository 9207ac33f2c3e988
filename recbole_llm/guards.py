"""What would go wrong in silence: a loss that is no number, an adapter that never moved, a file that is another one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recbole_llm.data.prompt import Window
from recbole_llm.data.protocol import Protocol
from recbole_llm.errors import UserError
from recbole_llm.llm.adapter import adapter_state, digest, load_adapter, set_adapter_state
from recbole_llm.llm.pretrained import LLM
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
    raise UserError(
        f"--{key}: the {stage.loss} loss became {total} in epoch {epoch}, step {step} "
        f"(users {', '.join(users[:5])}). Lower it; the last good epoch is in {stage.folder}."
    )


def check_moved(llm: LLM, before: str, stage: Stage, steps: int, key: str) -> None:
    """Whether a stage changed what it trained.

    Args:
        before: ``digest`` of the trained tensors when the stage began; of a preference stage, of the SFT adapter.
        steps: that it took.
        key: as in ``refuse_loss``.

    Raises:
        UserError: the tensors are equal to the last bit, or LoRA still adds nothing (all its B are zero).
    """
    if not steps or not stage.learning_rate:
        return
    state = adapter_state(llm)
    b = [tensor for name, tensor in state.items() if "lora_B" in name]
    adds_nothing = bool(b) and not any(bool(tensor.any()) for tensor in b)
    if not adds_nothing and digest(state) != before:
        return
    found = "LoRA adds nothing, all its B matrices are zero" if adds_nothing else "all weights are as they were before"
    raise UserError(
        f"--{key}={stage.learning_rate:g}: {steps} steps of {stage.loss} trained nothing ({found}), and what was not "
        "trained is not evaluated. The learning rate may be too small for the type of the weights, the windows may "
        "hold nothing to learn from, or --lora_target_modules may name layers that this LLM does not use."
    )


def check_saved(model: WindowPolicy, windows: Sequence[Window], folder: Path) -> None:
    """Whether the adapter in a folder is the one in the model: it is read back into a model without any.

    The shortest window is scored before and after; that takes two passes of one prompt.

    Raises:
        UserError: other tensors or other scores; the model has its own adapter again.
    """
    llm, shortest = model.llm, min(windows, key=model.prompt.window_size)
    kept, scores = adapter_state(llm), _scores(model, shortest)
    if any("lora_" in name for name in kept):  # of full weights the tensors alone are compared
        set_adapter_state(llm, {name: torch.zeros_like(tensor) for name, tensor in kept.items()})
    try:
        load_adapter(llm, folder)
        found = adapter_state(llm)
        same = digest(found) == digest(kept)
        off = float((_scores(model, shortest) - scores).abs().max())
    finally:
        set_adapter_state(llm, kept)
    if not same or not off <= 1e-3:
        raise UserError(
            f"{folder}: the adapter that was saved is not the one that was trained ({'equal' if same else 'other'} "
            f"tensors, scores of its shortest window differ by up to {off:.3g} nats). The run does not count; give the "
            "same command again, with another --checkpoint_dir if it comes again."
        )


def _scores(model: WindowPolicy, window: Window) -> torch.Tensor:
    (logps,) = model.reference_logps([window])
    return torch.tensor(logps)


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
