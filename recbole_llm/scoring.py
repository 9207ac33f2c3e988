"""Users x candidates -> scores: the prompt once, candidates as branches, the LM head on needed positions alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from recbole_llm.catalogue import exact_scores
from recbole_llm.data.pair_prompt import PairPrompt
from recbole_llm.data.prompt import Prompt
from recbole_llm.llm.logps import completion_logps
from recbole_llm.llm.prompt_cache import cannot_go_on
from recbole_llm.llm.title_trie import title_trie
from recbole_llm.llm.types import CausalLM
from recbole_llm.title_scores import title_scores


@torch.no_grad()
def candidate_logps(
    model: CausalLM,
    prompt: Prompt | PairPrompt,
    histories: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[int]],
    *,
    token_budget: int,
) -> list[torch.Tensor]:
    """Log-probability of each candidate's whole title, its end included, given the history.

    Users of equal history share one pass of it, and an item that several of them are asked for is scored once.

    Args:
        model: a causal LM in evaluation mode.
        histories: item ids for each user, oldest first, already cut to fit.
        candidates: item ids for each user.
        token_budget: tokens of one forward pass; where prompt and titles exceed it, titles go in several passes below
            the one of the prompt, or with the prompt in each where the model cannot go on from it.

    Returns:
        For each user ``[C]``, nats, in the order of the candidates.
    """
    keys = [_question(prompt, history, items) for history, items in zip(histories, candidates, strict=True)]
    first = _first_of_equal_answers(prompt, candidates)
    asked: dict[tuple[int, ...], dict[int, int]] = {}  # question -> item -> its place among the answers
    for key, items in zip(keys, candidates, strict=True):
        places = asked.setdefault(key, {})
        for item in items:
            places.setdefault(first[item], len(places))
    told = {key: history for key, history in zip(keys, histories, strict=True)}
    goes_on = cannot_go_on(model) is None and not isinstance(prompt, PairPrompt)
    parts: dict[tuple[int, ...], list[torch.Tensor]] = {key: [] for key in asked}
    trees, owners = [], []
    for key, places in asked.items():
        chunks = candidate_chunks(prompt, told[key], list(places), token_budget)
        if len(chunks) > 1 and goes_on:
            parts[key].append(_below_one_prompt(model, prompt, told[key], list(places), token_budget))
            continue
        trees += [prompt.candidate_tree(told[key], chunk) for chunk in chunks]
        owners += [key] * len(chunks)
    for key, logps in zip(owners, completion_logps(model, trees, token_budget=token_budget), strict=True):
        parts[key].append(logps)
    whole = {key: torch.cat(found) for key, found in parts.items()}
    return [whole[key][[asked[key][first[i]] for i in items]] for key, items in zip(keys, candidates, strict=True)]


def _first_of_equal_answers(prompt: Prompt | PairPrompt, candidates: Sequence[Sequence[int]]) -> dict[int, int]:
    """Item -> the item that is scored in its place: some tokenizers read different titles alike, which then tie."""
    items = dict.fromkeys(item for asked in candidates for item in asked)
    if isinstance(prompt, PairPrompt):
        return {item: item for item in items}
    first: dict[tuple[int, ...], int] = {}
    return {item: first.setdefault(tuple(prompt.answers[item]), item) for item in items}


def _below_one_prompt(
    model: CausalLM, prompt: Any, history: Sequence[int], items: Sequence[int], token_budget: int
) -> torch.Tensor:
    """Log-probs of more titles than one pass holds ``[C]``: what the LLM keeps of the prompt serves all passes."""
    trie = title_trie([[], *(prompt.answers[i] for i in items)])
    logps = exact_scores(model, prompt.trunk(history), trie, title_scores(trie), token_budget=token_budget)
    return logps[1:].to(next(model.parameters()).device)


def _question(prompt: Prompt | PairPrompt, history: Sequence[int], items: Sequence[int]) -> tuple[int, ...]:
    """What two users must share to share a pass: the history, and with a pair prompt the candidates that it lists."""
    return (*history, 0, *items) if isinstance(prompt, PairPrompt) else tuple(history)


def candidate_chunks(
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
        assert prior is not None
        return logps - prior[torch.as_tensor(items, device=logps.device)]
    return logps
