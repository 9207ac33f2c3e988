"""Users x candidates -> scores: the prompt once, candidates as branches, the LM head on needed positions alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from recbole_llm.data.pair_prompt import PairPrompt
from recbole_llm.data.prompt import Prompt
from recbole_llm.llm.logps import completion_logps


@torch.no_grad()
def candidate_logps(
    model: nn.Module,
    prompt: Prompt | PairPrompt,
    histories: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[int]],
    *,
    token_budget: int,
) -> list[torch.Tensor]:
    """Log-probability of each candidate's whole title, its end included, given the history.

    Args:
        model: a causal LM in evaluation mode.
        histories: item ids for each user, oldest first, already cut to fit.
        candidates: item ids for each user.
        token_budget: tokens of one forward pass; a user's candidates are split where prompt and titles exceed it.

    Returns:
        For each user ``[C]``, nats, in the order of the candidates.
    """
    trees, owner = [], []
    for user, (history, items) in enumerate(zip(histories, candidates, strict=True)):
        for chunk in _chunks(prompt, history, items, token_budget):
            trees.append(prompt.candidate_tree(history, chunk))
            owner.append(user)
    logps = completion_logps(model, trees, token_budget=token_budget)
    return [torch.cat([p for p, o in zip(logps, owner, strict=True) if o == user]) for user in range(len(histories))]


def _chunks(
    prompt: Prompt | PairPrompt, history: Sequence[int], items: Sequence[int], budget: int
) -> list[Sequence[int]]:
    """Candidates in groups whose tree keeps to the budget, at least one each; a pair is asked for together."""
    if isinstance(prompt, PairPrompt):
        return [items]
    used = start = len(prompt.trunk(history))
    chunks, first = [], 0
    for place, item in enumerate(items):
        tokens = len(prompt.answers[item]) - 1  # leaves are not fed
        if used + tokens > budget and place > first:
            chunks.append(items[first:place])
            first, used = place, start
        used += tokens
    return [*chunks, items[first:]]


def normalise(
    logps: torch.Tensor, items: Sequence[int], prompt: Prompt | PairPrompt, norm: str, prior: torch.Tensor | None
) -> torch.Tensor:
    """Scores from title log-probs: ``sum``, ``mean`` a token, or ``pmi``, less the title's log-prob without history.

    Args:
        logps: ``[C]``, nats.
        prior: log-prob of every item's title after an empty history ``[n_items]``, for pmi.
    """
    if norm == "mean":
        return logps / torch.tensor([len(prompt.answers[i]) for i in items], device=logps.device)
    if norm == "pmi":
        return logps - prior[torch.as_tensor(items, device=logps.device)]
    return logps


def rerank(base: torch.Tensor, llm: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """One list from two models: the base model's top-K in the LLM's order, all others behind in the base's order.

    Args:
        base: ``[B, n]``, -inf marks what is no answer.
        llm: scores of the base's top-K ``[B, K]``.
        top: their columns ``[B, K]``.

    Returns:
        ``[B, n]`` scores; ties of either model stay ties.
    """
    behind = -_dense_rank(-base) - 1.0
    scores = torch.where(base == -torch.inf, -torch.inf, behind)
    ahead = _dense_rank(llm).to(scores.dtype)
    kept = base.gather(1, top) == -torch.inf  # a short list: its fill is no answer
    return scores.scatter(1, top, torch.where(kept, -torch.inf, ahead))


def _dense_rank(values: torch.Tensor) -> torch.Tensor:
    """0 for the smallest value of each row, equal values alike ``[B, n]``, float32."""
    ordered, order = values.sort(dim=1)
    step = (ordered[:, 1:] != ordered[:, :-1]).float().cumsum(1)
    rank = torch.cat([torch.zeros_like(step[:, :1]) if step.shape[1] else ordered[:, :1] * 0, step], dim=1)
    return torch.zeros_like(rank).scatter(1, order, rank)
