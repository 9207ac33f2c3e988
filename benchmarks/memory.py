"""Resident memory: the peak of a piece of work, as `plan` watches it, and an estimate for full sequences."""

from __future__ import annotations

from typing import Any

from recbole_llm.memory import GIB
from recbole_llm.probe import PeakMemory

__all__ = ["GIB", "PeakMemory", "step_bytes"]


def step_bytes(config: Any, tokens: int, *, all_logits: bool) -> float:
    """What a float32 LoRA step over so many tokens adds to a process, roughly.

    A layer takes some 28 vectors of the model's width and 5 of the feed-forward's a token, logits of all positions five
    times the vocabulary, holes that the allocator leaves included (fitted to SmolLM2: 3 and 3.8 MB a token).
    """
    layer = 28 * config.hidden_size + 5 * config.intermediate_size
    logits = 5 * config.vocab_size if all_logits else 0
    return 4.0 * tokens * (config.num_hidden_layers * layer + logits)
