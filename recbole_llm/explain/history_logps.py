"""The same answers after many histories: histories that begin alike share their beginning in one token tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from recbole_llm.data.pair_prompt import PairPrompt
from recbole_llm.data.prompt import Prompt
from recbole_llm.llm.logps import completion_logps
from recbole_llm.llm.token_tree import TokenTree, TreeBuilder
from recbole_llm.progress import bar
from recbole_llm.scoring import candidate_chunks

History = tuple[int, ...]  # item ids, oldest first


@dataclass(frozen=True)
class Question:
    """What comes after every history: tokens up to the answer, and the tokens of each answer."""

    suffix: list[int]
    answers: list[list[int]]

    def size(self) -> int:
        """Tokens of it that go through the model: leaves are not fed."""
        return len(self.suffix) + sum(len(answer) - 1 for answer in self.answers)


def question(prompt: Prompt | PairPrompt, items: Sequence[int]) -> Question:
    """The question whose answer i is item i; of a pair prompt the answer that puts item i first.

    Raises:
        ValueError: a pair prompt and not two items.
    """
    if not isinstance(prompt, PairPrompt):
        return Question(prompt.suffix, [prompt.answers[item] for item in items])
    if len(items) != 2:
        raise ValueError(f"a pair prompt ranks two candidates, not {len(items)}")
    first, second = items
    answers = [prompt.answer(first, second), prompt.answer(second, first)]
    return Question(prompt.suffix + prompt.listing(first, second), answers)


@torch.no_grad()
def answer_token_logps(
    model: nn.Module,
    prompt: Prompt | PairPrompt,
    histories: Sequence[History],
    items: Sequence[int],
    *,
    token_budget: int,
    show_progress: bool = False,
) -> list[list[torch.Tensor]]:
    """Log-prob of every token of each item's answer after each history.

    Args:
        model: a causal LM in evaluation mode.
        histories: already cut to fit, repeats allowed.
        items: of a pair prompt its two candidates as they are listed.
        token_budget: tokens of one forward pass; histories that do not fit one tree go into several, items too.

    Returns:
        For each history and item ``[T]``, nats, float32 on the CPU.
    """
    chunks = candidate_chunks(prompt, max(histories, key=len), items, token_budget)
    if len(chunks) > 1:
        told = [
            answer_token_logps(model, prompt, histories, chunk, token_budget=token_budget, show_progress=show_progress)
            for chunk in chunks
        ]
        return [[logps for part in parts for logps in part] for parts in zip(*told, strict=True)]
    asked, distinct = question(prompt, items), sorted(set(histories))
    groups = _groups(prompt, distinct, asked.size(), token_budget)
    rows = []
    for group in bar(iterable=groups, desc="Histories", unit="pass", leave=False, disable=not show_progress):
        (logps,) = completion_logps(model, [history_tree(prompt, group, asked)], token_budget=token_budget)
        rows.append(logps.cpu())
    lengths = [len(answer) for answer in asked.answers]
    by_history = torch.cat(rows).view(len(distinct), sum(lengths))
    found = {history: list(row.split(lengths)) for history, row in zip(distinct, by_history, strict=True)}
    return [found[history] for history in histories]


def summed(answers: Sequence[torch.Tensor]) -> np.ndarray:
    """Log-probs of whole answers ``[I]`` from those of their tokens, nats."""
    return np.array([float(logps.double().sum()) for logps in answers])


def history_tree(prompt: Prompt | PairPrompt, histories: Sequence[History], asked: Question) -> TokenTree:
    """One tree of several histories, each with the question behind it.

    Args:
        histories: distinct and sorted, so that those that begin alike stand together.

    Returns:
        A tree whose completions are single tokens: history after history, answer after answer, token after token.
    """
    tree = TreeBuilder()
    path: History = ()
    ends = [tree.chain(-1, prompt.prefix)[-1]]  # the node after so many items of the path
    for history in histories:
        shared = _shared(path, history)
        del ends[shared + 1 :]
        for item in history[shared:]:
            ends.append(tree.chain(ends[-1], prompt.lines[item])[-1])
        end = tree.chain(ends[-1], asked.suffix)[-1] if asked.suffix else ends[-1]
        for answer in asked.answers:
            for node in tree.chain(end, answer):
                tree.completion([node])
        path = history
    return tree.build()


def _groups(
    prompt: Prompt | PairPrompt, histories: Sequence[History], question_size: int, budget: int
) -> list[list[History]]:
    """Sorted histories in groups whose trees keep to the budget, at least one history each."""
    groups: list[list[History]] = []
    used = 0
    for history in histories:
        shared = _shared(groups[-1][-1], history) if groups else 0
        more = sum(len(prompt.lines[item]) for item in history[shared:]) + question_size
        if groups and used + more <= budget:
            groups[-1].append(history)
            used += more
        else:
            groups.append([history])
            used = len(prompt.prefix) + sum(len(prompt.lines[item]) for item in history) + question_size
    return groups


def _shared(one: History, other: History) -> int:
    """How many items two histories begin with together."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
