"""What is computed, counted: each token once, the LM head where a token is predicted. No clock, so no excuse.

Every count must equal the smallest there is, in closed form: a change that computes more fails here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from recbole_llm import topk_search
from recbole_llm.catalogue import exact_scores, exact_topk
from recbole_llm.config import PROPERTIES
from recbole_llm.data.prompt import Prompt, Window
from recbole_llm.data.template import load_template
from recbole_llm.llm.logps import batch_logps, completion_logps
from recbole_llm.llm.pretrained import load_llm
from recbole_llm.llm.title_trie import title_trie
from recbole_llm.llm.types import LLM
from recbole_llm.scoring import candidate_logps
from recbole_llm.title_scores import title_scores

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ("red", "blue", "green", "black", "cat", "dog", "fox", "owl", "The", "Return", "of")
TITLES = ["", *(" ".join(np.random.default_rng(i).choice(WORDS, 1 + i % 4)) for i in range(1, 40))]
K = 7


class Counter(TorchDispatchMode):
    """Counts the tokens that are embedded, and the rows that are multiplied with the LM head's weights."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        words, width = model.get_output_embeddings().weight.shape
        self.head, self.tokens, self.head_rows = (words, width), 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "embedding":
            self.tokens += args[1].numel()
        if name == "mm" and args[1].t().shape == self.head:
            self.head_rows += args[0].shape[0]
        if name == "mm" and args[0].shape == self.head:  # words first
            self.head_rows += args[1].shape[1]
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(llm: LLM) -> Iterator[Counter]:
    base = llm.model.get_base_model()
    with Counter(base) as counter:
        yield counter


@pytest.fixture(scope="module")
def llm() -> LLM:
    return load_llm(llm="tiny", device=torch.device("cpu"), seed=0)


def prompt_of(llm: LLM, name: str) -> Prompt:
    return Prompt(load_template(name, PROPERTIES), TITLES, llm.tokenizer)


def below(answers: Sequence[Sequence[int]]) -> int:
    """Tokens of answers that predict another one: all but the last of each."""
    return sum(len(answer) - 1 for answer in answers)


def test_the_counter_counts(llm: LLM) -> None:
    """A plain forward pass embeds every token and runs the head on every row."""
    base = llm.model.get_base_model()
    with counted(llm) as counter, torch.no_grad():
        base(input_ids=torch.zeros(3, 11, dtype=torch.long))
    assert (counter.tokens, counter.head_rows) == (33, 33)


@pytest.mark.parametrize("name", ["stream", "instruct"])
def test_scored_candidates(llm: LLM, name: str) -> None:
    """The prompt once, each title without its last token; one head row for all first tokens."""
    prompt, items = prompt_of(llm, name), list(range(5, 25))
    with counted(llm) as counter:
        candidate_logps(llm.model, prompt, [[1, 2, 3]], [items], token_budget=4096)
    rest = below([prompt.answers[i] for i in items])
    assert counter.tokens == len(prompt.trunk([1, 2, 3])) + rest
    assert counter.head_rows == 1 + rest


def test_users_of_equal_history(llm: LLM) -> None:
    """They share a pass, and what both are asked for is scored once."""
    prompt = prompt_of(llm, "stream")
    with counted(llm) as counter:
        candidate_logps(llm.model, prompt, [[1, 2], [1, 2]], [[5, 6, 7], [7, 8]], token_budget=4096)
    assert counter.tokens == len(prompt.trunk([1, 2])) + below([prompt.answers[i] for i in (5, 6, 7, 8)])


def test_packing_adds_no_token(llm: LLM) -> None:
    """Users of different lengths in one pass, or in several: no padding, whatever the budget."""
    prompt = prompt_of(llm, "instruct")
    histories, items = [[1], [2, 3, 4, 5], [6, 7]], [8, 9, 10]
    trees = [prompt.candidate_tree(history, items) for history in histories]
    least = sum(len(prompt.trunk(h)) + below([prompt.answers[i] for i in items]) for h in histories)
    for budget in (1, 100, 4096):
        with counted(llm) as counter, torch.no_grad():
            completion_logps(llm.model, trees, token_budget=budget)
        assert counter.tokens == least


def step(llm: LLM, prompt: Prompt, window: Window) -> Counter:
    """A training step over a window, counted."""
    llm.model.zero_grad()
    with counted(llm) as counter:
        batch_logps(llm.model, [prompt.window_tree(window)]).sum().backward()
    return counter


def test_instruct_pairs(llm: LLM) -> None:
    """k = 7 rejected titles: tokens of one prompt and eight titles a supervised position, forward and backward."""
    prompt = prompt_of(llm, "instruct")
    window = Window(1, (1, 2, 3, 4), (3,), (tuple(range(10, 10 + K)),))
    counter, answers = step(llm, prompt, window), [prompt.answers[i] for i in (4, *range(10, 10 + K))]
    assert counter.tokens == len(prompt.trunk((1, 2, 3))) + below(answers) == prompt.window_size(window)
    assert counter.head_rows == 1 + below(answers)


def test_stream_sft(llm: LLM) -> None:
    """Every position of a history: the history once, without its last token; a head row for each title token."""
    prompt, items = prompt_of(llm, "stream"), (1, 2, 3, 4, 5, 6)
    window = Window(1, items, tuple(range(1, len(items))))
    counter = step(llm, prompt, window)
    assert counter.tokens == len(prompt.trunk(items)) - 1 == prompt.window_size(window)
    assert counter.head_rows == sum(len(prompt.answers[i]) for i in items[1:])


def test_stream_pairs(llm: LLM) -> None:
    """k = 7 rejected titles at every position: the history once, and the titles; first tokens share a head row."""
    prompt, items = prompt_of(llm, "stream"), (1, 2, 3, 4)
    rejected = tuple(tuple(range(10 + K * t, 10 + K * (t + 1))) for t in range(3))
    window = Window(1, items, (1, 2, 3), rejected)
    counter = step(llm, prompt, window)
    branches = below([prompt.answers[i] for others in rejected for i in others])
    assert counter.tokens == len(prompt.trunk(items)) - 1 + branches == prompt.window_size(window)
    assert counter.head_rows == sum(len(prompt.answers[i]) for i in items[1:]) + branches


# ---- full catalogue


def prefixes(answers: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Distinct beginnings of titles that another token follows: what must be known to score all of them."""
    return sorted({tuple(answer[:n]) for answer in answers for n in range(1, len(answer))})


@torch.no_grad()
def logp(llm: LLM, before: list[int], tokens: Sequence[int]) -> float:
    """Of one completion, by one plain sequence."""
    base = llm.model.get_base_model()
    logps = base(input_ids=torch.tensor([[*before, *tokens]])).logits[0].log_softmax(-1)
    return sum(float(logps[len(before) - 1 + i, token]) for i, token in enumerate(tokens))


def test_full_pass(llm: LLM) -> None:
    """The prompt once and each distinct beginning once, a head row for each, in passes of any size."""
    prompt = prompt_of(llm, "stream")
    trie, told = title_trie(prompt.answers), prompt.trunk([1, 2, 3])
    inner = len(prefixes(prompt.answers[1:]))
    for budget in (5, 4096):
        with counted(llm) as counter:
            exact_scores(llm.model, told, trie, title_scores(trie), token_budget=budget)
        assert (counter.tokens, counter.head_rows) == (len(told) + inner, 1 + inner)


def test_search_expands_what_it_must(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """One node at a time: those beginnings that are no less likely than the K-th best title, and no other.

    No exact search by prefixes can do with fewer: a title below such a beginning could be among the best.
    """
    monkeypatch.setattr(topk_search, "LEAST_ROWS", 1)
    prompt = prompt_of(llm, "stream")
    answers, told, seen = prompt.answers[1:], prompt.trunk([1, 2, 3]), [1, 2, 3]
    trie = title_trie(prompt.answers)
    kth = sorted((logp(llm, told, a) for i, a in enumerate(answers, 1) if i not in seen), reverse=True)[4]
    bounds = {prefix: logp(llm, told, prefix) for prefix in prefixes(answers)}
    must = sum(bound >= kth for bound in bounds.values())
    with counted(llm) as counter:
        _, stats = exact_topk(
            llm.model,
            [told],
            trie,
            title_scores(trie),
            k=5,
            hidden=[np.array(seen)],
            token_budget=4096,
            nodes_at_once=1,
            most_nodes=10**6,
        )
    assert 0 < must < len(bounds)
    assert stats.expansions == [must]
    assert (counter.tokens, counter.head_rows, stats.head_rows) == (len(told) + must, 1 + must, 1 + must)
