"""The ways in which title log-probs are computed with transformers alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from recbole_llm.llm.half_precision import autocast
from recbole_llm.llm.logps import decoder_and_head

Asked = tuple[list[int], list[int]]  # tokens of a prompt, tokens of its completion
BETA = 0.1
# What sides with float32 log_softmax may differ by (see logp_by_hand): loss and gradients, relative; title log-probs.
ROUGH, ROUGH_NATS = 1e-4, 1e-3


def sequence_logps(model: torch.nn.Module, asked: Sequence[Asked], head: Literal["all", "last", "titles"]) -> Tensor:
    """Log-prob of each completion ``[N]``, nats, differentiable: one full sequence each, in one padded batch.

    Args:
        head: where logits are computed. *all*: at every position, as the released code of S-DPO and DMPO does;
            *last*: transformers' ``logits_to_keep``, from the last prompt token on; *titles*: at predicting rows alone.
    """
    device = next(model.parameters()).device
    ids, attend = (x.to(device) for x in _padded([before + tokens for before, tokens in asked]))
    wanted = torch.zeros(len(ids), ids.shape[1] - 1, dtype=torch.bool)  # where the next token is of the completion
    for row, (before, tokens) in enumerate(asked):
        wanted[row, len(before) - 1 : len(before) + len(tokens) - 1] = True
    wanted = wanted.to(device)
    if head == "titles":
        decoder, lm_head = decoder_and_head(model)
        with autocast(model):
            hidden = decoder(input_ids=ids, attention_mask=attend, use_cache=False).last_hidden_state[:, :-1]
        logps = lm_head(hidden[wanted]).float().log_softmax(-1).gather(-1, ids[:, 1:][wanted][:, None])[:, 0]
        return torch.zeros(wanted.shape, device=device).masked_scatter(wanted, logps).sum(-1)
    keep = 0 if head == "all" else ids.shape[1] - min(len(before) for before, _ in asked) + 1
    with autocast(model):
        logits = model(input_ids=ids, attention_mask=attend, logits_to_keep=keep, use_cache=False).logits[:, :-1]
    target, wanted = ids[:, -logits.shape[1] :], wanted[:, -logits.shape[1] :]
    logps = logits.float().log_softmax(-1).gather(-1, target[..., None])[..., 0]
    return (logps * wanted).sum(-1)


def in_batches(
    model: torch.nn.Module, asked: Sequence[Asked], head: Literal["all", "last", "titles"], at_once: int = 20
) -> Tensor:
    """The same for so many that their logits do not fit the memory together ``[N]``."""
    parts = [asked[first : first + at_once] for first in range(0, len(asked), at_once)]
    return torch.cat([sequence_logps(model, part, head) for part in parts])


def _padded(sequences: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask ``[N, L]``, padded on the right."""
    longest = max(map(len, sequences))
    rows = [
        (tokens + [0] * (longest - len(tokens)), [1] * len(tokens) + [0] * (longest - len(tokens)))
        for tokens in sequences
    ]
    return torch.tensor([ids for ids, _ in rows]), torch.tensor([mask for _, mask in rows])


def cached_logps(model: torch.nn.Module, prompt: list[int], titles: Sequence[list[int]], at_once: int) -> Tensor:
    """Log-prob of each title ``[N]`` over transformers' KV cache of the prompt, expanded to a batch of titles.

    Args:
        at_once: titles of one batch; they are sorted by length, so that little is padded.
    """
    out = model(input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
    first = out.logits[0, -1].float().log_softmax(-1)
    order = sorted(range(len(titles)), key=lambda i: len(titles[i]))
    found = torch.zeros(len(titles))
    for begin in range(0, len(order), at_once):
        rows = order[begin : begin + at_once]
        last = begin + at_once >= len(order)
        cache = out.past_key_values if last else copy.deepcopy(out.past_key_values)
        found[rows] = _expanded(model, cache, len(prompt), [titles[i] for i in rows], first)
    return found


def _expanded(
    model: torch.nn.Module, cache: Any, prompt: int, titles: Sequence[list[int]], first: Tensor
) -> torch.Tensor:
    cache.batch_repeat_interleave(len(titles))
    ids, own = _padded(titles)
    attend = torch.cat([torch.ones(len(titles), prompt, dtype=torch.long), own], 1)
    places = torch.arange(prompt, prompt + ids.shape[1]).expand(len(titles), -1)
    logits = model(
        input_ids=ids, attention_mask=attend, position_ids=places, past_key_values=cache, use_cache=True
    ).logits
    logps = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return first[ids[:, 0]] + (logps * own[:, 1:]).sum(-1)


# ---- training


def pair_loss(policy: Tensor, reference: Tensor) -> Tensor:
    """Mean of the DPO losses of one chosen completion, the first, against each rejected one; ``[1 + k]`` nats."""
    shift = policy - reference
    return -logsigmoid(BETA * (shift[0] - shift[1:])).mean()


def gradients(model: torch.nn.Module) -> Tensor:
    """The gradients of all trained weights, in the order of their names, one after the other."""
    found = sorted((name, p.grad) for name, p in model.named_parameters() if p.requires_grad)
    return torch.cat([grad.flatten() for _, grad in found])


def stir_adapter(model: torch.nn.Module) -> torch.nn.Module:
    """Give LoRA's B values: fresh ones are 0, the policy would be the reference, and A would get no gradient."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in sorted(model.named_parameters()):
        if "lora_B" in name:
            weight.data.copy_(torch.empty(weight.shape).normal_(0, 0.01, generator=generator))  # alike on a GPU
    return model


def difference(found: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> float:
    """Of losses and gradients: the larger of the two relative errors (gradients by L2 norm)."""
    loss = (found[0] - right[0]).abs() / right[0].abs()
    return max(loss.item(), ((found[1] - right[1]).norm() / right[1].norm()).item())


# ---- what all must equal: one sequence at a time, slow and obvious, and it fits any memory


def logp_by_hand(model: torch.nn.Module, before: list[int], tokens: list[int]) -> Tensor:
    """Log-prob of one completion, nats, float64.

    The log-softmax is taken in float64: torch's float32 one on a CPU is 8e-6 nats a token too high on average for
    a vocabulary of 49,152 (logsumexp: 6e-8), which shows as 2e-5 in the gradients of a preference loss.
    """
    logits = model(input_ids=torch.tensor([before + tokens]), use_cache=False).logits[0, len(before) - 1 : -1]
    logps = logits.double().log_softmax(-1)
    return logps[torch.arange(len(tokens)), torch.tensor(tokens)].sum()


def sft_by_hand(model: torch.nn.Module, asked: Sequence[Asked]) -> tuple[Tensor, Tensor]:
    """SFT loss (nats, summed) and gradients."""
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for before, tokens in asked:
        loss = -logp_by_hand(model, before, tokens)
        loss.backward()
        total += loss.detach()
    return total, gradients(model)


def pairs_by_hand(
    model: torch.nn.Module, groups: Sequence[Sequence[Asked]], reference: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The pair losses of (chosen, rejected...) groups, summed, and gradients."""
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for asked, ref in zip(groups, reference, strict=True):
        with torch.no_grad():
            policy = torch.stack([logp_by_hand(model, *pair) for pair in asked])
        loss = pair_loss(policy.requires_grad_(), ref)
        (weights,) = torch.autograd.grad(loss, policy)
        for pair, weight in zip(asked, weights, strict=True):
            (weight * logp_by_hand(model, *pair)).backward()
        total += loss.detach()
    return total, gradients(model)


@torch.no_grad()
def reference_by_hand(model: torch.nn.Module, asked: Sequence[Asked]) -> Tensor:
    """Log-probs under the model without its adapter ``[N]``."""
    with model.disable_adapter():
        return torch.stack([logp_by_hand(model, *pair) for pair in asked])
