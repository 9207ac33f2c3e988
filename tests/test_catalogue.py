"""Exact ranking of a catalogue against one sequence a title, for every norm, prompt and odd catalogue."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recbole_llm import catalogue
from recbole_llm.catalogue import exact_scores, exact_topk
from recbole_llm.llm.attention import NAMES
from recbole_llm.llm.tiny import tiny_llm
from recbole_llm.llm.title_trie import title_trie
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.title_scores import title_scores
from recbole_llm.topk_search import Found

pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def llm() -> torch.nn.Module:
    """The tiny LLM, its attention replaceable."""
    model, _ = tiny_llm()
    model.set_attn_implementation(NAMES["blocks"])
    return model


@torch.no_grad()
def plain_scores(
    prompt: list[int], answers: Sequence[Sequence[int]], norm: str, prior: np.ndarray | None = None
) -> np.ndarray:
    """One sequence a title, through the model's own logits; -inf for entry 0."""
    model, _ = tiny_llm()
    found = [-np.inf]
    for item, answer in enumerate(answers[1:], 1):
        logps = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
        total = sum(float(logps[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
        found.append(total / len(answer) if norm == "mean" else total - prior[item] if norm == "pmi" else total)
    return np.array(found)


def random_answers(seed: int, *, items: int = 60, tokens: int = 4, longest: int = 7) -> list[list[int]]:
    """Few different tokens, so that titles share beginnings, begin each other and are equal."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, items)
    return [[], *(rng.integers(300, 300 + tokens, length).tolist() for length in lengths)]


def random_prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng([seed, 1]).integers(0, 1000, length).tolist()


def best(scores: np.ndarray, k: int, hidden: Sequence[int]) -> set[int]:
    """Items that score no less than the K-th best of those not hidden."""
    shown = scores.copy()
    shown[list(hidden)] = -np.inf
    return set(np.flatnonzero((shown >= np.sort(shown)[-k]) & (shown > -np.inf)).tolist())


def assert_best(found: Found, scores: np.ndarray, k: int, hidden: Sequence[int]) -> None:
    """The same items, but for those whose scores the K-th best equals to rounding; the same scores."""
    np.testing.assert_allclose(found.scores, scores[found.items], atol=1e-4)
    wanted, got = best(scores, k, hidden), set(found.items.tolist())
    least = min(scores[list(wanted)])
    assert all(abs(scores[item] - least) < 1e-4 for item in wanted ^ got)
    assert len(found.items) == len(got) >= min(k, len(scores) - 1 - len(set(hidden)))


@pytest.mark.parametrize("norm", ["sum", "mean", "pmi"])
@pytest.mark.parametrize("seed", range(3))
def test_all_scores_and_the_best(seed: int, norm: str) -> None:
    answers, prompts = random_answers(seed), [random_prompt(seed + i, 3 + 11 * i) for i in range(5)]
    trie = title_trie(answers)
    prior = plain_scores([7], answers, "sum") if norm == "pmi" else None
    scores = title_scores(trie, norm, prior)
    expected = [plain_scores(prompt, answers, norm, prior) for prompt in prompts]
    for budget in (1, 7, 33, 4096):
        found = exact_scores(llm(), prompts[1], trie, scores, token_budget=budget)
        np.testing.assert_allclose(found.numpy(), expected[1], atol=1e-4)
    hidden = [np.random.default_rng(i).choice(60, 10, replace=False) + 1 for i in range(5)]
    for users, nodes, most in ((2, 3, 10**6), (16, 8, 10**6), (3, 2, 3)):
        sizes: dict[str, Any] = {"users_at_once": users, "nodes_at_once": nodes, "most_nodes": most}
        found, stats = exact_topk(llm(), prompts, trie, scores, k=5, hidden=hidden, token_budget=16, **sizes)
        for one, wanted, seen in zip(found, expected, hidden, strict=True):
            assert_best(one, wanted, 5, seen)
        assert (stats.given_up > 0) == (most == 3)


def full(tiny: dict[str, Any], kind: str, **changes: Any) -> dict[str, Any]:
    """Settings of a run that ranks the whole toy catalogue."""
    return {**tiny, "eval_args": {"mode": "full"}, "full_ranking": kind, "topk": [1, 5, 10], **changes}


@pytest.mark.parametrize(
    "changes",
    [{}, {"score_norm": "mean"}, {"score_norm": "pmi", "epochs": 2}, {"prompt": "instruct"}, {"share": 0.3}],
    ids=str,
)
def test_a_run_gets_the_same_metrics_from_the_best_k(
    tiny: dict[str, Any], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every metric, in validation and test, whether or not searches are given up; no re-ranked model is trained."""
    monkeypatch.setattr(catalogue, "MOST_SHARE", changes.pop("share", 1.0))
    every = run_recbole_llm(config_dict=full(tiny, "exact", **changes))
    best = run_recbole_llm(config_dict=full(tiny, "exact_topk", **changes))
    assert every["test_result"] == best["test_result"] and every["best_valid_result"] == best["best_valid_result"]
    assert every["run_folder"] != best["run_folder"]
    names = [folder.name for folder in (Path(tiny["checkpoint_dir"]) / "stages").iterdir()]
    assert len(names) == 2 and all(name.startswith("SFT-") for name in names)
