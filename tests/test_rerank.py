"""Re-ranking and mixtures: the LLM on top of another recommender."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import zscore

from recbole_llm.config import LLMConfig
from recbole_llm.data.protocol import prepare_data
from recbole_llm.errors import ConfigError, UserError
from recbole_llm.model.llmranker import LLMRanker
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.recommender import train_recommender
from recbole_llm.rerank import WEIGHTS, choose_weight, rerank, standardised
from recbole_llm.validation import validate
from tests.conftest import started


def test_standardised_is_scipys_zscore_over_the_answers() -> None:
    scores = torch.tensor([[3.0, 1.0, 8.0, 99.0], [2.0, 2.0, 2.0, 2.0]])
    answers = torch.tensor([[True, True, True, False], [True, True, True, True]])
    found = standardised(scores, answers).numpy()
    assert np.allclose(found[0, :3], zscore([3.0, 1.0, 8.0])) and found[0, 3] == 0
    assert (found[1] == 0).all()


def test_a_mixture_by_hand() -> None:
    """Top 3 of 4: base 4, 3, 2 and LLM 0, 1, 5. z(base) = 1.22, 0, -1.22; z(LLM) = -.93, -.46, 1.39."""
    base, llm, top = torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([[0.0, 1.0, 5.0]]), torch.tensor([[0, 1, 2]])

    def order(weight: float) -> list[int]:
        return rerank(base, llm, top, weight)[0].argsort(descending=True).tolist()

    assert order(0.0) == [0, 1, 2, 3] and order(1.0) == [2, 1, 0, 3]
    # The second and third change places at .398, the first and third at .514, the first and second at .726.
    assert order(0.39) == [0, 1, 2, 3] and order(0.41) == order(0.5) == [0, 2, 1, 3]
    assert order(0.52) == order(0.72) == [2, 0, 1, 3] and order(0.73) == [2, 1, 0, 3]


def test_hidden_items_stay_hidden_in_a_mixture() -> None:
    base = torch.tensor([[5.0, -torch.inf, 3.0]])
    scores = rerank(base, torch.tensor([[0.0, 2.0, 9.0]]), torch.tensor([[0, 2, 1]]), 0.5)
    assert scores[0, 1] == -torch.inf and torch.isfinite(scores[0, [0, 2]]).all()


def test_ties_at_the_cut_are_drawn() -> None:
    """Four items are ahead, 96 tie for the other 16 places: none of them is more likely in for its internal id."""
    base = torch.zeros(1, 101)
    base[0, [5, 50, 70, 99]] = 1.0

    def top(seed: int) -> list[int]:
        asked: list[list[int]] = []
        model = SimpleNamespace(
            config={"rerank_topk": 20, "candidate_seed": seed},
            rerank_weight=1.0,
            _base_scores=lambda interaction: base,
            _scores=lambda histories, items: asked.extend(items) or [torch.zeros(len(i)) for i in items],
        )
        LLMRanker._reranked(model, None, [[]], [np.array([7])])  # type: ignore[arg-type]
        return asked[0]

    assert top(3) == top(3) != top(4)
    drawn = [top(seed) for seed in range(60)]
    assert all({5, 50, 70, 99} == set(mine[:4]) and 7 not in mine and 0 not in mine for mine in drawn)
    tied = np.array([mine[4:] for mine in drawn])
    assert abs(tied.mean() - 51) < 4 * 29 / np.sqrt(tied.size)


@pytest.fixture
def mixed(tiny: dict[str, Any]) -> dict[str, Any]:
    sasrec = {"epochs": 2, "train_batch_size": 64}
    return {**tiny, "rerank_candidates": True, "rerank_model": "SASRec", "recommender_config": sasrec}


def ranks(result: dict[str, Any]) -> np.ndarray:
    return pd.read_csv(Path(result["run_folder"]) / "per_user.csv.gz").sort_values("user")["rank"].to_numpy()


def test_no_share_is_the_base_and_a_whole_share_of_all_candidates_is_the_llm(mixed: dict[str, Any]) -> None:
    """Against runs of SASRec and of the LLM alone, through the same evaluation."""
    everything = {"rerank_topk": 100}
    base = run_recbole_llm(
        config_dict={k: v for k, v in mixed.items() if k in SHARED} | mixed["recommender_config"] | {"model": "SASRec"}
    )
    none = run_recbole_llm(config_dict={**mixed, **everything, "rerank_weight": 0})
    assert (ranks(none) == ranks(base)).all()
    llm = run_recbole_llm(config_dict={**mixed, "rerank_candidates": False})
    whole = run_recbole_llm(config_dict={**mixed, **everything, "rerank_weight": 1.0})
    assert (ranks(whole) == ranks(llm)).all()
    assert (ranks(whole) != ranks(none)).any()


def test_what_the_base_puts_behind_stays_in_its_order(mixed: dict[str, Any]) -> None:
    base = run_recbole_llm(config_dict={**mixed, "rerank_topk": 100, "rerank_weight": 0})
    top = run_recbole_llm(config_dict={**mixed, "rerank_topk": 3})
    before, after = ranks(base), ranks(top)
    assert (after[before > 3] == before[before > 3]).all() and (after[before <= 3] <= 3).all()


def test_a_base_may_know_items_that_nobody_met(tiny: dict[str, Any]) -> None:
    """FDSA reads columns of items, and so numbers those too of which `.item` alone knows; they take no place."""
    settings = {**tiny, "finetune": "none", "eval_args": {"mode": "full"}, "rerank_model": "FDSA", "rerank_topk": 5}
    settings["recommender_config"] = {"epochs": 1, "train_batch_size": 64, "selected_features": ["release_year"]}
    before = run_recbole_llm(config_dict=settings)
    with Path(tiny["data_path"], "toy", "toy.item").open("a", encoding="utf-8") as file:
        file.writelines(f"unmet{n}\tNobody saw part {n}\t1990\n" for n in range(40))
    after = run_recbole_llm(config_dict=settings)
    assert after["candidate_hash"] == before["candidate_hash"] and (ranks(after) <= 60).all()


def test_the_share_is_the_best_on_validation(mixed: dict[str, Any]) -> None:
    """The chosen share scores as a run with that share given does; the record holds every share's score."""
    mixed = {**mixed, "eval_step": 0}
    auto = run_recbole_llm(config_dict={**mixed, "rerank_weight": "auto"})
    record = json.loads((Path(auto["run_folder"]) / "result.json").read_text())
    weights = {float(weight): score for weight, score in record["rerank_weights"].items()}
    assert sorted(weights) == list(WEIGHTS)
    best = record["rerank_weight"]
    assert weights[best] == max(weights.values()) == auto["best_valid_score"]
    assert best == min(weight for weight, score in weights.items() if score == weights[best])
    given = run_recbole_llm(config_dict={**mixed, "rerank_weight": best})
    assert given["test_result"] == auto["test_result"]
    assert validate(config_dict={**mixed, "rerank_weight": best})["best_valid_score"] == weights[best]
    assert validate(config_dict={**mixed, "rerank_weight": "auto"})["best_valid_score"] == weights[best]


def test_the_llm_scores_each_list_once(mixed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked, real = [], LLMRanker._computed_scores
    monkeypatch.setattr(LLMRanker, "_computed_scores", lambda self, h, i: asked.extend(h) or real(self, h, i))
    monkeypatch.setattr(
        "recbole_llm.llm_trainer.choose_weight",
        lambda trainer, valid: (asked.clear(), choose_weight(trainer, valid), users.append(len(valid)))[1],
    )
    users: list[int] = []
    validate(config_dict={**mixed, "eval_step": 0, "rerank_weight": "auto"})
    assert len(asked) == users[0]


def test_all_lines_share_one_sft_stage(mixed: dict[str, Any]) -> None:
    """Where training validates nothing, how the answers are ranked later does not change what is trained."""
    plain = {**mixed, "eval_step": 0}
    runs = [
        run_recbole_llm(config_dict=plain | changed)
        for changed in ({"rerank_candidates": False}, {}, {"rerank_weight": 0.5}, {"eval_args": {"mode": "full"}})
    ]
    records = [json.loads((Path(run["run_folder"]) / "result.json").read_text()) for run in runs]
    assert [stage.get("reused", False) for record in records for stage in record["stages"]] == [False, True, True, True]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"rerank_weight": 0.5}, "--rerank_weight=0.5: the test is not re-ranked"),
        ({"rerank_weight": "auto", "eval_args": {"mode": {"test": "full"}}}, "chosen on validation"),
        ({"rerank_weight": 1.5}, "--rerank_weight=1.5"),
        ({"rerank_candidates": "yes"}, "--rerank_candidates"),
    ],
)
def test_wrong_mixtures_are_told(tiny: dict[str, Any], given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace("(", r"\(")):
        run_recbole_llm(config_dict={**tiny, **given})


SHARED = {"dataset", "data_path", "checkpoint_dir", "eval_args", "seed", "show_progress", "MAX_ITEM_LIST_LENGTH"}


@pytest.mark.parametrize("weight", [1.0, 0.5, 0.0])
def test_a_row_without_a_score_is_nan_throughout(weight: float) -> None:
    """An order would hide it: NaN sorts behind all numbers. Fill of a short list needs no score."""
    base, top = torch.tensor([[4.0, 3.0, 2.0], [4.0, 3.0, 2.0], [4.0, torch.nan, 2.0], [4.0, -torch.inf, 2.0]]), [0, 1]
    llm = torch.tensor([[1.0, torch.nan], [1.0, 2.0], [1.0, 2.0], [1.0, torch.nan]])
    nan = rerank(base, llm, torch.tensor([top] * 4), weight).isnan()
    assert nan.all(1).tolist() == [True, False, True, False] and nan.any(1).tolist() == [True, False, True, False]


def test_an_llm_without_scores_is_told_and_not_ranked_as_its_base(
    mixed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        LLMRanker, "_computed_scores", lambda self, histories, items: [torch.full((len(i),), torch.nan) for i in items]
    )
    with pytest.raises(UserError, match="not a number"):
        run_recbole_llm(config_dict={**mixed, "finetune": "none", "rerank_model": "Pop", "rerank_weight": 0.5})


def test_lists_of_one_user_and_history_are_ranked_apart(mixed: dict[str, Any]) -> None:
    """Two rows of a user whose cut histories are equal: the base's top-K is that of each list alone."""
    config = LLMConfig(config_dict={**mixed, "rerank_topk": 2})
    protocol = prepare_data(config)
    trainer = started(config, protocol)
    trainer.model.rerank_with(train_recommender(config, "SASRec").model)
    trainer.model.eval()
    test = protocol.test
    one = trainer.score_rows(test, np.array([0]))[0]
    twice = copy.copy(test)
    twice.candidates = np.stack([test.candidates[0], test.candidates[1]])
    twice.visible = test.visible[torch.tensor([0, 0])]
    both = trainer.score_rows(twice, np.array([0, 1]))[0]
    torch.testing.assert_close(both[0], one[0])
    assert (both[1].sort()[0] == one[0].sort()[0]).all()  # two in front, the others behind, as in every list


def test_a_base_that_scores_pairs_alone_is_told_at_once(mixed: dict[str, Any]) -> None:
    """Where validation is not re-ranked it would fail in the test, after all training."""
    settings = {**mixed, "rerank_candidates": False, "eval_args": {"mode": {"valid": "uni9", "test": "full"}}}
    with pytest.raises(ConfigError, match="--rerank_model=NeuMF: it scores single pairs alone; name a model"):
        run_recbole_llm(config_dict={**settings, "rerank_model": "NeuMF"})


def test_a_base_that_cannot_be_built_is_told(mixed: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="training --rerank_model=SASRec failed"):
        run_recbole_llm(config_dict={**mixed, "recommender_config": {"n_heads": 3}})
