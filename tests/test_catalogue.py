"""Exact ranking of a catalogue against one sequence a title, for every norm, prompt and odd catalogue."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from recbole.data.interaction import Interaction
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config, DiffLlamaConfig

from recbole_llm import catalogue, full_ranking, scoring
from recbole_llm.catalogue import exact_scores, exact_topk
from recbole_llm.config import LLMConfig
from recbole_llm.data.protocol import prepare_data
from recbole_llm.errors import UserError
from recbole_llm.full_ranking import users_at_once
from recbole_llm.llm import attention_check
from recbole_llm.llm.attention import NAMES
from recbole_llm.llm.attention_check import choose_attention
from recbole_llm.llm.logps import token_logps
from recbole_llm.llm.prompt_cache import NodeCache, PromptCache, _cpu_kernel, _spelled_out, cannot_go_on
from recbole_llm.llm.tiny import tiny_llm
from recbole_llm.llm.title_trie import title_trie
from recbole_llm.memory import LiveBytes
from recbole_llm.model.llmranker import LLMRanker
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.scoring import candidate_logps
from recbole_llm.title_scores import title_scores
from recbole_llm.topk_search import Found
from tests.test_token_tree import one_at_a_time

pytestmark = pytest.mark.usefixtures("one_thread")

SEVERAL_CYCLES = getattr(transformers, "HrmTextConfig", None)  # older versions have none


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
    for users, nodes, most in ((2, 3, 10**6), (16, 8, 10**6), (3, 2, 1)):
        sizes: dict[str, Any] = {"users_at_once": users, "nodes_at_once": nodes, "most_nodes": most}
        found, stats = exact_topk(llm(), prompts, trie, scores, k=5, hidden=hidden, token_budget=16, **sizes)
        for one, wanted, seen in zip(found, expected, hidden, strict=True):
            assert_best(one, wanted, 5, seen)
        assert (stats.given_up > 0) == (most == 1)
        assert max(stats.expansions) <= (most if most > 1 else 1 + len(trie.inner))


WIDTHS = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 8, "q_lora_rank": 8}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        (DeepseekV2Config, {"num_key_value_heads": 4, **WIDTHS, **EXPERTS}),  # keys of 16, values of 8
        (DeepseekV3Config, {"num_key_value_heads": 4, **WIDTHS, **EXPERTS}),
        (DiffLlamaConfig, {"num_key_value_heads": 2}),  # a layer attends twice, to other values
        *([(SEVERAL_CYCLES, {"num_layers_per_stack": 2, "head_dim": 8})] if SEVERAL_CYCLES else []),
    ],
)
def test_other_shapes_and_orders_of_attention(architecture: type, options: dict[str, Any]) -> None:
    sizes = {"vocab_size": 211, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    fixed = {
        "num_attention_heads": 4,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(architecture(**sizes, **fixed, **options)).eval()
    answers = [[], *([token % 200 for token in answer] for answer in random_answers(0, items=30)[1:])]
    prompts = [[token % 200 for token in random_prompt(seed, 9 + 7 * seed)] for seed in range(2)]
    model.config.use_cache = False
    choose_attention(model, "auto", "it")
    assert model.config._attn_implementation == NAMES["blocks"] and cannot_go_on(model) is None
    trie = title_trie(answers)
    scores = [exact_scores(model, prompts[1], trie, title_scores(trie), token_budget=n).numpy() for n in (7, 4096)]
    found, stats = exact_topk(
        model, prompts, trie, title_scores(trie), k=5, hidden=[np.zeros(0)] * 2, token_budget=16, most_nodes=999
    )
    model.set_attn_implementation("eager")
    with torch.no_grad():
        alone = [one_at_a_time(model, [(prompt, answer) for answer in answers[1:]]) for prompt in prompts]
    expected = [np.array([-np.inf, *sums.tolist()]) for sums in alone]
    for some in scores:
        np.testing.assert_allclose(some, expected[1], atol=1e-4)
    assert stats.given_up == 0
    for one, wanted in zip(found, expected, strict=True):
        assert_best(one, wanted, 5, [])


def full(tiny: dict[str, Any], kind: str, **changes: Any) -> dict[str, Any]:
    """Settings of a run that ranks the whole toy catalogue."""
    return {**tiny, "eval_args": {"mode": "full"}, "full_ranking": kind, "topk": [1, 5, 10], **changes}


def ranker(settings: dict[str, Any]) -> LLMRanker:
    config = LLMConfig(config_dict=settings)
    return LLMRanker(config, prepare_data(config).train_data._dataset).eval()


def histories(*told: list[int]) -> Interaction:
    lengths = torch.tensor([len(history) for history in told])
    padded = [history + [0] * (int(lengths.max()) - len(history)) for history in told]
    return Interaction({"item_id_list": torch.tensor(padded), "item_length": lengths})


@pytest.mark.parametrize(
    "changes",
    [{}, {"score_norm": "mean"}, {"score_norm": "pmi", "epochs": 2}, {"prompt": "instruct"}, {"share": 0.3}],
    ids=str,
)
def test_a_run_gets_the_same_metrics_from_the_best_k(
    tiny: dict[str, Any], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every metric, in validation and test, whether or not searches are given up; no re-ranked model is trained."""
    monkeypatch.setattr(catalogue, "MOST_SHARE", changes.get("share", 1.0))
    changes = {key: value for key, value in changes.items() if key != "share"}
    every = run_recbole_llm(config_dict=full(tiny, "exact", **changes))
    apart = Path(tiny["checkpoint_dir"]) / "apart"  # trained and validated again, not taken from the other run
    best = run_recbole_llm(config_dict=full(tiny, "exact_topk", checkpoint_dir=str(apart), **changes))
    assert every["test_result"] == best["test_result"] and every["best_valid_result"] == best["best_valid_result"]
    for folder in (apart.parent, apart):
        (stage,) = (folder / "stages").iterdir()
        assert stage.name.startswith("SFT-")


@pytest.mark.parametrize("norm", ["sum", "mean", "pmi"])
def test_equal_titles_and_a_title_that_begins_another(norm: str) -> None:
    """Items 1 and 4 share a title, item 2 begins item 3; the tie at the K-th place is found whole."""
    answers = [[], [9, 8, 7], [9, 8], [9, 8, 5, 6], [9, 8, 7], [3]]
    trie, prompt = title_trie(answers), random_prompt(0, 9)
    prior = plain_scores([1], answers, "sum") if norm == "pmi" else None
    scores, expected = title_scores(trie, norm, prior), plain_scores(prompt, answers, norm, prior)
    found = exact_scores(llm(), prompt, trie, scores, token_budget=2).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert found[1] == found[4]
    for k in range(1, 6):
        for hidden in ([], [2], [1, 2, 3, 4, 5]):
            (one,), _ = exact_topk(
                llm(), [prompt], trie, scores, k=k, hidden=[np.array(hidden)], token_budget=9, most_nodes=99
            )
            shown = np.where(np.isin(np.arange(6), [0, *hidden]), -np.inf, found)
            least = np.sort(shown)[-k]
            assert sorted(one.items) == np.flatnonzero((shown >= least - 1e-5) & (shown > -np.inf)).tolist()


@pytest.mark.parametrize("norm", ["sum", "mean", "pmi"])
@pytest.mark.parametrize("seed", range(5))
def test_no_title_exceeds_the_bounds_above_it(seed: int, norm: str) -> None:
    """In float32, over random falling sums, at every node on the way."""
    answers, rng = random_answers(seed), np.random.default_rng(seed)
    trie = title_trie(answers)
    scores = title_scores(trie, norm, rng.normal(-20, 9, len(answers)) if norm == "pmi" else None)
    logps = -rng.exponential(1e-3, len(trie)).astype(np.float32)
    logps[0] = 0
    for level in trie.levels:
        logps[level] += logps[trie.parent[level]]
    for item in range(1, len(answers)):
        node = trie.last_node[item]
        score = scores.of_items(logps[[node]], np.array([item]))
        while node >= 0:
            assert scores.bounds(logps[[node]], np.array([node])) >= score
            node = trie.parent[node]


def test_a_sure_model_needs_few_nodes_and_memory_does_not_grow_with_the_catalogue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """20,000 titles: a full pass keeps a chunk and a path; a search expands and keeps a sliver."""
    rng = np.random.default_rng(0)
    answers = [[], *(rng.integers(300, 1020, length).tolist() for length in rng.integers(2, 6, 20_000))]
    trie = title_trie(answers)
    model, _ = tiny_llm()
    model.set_attn_implementation(NAMES["blocks"])
    model.lm_head.weight.data *= 8  # sharper: a few titles hold nearly all the mass
    kept: list[int] = []
    write = NodeCache.write

    def counted(self: NodeCache, *args: Any) -> torch.Tensor:
        found = write(self, *args)
        kept.append(len(found))
        return found

    monkeypatch.setattr(NodeCache, "write", counted)
    prompts = [random_prompt(seed, 20) for seed in range(4)]
    found, stats = exact_topk(
        model, prompts, trie, title_scores(trie), k=10, hidden=[np.zeros(0)] * 4, token_budget=512
    )
    assert stats.given_up == 0 and len(trie.inner) > 30_000 and max(stats.expansions) < 600
    assert stats.head_rows == sum(stats.expansions) + 4 and stats.kept_nodes <= sum(stats.expansions)
    assert max(kept) <= 2 * stats.kept_nodes
    kept.clear()
    scores = exact_scores(model, prompts[0], trie, title_scores(trie), token_budget=512).numpy()
    assert max(kept) <= 2 * (512 + int(trie.depth.max()))
    assert_best(found[0], scores, 10, [0])


def test_a_search_that_is_given_up_costs_a_bounded_part_of_a_full_pass() -> None:
    """The untrained LLM spreads its mass over all titles."""
    rng = np.random.default_rng(0)
    answers = [[], *(rng.integers(300, 1000, length).tolist() for length in rng.integers(2, 4, 2000))]
    trie, prompt = title_trie(answers), random_prompt(3, 20)
    scores = title_scores(trie)
    (found,), stats = exact_topk(llm(), [prompt], trie, scores, k=50, hidden=[np.array([7])], token_budget=512)
    assert stats.given_up == 1
    assert len(trie.inner) < stats.expansions[0] <= 1.3 * len(trie.inner)
    assert_best(found, exact_scores(llm(), prompt, trie, scores, token_budget=512).numpy(), 50, [7])


def test_attention_without_the_cpu_kernel_is_the_same() -> None:
    """What a GPU runs; both tell the log-sum-exp."""
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, 2, n, 16, generator=draw) for n in (12, 7, 7))
    mask = torch.zeros(3, 1, 12, 7).masked_fill_(torch.rand(3, 1, 12, 7, generator=draw) < 0.4, -torch.inf)
    mask[..., 0] = 0
    for given in (mask, None):
        for one, other in zip(
            _spelled_out(query, key, value, given, 0.3), _cpu_kernel(query, key, value, given, 0.3), strict=True
        ):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"metrics": ["Hit", "GAUC"], "valid_metric": "Hit@10"}, "--full_ranking=exact"),
        ({"attention": "sdpa"}, "--attention=auto"),
        ({"attention": "eager"}, "--attention=auto"),
    ],
    ids=str,
)
def test_what_a_search_cannot_give_is_told_before_any_work(
    tiny: dict[str, Any], changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        LLMConfig(config_dict=full(tiny, "exact_topk", **changes))
    LLMConfig(config_dict=full(tiny, "exact", **changes))
    for sampled in ({"mode": "uni9"}, {"split": {"LS": "valid_and_test"}}):  # without a mode it is uni19 and uni99
        LLMConfig(config_dict={**full(tiny, "exact_topk", **changes), "eval_args": sampled})


def test_a_back_end_that_auto_fell_back_to_is_refused_before_training(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_check, "_lacks", lambda model, kind: "no" if kind != "eager" else None)
    with pytest.raises(UserError, match=r"eager attention.*--attention=auto.*set --full_ranking=exact\."):
        ranker(full(tiny, "exact_topk"))
    ranker(full(tiny, "exact"))
    ranker({**full(tiny, "exact_topk"), "eval_args": {"mode": "uni9"}})


def test_a_kept_prompt_is_tried_when_the_llm_is_loaded(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """exact_topk is refused before training; exact, which does not advise it then, and candidates beyond a pass take
    no such way.
    """
    history = histories([3, 4, 5])
    expected = ranker(full(tiny, "exact", finetune="none")).full_sort_predict(history)
    assert "--full_ranking=exact_topk gives the same metrics" in caplog.text
    caplog.clear()
    monkeypatch.setattr(NodeCache, "move_to_front", lambda *_: None)
    with pytest.raises(UserError, match=r"there --llm=tiny is off by .* nats a title.*set --full_ranking=exact\."):
        ranker(full(tiny, "exact_topk"))
    model = ranker(full(tiny, "exact", finetune="none"))
    for module in (full_ranking, scoring):
        monkeypatch.setattr(module, "exact_scores", lambda *args, **kwargs: 1 / 0)
    torch.testing.assert_close(model.full_sort_predict(history), expected, atol=1e-4, rtol=0)
    assert "--full_ranking=exact: " in caplog.text and "exact_topk gives" not in caplog.text
    items = list(range(1, model.n_items))
    for budget in (64, 4096):
        (logps,) = candidate_logps(model.policy, model.prompt, [[3, 4, 5]], [items], token_budget=budget)
        torch.testing.assert_close(logps, expected[1:], atol=1e-4, rtol=0)


def test_titles_that_are_the_same_tokens_tie_among_candidates(tiny: dict[str, Any]) -> None:
    """Of each user, whoever else is asked for the other; rounding must not order them."""
    model = ranker(full(tiny, "exact"))
    model.prompt.answers = [*model.prompt.answers[:7], *[model.prompt.answers[3]] * 3, *model.prompt.answers[10:]]
    asked = [[8, 1, 2, 3, 9], [1, 9, 2], [7, 5, 3]]
    for budget in (16, 4096):
        first, second, third = candidate_logps(
            model.policy, model.prompt, [[3, 4], [3, 4], [5]], asked, token_budget=budget
        )
        assert first[0] == first[3] == first[4] == second[1] and third[0] == third[2]
        assert len({*first.tolist()}) == 3 and first[1] == second[0]


def test_other_attention_scores_the_whole_catalogue_too(tiny: dict[str, Any]) -> None:
    one, other = (
        run_recbole_llm(config_dict=full(tiny, "exact", attention=kind, finetune="none")) for kind in ("auto", "sdpa")
    )
    assert one["test_result"] == other["test_result"]


def test_a_fallback_is_logged_once(tiny: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    model = ranker(full(tiny, "exact_topk", finetune="none"))
    history = histories([3, 4, 5], [3, 4], [3, 4])
    hidden = [np.array([3, 4, 5]), np.array([3, 4]), np.array([4, 3])]
    scores = model.full_sort_predict(history, hidden).view(3, -1)
    model.full_sort_predict(history, hidden)
    assert len([r for r in caplog.records if "exact_topk" in r.getMessage()]) == 1
    assert model.exact.stats.given_up == 4 and len(model.exact.stats.expansions) == 4  # two users are one
    assert torch.equal(scores[1], scores[2])
    best = scores.topk(10, dim=1)
    assert not set(best.indices[0].tolist()) & {0, 3, 4, 5}
    assert torch.isfinite(scores).all() and (scores[0] == scores[0].min()).sum() == model.n_items - 10


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_diverged_model_is_told(tiny: dict[str, Any], share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN compares with nothing: it must not end as a catalogue of ties."""
    monkeypatch.setattr(catalogue, "MOST_SHARE", share)
    model = ranker(full(tiny, "exact_topk", finetune="none"))
    model.policy.lm_head.weight.data[300:310] = torch.nan
    history = histories([3, 4, 5])
    assert model.full_sort_predict(history, [np.array([3])]).isnan().all()


def test_nodes_held_are_bounded_and_every_search_ends() -> None:
    """Each of five users needs many nodes, and there is room for those of one and few more."""
    answers, prompts = random_answers(0), [random_prompt(i, 3 + 5 * i) for i in range(5)]
    trie, expected = title_trie(answers), [plain_scores(prompt, answers, "sum") for prompt in prompts]
    most = len(trie.inner) + 1
    plain: dict[str, Any] = {"k": 40, "hidden": [np.zeros(0)] * 5, "token_budget": 16, "most_nodes": most}
    _, free = exact_topk(llm(), prompts, trie, title_scores(trie), **plain)
    for room in (most, most + 7):
        found, stats = exact_topk(llm(), prompts, trie, title_scores(trie), **plain, most_kept=room)
        assert stats.kept_nodes <= room < free.kept_nodes and stats.given_up == 0
        for one, wanted in zip(found, expected, strict=True):
            assert_best(one, wanted, 40, [])
    found, stats = exact_topk(llm(), prompts, trie, title_scores(trie), **plain, most_kept=9)
    assert stats.kept_nodes <= 9 and stats.given_up == 5
    assert_best(found[4], expected[4], 40, [])


@pytest.mark.parametrize(
    ("tokens", "longest", "device", "users"),
    [
        (2048, 300, "cpu", 16),
        (2048, 300, "cuda", 27),
        (8192, 300, "cuda", 64),
        (64, 100, "cpu", 2),
        (64, 999, "cpu", 1),
    ],
)
def test_prompts_take_half_of_what_is_kept(tokens: int, longest: int, device: str, users: int) -> None:
    """ml-100k: 8 x 2,048 tokens, of which 16 prompts of 300 take 4,800."""
    assert users_at_once(tokens, longest, torch.device(device)) == users


def test_a_ranking_keeps_no_more_than_its_budget(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of prompts and trie nodes that tensors are made for, from what a pass of the untrained LLM asks."""
    monkeypatch.setattr(catalogue, "MOST_SHARE", 1.0)
    monkeypatch.setattr(full_ranking, "KEPT", 16)
    model = ranker(full(tiny, "exact_topk", token_budget=64))
    prompts, nodes, write, start = [], [], NodeCache.write, PromptCache.__init__

    def started(self: PromptCache, slots: int, longest: int) -> None:
        prompts.append(slots * longest)
        start(self, slots, longest)

    def counted(self: NodeCache, *args: Any) -> torch.Tensor:
        found = write(self, *args)
        nodes.append(prompts[-1] + len(found))
        return found

    monkeypatch.setattr(PromptCache, "__init__", started)
    monkeypatch.setattr(NodeCache, "write", counted)
    asked = [[1 + (i + j) % 60 for j in range(2)] for i in range(12)]
    every = model.full_sort_predict(histories(*asked))
    assert 12 * 64 < max(nodes) <= 16 * 64 and model.exact.stats.given_up == 0
    monkeypatch.setattr(full_ranking, "KEPT", 500)
    torch.testing.assert_close(model.full_sort_predict(histories(*asked)), every, atol=1e-4, rtol=0)
    assert max(nodes) > 16 * 64


def test_a_search_out_of_memory_leaves_training_its_passes(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    search, tried = full_ranking.exact_topk, []

    def scarce(*args: Any, token_budget: int, **kwargs: Any) -> Any:
        tried.append(token_budget)
        if token_budget > 100:
            raise MemoryError
        return search(*args, token_budget=token_budget, **kwargs)

    model = ranker(full(tiny, "exact_topk", token_budget=256))
    monkeypatch.setattr(full_ranking, "exact_topk", scarce)
    assert torch.isfinite(model.full_sort_predict(histories([3, 4]))).all()
    assert tried == [256, 128, 64] and model.budget.tokens == 256


def pmi_by_hand(model: LLMRanker, history: list[int]) -> torch.Tensor:
    """Sums less those after an empty history, candidate by candidate; -inf for the padding item."""
    items = list(range(1, model.n_items))
    here, alone = candidate_logps(model.policy, model.prompt, [history, []], [items, items], token_budget=512)
    return torch.cat([torch.tensor([-torch.inf]), here - alone])


@torch.no_grad()
def test_the_prior_is_of_the_weights_that_are_evaluated(tiny: dict[str, Any]) -> None:
    """The best epoch's weights are loaded after the last epoch was validated, and then evaluated without training."""
    model = ranker(full(tiny, "exact", score_norm="pmi"))
    before = model.full_sort_predict(histories([3, 4]))
    for weight in model.parameters():
        weight.mul_(1.1)
    model.eval()
    scores = model.full_sort_predict(histories([3, 4]))
    torch.testing.assert_close(scores, pmi_by_hand(model, [3, 4]), atol=1e-4, rtol=0)
    assert (scores - before)[1:].abs().max() > 1e-3


@torch.no_grad()
def test_a_prior_that_could_not_be_computed_is_computed_again(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, scored = ranker(full(tiny, "exact", score_norm="pmi")), full_ranking.exact_scores
    monkeypatch.setattr(full_ranking, "exact_scores", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.full_sort_predict(histories([3, 4]))
    monkeypatch.setattr(full_ranking, "exact_scores", scored)
    scores = model.full_sort_predict(histories([3, 4]))
    torch.testing.assert_close(scores, pmi_by_hand(model, [3, 4]), atol=1e-4, rtol=0)


def test_many_targets_are_not_embedded_at_once() -> None:
    """The children of the root of a large catalogue: one matrix of all their embeddings would be 16 MB."""
    draw = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(100, 500, bias=False).requires_grad_(False)
    hidden = torch.randn(3, 100, generator=draw)
    row, target = (torch.randint(n, (40_000,), generator=draw) for n in (3, 500))
    with torch.no_grad(), LiveBytes() as live:
        found = token_logps(hidden, row, target, head, None)
    torch.testing.assert_close(found, head(hidden).log_softmax(-1)[row, target], atol=1e-5, rtol=0)
    assert live.peak < 40_000 * 100 * 4
