"""The only log-softmax of the project: log-probabilities of completions in token trees, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from recbole_llm.llm.attention import FLEX_BLOCK, NAMES, attention_inputs
from recbole_llm.llm.fast_linears import OneDNNLinear, onednn_linear
from recbole_llm.llm.half_precision import autocast
from recbole_llm.llm.token_tree import TokenTree, batch_trees, batches_by_budget
from recbole_llm.llm.types import CausalLM

TARGETS_AT_ONCE = 8192  # the root of a large catalogue has tens of thousands: their embeddings would be GBs


def head_rows_at_once(device: torch.device) -> int:
    """Rows of float32 logits held at a time.

    On a CPU few enough to stay in its cache (24 MiB for 49,152 tokens): a fifth less time than with 512.
    """
    return 128 if device.type == "cpu" else 512


def base_model(model: CausalLM) -> CausalLM:
    """The transformers model itself, without peft's wrapper where it has one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_and_head(model: CausalLM) -> tuple[CausalLM, nn.Linear]:
    """The transformer body and the LM head of a transformers causal LM, LoRA-wrapped or not."""
    base = base_model(model)
    return getattr(base, base.base_model_prefix), base.get_output_embeddings()


def completion_logps(model: CausalLM, trees: Sequence[TokenTree], *, token_budget: int) -> list[torch.Tensor]:
    """Log-probability of each completion of each tree.

    Args:
        model: a causal LM.
        trees: what to score.
        token_budget: tokens of one forward pass; a longer tree goes alone.

    Returns:
        For each tree ``[n_completions]``, nats, float32, differentiable.
    """
    found = [torch.empty(0)] * len(trees)
    for group in batches_by_budget([tree.fed for tree in trees], token_budget):
        logps = batch_logps(model, [trees[i] for i in group])
        for index, part in zip(group, logps.split([trees[i].n_completions for i in group]), strict=True):
            found[index] = part
    return found


def batch_logps(model: CausalLM, trees: Sequence[TokenTree]) -> torch.Tensor:
    """Log-probability of all completions of trees that fit one forward pass ``[sum of n_completions]``, nats."""
    decoder, head = decoder_and_head(model)
    multiple = FLEX_BLOCK if model.config._attn_implementation == NAMES["flex"] else 1
    batch = batch_trees(trees, multiple).to(next(model.parameters()).device)
    with autocast(model):
        hidden = decoder(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            **attention_inputs(batch, model),
        ).last_hidden_state
    logps = token_logps(hidden[0, batch.head_rows], batch.row, batch.target, head, model.config)
    return logps.new_zeros(batch.n_completions).index_add(0, batch.completion, logps)


def logit_scale(config: Any) -> float:
    """What an LLM's logits are multiplied by (Cohere, HyperCLOVA-X), or 1 over what divides them (Granite); else 1."""
    scaling = getattr(config, "logits_scaling", None) or 1
    divides = str(getattr(config, "model_type", "")).startswith("granite")
    return getattr(config, "logit_scale", None) or (1 / scaling if divides else scaling)


def token_logps(
    hidden: torch.Tensor, row: torch.Tensor, target: torch.Tensor, head: nn.Linear, config: Any
) -> torch.Tensor:
    """log p(target | hidden[row]) ``[M]``, never holding more than a chunk of logits, nor of targets' embeddings."""
    if (scale := logit_scale(config)) != 1:
        hidden = hidden * scale  # as good as that of the logits: such heads have no bias
    cap = getattr(config, "final_logit_softcapping", None)
    plain = isinstance(head, nn.Linear) and head.bias is None and not head.weight.requires_grad and cap is None
    if plain:
        normaliser = _LogSumExp.apply(hidden, head.weight, isinstance(head, OneDNNLinear) and head.suits(hidden))
        chunks = zip(row.split(TARGETS_AT_ONCE), target.split(TARGETS_AT_ONCE), strict=True)
        logits = torch.cat([(hidden[r].float() * head.weight[t].float()).sum(-1) for r, t in chunks])
        return _rounded(logits, head.weight.dtype) - normaliser[row]
    parts, at_once = [], head_rows_at_once(hidden.device)
    for first in range(0, len(hidden), at_once):
        mine = (row >= first) & (row < first + at_once)
        chunk = hidden[first : first + at_once]
        parts.append(
            (mine, checkpoint(_chunk_logps, chunk, row[mine] - first, target[mine], head, cap, use_reentrant=False))
        )
    logps = hidden.new_zeros(len(row), dtype=torch.float32)
    for mine, part in parts:
        logps = logps.masked_scatter(mine, part)
    return logps


def _rounded(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a product of this dtype keeps of logits; the gradient is as before.

    The normaliser is of such logits: where a token is sure, two roundings cancel, and one alone puts its log-prob
    above 0.
    """
    return logits + (logits.to(dtype).float() - logits).detach()


def _chunk_logps(
    hidden: torch.Tensor, row: torch.Tensor, target: torch.Tensor, head: nn.Linear, cap: float | None
) -> torch.Tensor:
    logits = head(hidden).float()
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return logits[row, target] - logits.logsumexp(-1)[row]


class _LogSumExp(torch.autograd.Function):
    """logsumexp over the vocabulary of ``hidden @ weight.T`` ``[H]`` for a frozen head.

    The gradient of a row is the expected embedding under its softmax; it is computed beside the value, so that
    neither logits ``[H, V]`` are kept nor the head run again in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, fast: bool) -> torch.Tensor:
        values, expected = [], []
        # Words first: MKL is up to twice as fast where the rows are few and the words are many.
        words_first = hidden.device.type == "cpu" and not fast
        product = onednn_linear if fast else functional.linear
        for chunk in hidden.split(head_rows_at_once(hidden.device)):
            logits = (weight @ chunk.t()).float().t() if words_first else product(chunk, weight).float()
            most = logits.amax(-1)
            shares = logits.sub_(most[:, None]).exp_()  # in place: a second matrix of this size costs as much again
            total = shares.sum(-1)
            values.append(most + total.log())
            if ctx.needs_input_grad[0]:
                mean = product(shares.to(weight.dtype), weight.t())
                expected.append((mean.float() / total[:, None]).to(weight.dtype))
            del logits, shares  # or they would stand beside the next chunk's
        if expected:
            ctx.save_for_backward(torch.cat(expected))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (expected,) = ctx.saved_tensors
        return (grad[:, None] * expected.float()).to(expected.dtype), None, None
