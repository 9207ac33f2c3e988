"""Windows of histories: every position once, rejected branches, and equality with one row at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_llm.config import PROPERTIES, LLMConfig
from recbole_llm.data.prompt import Prompt, Window
from recbole_llm.data.protocol import prepare_data
from recbole_llm.data.template import load_template
from recbole_llm.data.windows import training_windows
from recbole_llm.llm.tiny import tiny_llm
from recbole_llm.model.llmranker import LLMRanker

TEXTS = ["", *(f"{c} {a}" for c in ("red", "blue", "dark green") for a in ("cat", "dog", "elephant"))]


def prompt_of(family: str) -> Prompt:
    return Prompt(load_template(family, PROPERTIES), TEXTS, tiny_llm()[1])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=25),
    st.integers(1, 8),
    st.integers(0, 6),
    st.integers(40, 400),
    st.sampled_from(["stream", "instruct"]),
)
def test_each_position_is_trained_once_and_never_cut(
    items: list[int], history: int, last: int, most: int, family: str
) -> None:
    prompt = prompt_of(family)
    windows = training_windows(
        {7: np.array(items)}, prompt, history=history, last=last, most_tokens=max(most, prompt.longest(1))
    )
    trained = [(w.items[t], len(w.items[:t])) for w in windows for t in w.targets]
    first = max(1, len(items) - last) if last else 1
    assert [item for item, _ in trained] == items[first:]
    for window in windows:
        assert max(window.targets) <= history or family == "instruct"
        assert (
            len(prompt.trunk(window.items)) <= max(most, prompt.longest(1))
            or len(window.items) == 2
            or family == "instruct"
        )
        if family == "instruct":  # the history is the run of items right before the target
            end = first + [id(w) for w in windows].index(id(window))
            assert list(window.items[:-1]) == items[end - len(window.items) + 1 : end]


@pytest.fixture
def ranker(tiny: dict[str, Any]) -> LLMRanker:
    config = LLMConfig(config_dict=tiny | {"finetune": "full"})
    return LLMRanker(config, prepare_data(config).train_data._dataset)


@pytest.mark.parametrize("family", ["stream", "instruct"])
def test_preference_logps_equal_one_sequence_at_a_time(ranker: LLMRanker, family: str) -> None:
    """Chosen and rejected of every position, with histories of several lengths."""
    ranker.prompt = Prompt(load_template(family, PROPERTIES), ranker.texts, ranker.llm.tokenizer)
    items = (3, 9, 4, 17, 30)
    whole = Window(1, items, (1, 3, 4), ((5, 6), (7, 8), (10, 11)))
    windows = (
        [whole]
        if family == "stream"
        else [Window(1, items[: t + 1], (t,), (r,)) for t, r in zip(whole.targets, whole.rejected, strict=True)]
    )
    logps = ranker.window_logps(windows)
    for row, (target, rejected) in enumerate(zip(whole.targets, whole.rejected, strict=True)):
        before = ranker.prompt.trunk(items[:target])
        for column, item in enumerate((items[target], *rejected)):
            answer = ranker.prompt.answers[item]
            plain = ranker.policy(torch.tensor([before + answer])).logits[0].log_softmax(-1)
            expected = sum(plain[len(before) - 1 + i, token] for i, token in enumerate(answer))
            torch.testing.assert_close(logps[row, column], expected, atol=1e-4, rtol=0)


def test_stream_window_loss_and_gradient_equal_recbole_rows(ranker: LLMRanker) -> None:
    """One pass over a history = the sum over RecBole's (history, target) rows."""
    items = [3, 9, 4, 17, 30, 12]
    weights = list(ranker.policy.parameters())
    window = ranker.window_loss([Window(1, tuple(items), tuple(range(1, 6)))], "SFT")
    packed = torch.autograd.grad(window.total / window.count, weights)
    rows = {
        "item_id_list": torch.tensor([items[:n] + [0] * (20 - n) for n in range(1, 6)]),
        "item_length": torch.arange(1, 6),
        "item_id": torch.tensor(items[1:]),
        "user_id": torch.ones(5, dtype=torch.long),
    }
    loss = ranker.calculate_loss(rows)
    torch.testing.assert_close(window.total / window.count, loss, atol=1e-5, rtol=0)
    for ours, theirs in zip(packed, torch.autograd.grad(loss, weights), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 30), st.integers(40, 200))
def test_history_is_cut_by_whole_oldest_items(length: int, most: int) -> None:
    prompt = prompt_of("stream")
    most = max(most, prompt.longest(1))
    history = list(np.random.default_rng(length).integers(1, len(TEXTS), length))
    kept = prompt.fit(history, most)
    assert list(kept) == history[len(history) - len(kept) :]
    longest = max(map(len, prompt.answers))
    assert len(prompt.trunk(kept)) + longest <= most
    if len(kept) < length:
        assert len(prompt.trunk(history[length - len(kept) - 1 :])) + longest > most
