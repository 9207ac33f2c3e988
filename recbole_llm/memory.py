"""Peak memory of a run by part, from shapes alone.

Passes are run on torch's ``meta`` device, whose tensors have sizes and no values, while every tensor that comes and
goes is counted. So what autograd keeps, what LoRA copies, and what checkpointing gives up is measured, not modelled,
and an 8B model needs no more than its ``config.json``.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from recbole.config import Config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recbole_llm.llm.logps import base_model, decoder_and_head, head_rows_at_once
from recbole_llm.llm.types import CausalLM
from recbole_llm.machine import machine_bytes

GIB = 2**30
GPU_CONTEXT = 0.5 * GIB  # CUDA's own, before the first tensor
# What allocators hold for each byte of a pass. Between tensors that are kept glibc leaves holes that no aligned block
# of the same size fits into (measured: 1.85); CUDA's allocator rounds.
HELD = {"cpu": 1.85, "cuda": 1.1}
GPU_CLASSES = (8, 16, 24, 40, 80)  # GiB
# States that RecBole's optimizers keep of each trained weight, float32; others of its names are Adam.
OPTIMIZER_STATES = {"sgd": 0, "adagrad": 1, "rmsprop": 1}
# NF4 with double quantisation (bitsandbytes): half a byte, one byte a block of 64, one float32 for 256 blocks.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside and still alive.

    Attributes:
        now, peak: bytes at this moment, and at most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                given.add(leaf.untyped_storage()._cdata)
                self._add(leaf.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.now -= size


class _FusedAttention(torch.autograd.Function):
    """The shapes of a fused attention kernel: it keeps its inputs, its output and a log-sum a query, nothing S x S."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def fused_attention(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Stands for attention in a pass that is only counted (``attend=``); its values mean nothing."""
    return _FusedAttention.apply(query, key, value)


@dataclass(frozen=True)
class Pass:
    """Bytes of a pass of the transformer body: kept for the backward pass, and on top of that at the worst moment."""

    kept: int
    work: int


def body_bytes(model: CausalLM, tokens: int, *, trained: bool, checkpointing: bool = False) -> Pass:
    """Measure one pass over a row of tokens; weights and their gradients are not counted.

    Args:
        model: on the meta device, or a real one; its gradients are dropped.
        trained: with a backward pass.
        checkpointing: with gradient checkpointing.
    """
    decoder, _ = decoder_and_head(model)
    device = next(model.parameters()).device
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight) if weight.requires_grad and trained else None
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    places = torch.arange(tokens, device=device)[None]
    live = LiveBytes()
    with _mode(model, trained, checkpointing), live:
        hidden = decoder(
            input_ids=ids, position_ids=places, use_cache=False, attention_mask=None, attend=fused_attention
        ).last_hidden_state
        kept = live.now if trained else 0
        if trained:
            hidden.sum().backward()
    model.zero_grad(set_to_none=True)
    return Pass(kept, live.peak - kept)


@torch.no_grad()
def kept_bytes(model: CausalLM) -> int:
    """Bytes of the keys and values of one token, all layers together."""
    decoder, _ = decoder_and_head(model)
    sizes = []

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        sizes.append(key.nbytes + value.nbytes)
        return fused_attention(layer, query, key, value, scale)

    token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    decoder(input_ids=token, position_ids=token, use_cache=False, attention_mask=None, attend=attend)
    return sum(sizes)


@contextmanager
def _mode(model: CausalLM, trained: bool, checkpointing: bool) -> Iterator[None]:
    base = base_model(model)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # transformers renames these in version 6
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            base.gradient_checkpointing_disable()
    model.train(trained)  # transformers checkpoints in training mode alone
    try:
        with torch.set_grad_enabled(trained):
            yield
    finally:
        model.eval()


def head_bytes(model: CausalLM, rows: int, device: torch.device, *, trained: bool) -> int:
    """Bytes of the LM head over some rows: a chunk of logits, its float32 copy in half precision, and each row's own.

    A row's own are its hidden state, the gradient that is computed beside its logits, and the float32 products with the
    embedding of its target.
    """
    head = decoder_and_head(model)[1].weight
    logits = 4 if head.dtype == torch.float32 else 4 + head.element_size()
    own = head.element_size() * (2 if trained else 1) + 12
    return min(rows, head_rows_at_once(device)) * head.shape[0] * logits + rows * head.shape[1] * own


def weight_bytes(model: CausalLM, config: Config) -> dict[str, int]:
    """Bytes of the base's weights, adapters, gradients and optimizer state.

    Args:
        model: as ``hollow_llm`` makes it; with ``quantization=4bit`` its linear layers are counted as NF4, embedding
            and LM head in the type of computation.
    """
    head = decoder_and_head(model)[1]
    linear = {m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head}
    base = adapters = trained = 0
    for name, weight in model.named_parameters():
        size = weight.numel() * weight.element_size()
        trained += size if weight.requires_grad else 0
        if ".lora_" in name:
            adapters += size
        elif config["quantization"] == "4bit" and weight in linear:
            base += int(weight.numel() * NF4_BYTES)
        else:
            base += size
    states = OPTIMIZER_STATES.get(config["learner"].lower(), 2)
    return {"weights": base, "adapters": adapters, "gradients": trained, "optimizer": states * trained}


def unpacked_bytes(model: CausalLM, config: Config) -> int:
    """Bytes of the largest linear layer as it is unpacked for a product; 0 without quantisation."""
    if config["quantization"] != "4bit":
        return 0
    head = decoder_and_head(model)[1]
    layers = (m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    return max(m.weight.numel() * m.weight.element_size() for m in layers)


def machine_name(device: torch.device) -> str:
    """The device and what it has."""
    size = machine_bytes(device) / GIB
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {size:.0f} GiB"
    return f"CPU, {torch.get_num_threads()} threads, {size:.0f} GiB"


def process_bytes() -> int:
    """Memory that this process holds now."""
    return psutil.Process().memory_info().rss
