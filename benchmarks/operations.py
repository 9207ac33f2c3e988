"""Floating-point operations of a decoder, counted: the limit of what sharing can save.

A token costs 2 operations a weight of the body, a row of the LM head 2 a weight of the head, a pair of a query and
a key it sees 4 a head and its width. Training LoRA adds the gradient of the activations, as much again as the forward
pass (twice that for attention); the frozen weights get none. A reference pass costs one forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from recbole_llm.llm.logps import decoder_and_head


@dataclass(frozen=True)
class Work:
    """What one way of computing forwards: tokens, rows of the LM head, and pairs of query and key."""

    tokens: int
    head_rows: int
    pairs: float


def one_sequence_each(prompt: int, answers: Sequence[int], *, every_row: bool) -> Work:
    """Prompt and answer as one sequence each, padded to the longest; ``every_row``: the head on all positions."""
    width = prompt + max(answers)
    rows = len(answers) * width if every_row else sum(answers)
    return Work(len(answers) * width, rows, len(answers) * width**2 / 2)


def shared_prompt(prompt: int, answers: Sequence[int]) -> Work:
    """The prompt once, answers without their last token, the head where a token is predicted: the least there is."""
    fed = [n - 1 for n in answers]
    pairs = prompt**2 / 2 + sum(n * prompt + n**2 / 2 for n in fed)
    return Work(prompt + sum(fed), 1 + sum(fed), pairs)


def scoring(model: torch.nn.Module, work: Work) -> float:
    """Operations of a forward pass."""
    body, head, attention = _weights(model)
    return 2 * body * work.tokens + 2 * head * work.head_rows + 4 * attention * work.pairs


def lora_step(model: torch.nn.Module, work: Work, *, reference: bool) -> float:
    """Operations of a LoRA step, with a reference pass over the same or none."""
    body, head, attention = _weights(model)
    passes = 3 if reference else 2
    return passes * (2 * body * work.tokens + 2 * head * work.head_rows) + (passes + 1) * 4 * attention * work.pairs


def _weights(model: torch.nn.Module) -> tuple[int, int, int]:
    """Weights of the decoder's layers and of the head, and heads x width x layers; LoRA's own are left out."""
    decoder, head = decoder_and_head(model)
    body = sum(p.numel() for name, p in decoder.layers.named_parameters() if "lora_" not in name and p.dim() == 2)
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return body, head.weight.numel(), config.num_attention_heads * width * config.num_hidden_layers
