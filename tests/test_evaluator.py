"""Metrics against RecBole's own, independent formulas and hand counts; ties at chance; one masking rule."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.evaluator import Evaluator
from recbole.evaluator.collector import DataStruct
from recbole.model.abstract_recommender import GeneralRecommender, SequentialRecommender
from scipy.stats import mannwhitneyu

from recbole_llm.config import LLMConfig
from recbole_llm.data.candidates import EvalRows
from recbole_llm.data.protocol import Protocol
from recbole_llm.errors import UserError
from recbole_llm.evaluator import PerUserEvaluator, Ranking
from recbole_llm.quick_start import run_recbole_llm
from tests.conftest import accuracy, prepared, random_events, started, write_events

pytestmark = pytest.mark.usefixtures("one_thread")
TOPK_METRICS = ["Hit", "NDCG", "MRR", "MAP", "Recall", "Precision"]
BEYOND_ACCURACY = ["ItemCoverage", "GiniIndex", "AveragePopularity", "TailPercentage", "ShannonEntropy"]
PRECISE = {"metric_decimal_place": 12}
# One relevant item at rank r: each metric @k, written down apart from RecBole.
FORMULAS = {
    "hit": lambda r, k: float(r <= k),
    "recall": lambda r, k: float(r <= k),
    "precision": lambda r, k: (r <= k) / k,
    "ndcg": lambda r, k: (r <= k) / np.log2(r + 1),
    "mrr": lambda r, k: (r <= k) / r,
    "map": lambda r, k: (r <= k) / r,
}


class Ruled:
    """Mixed in before a RecBole model class: scores of all items by a rule that a subclass sets."""

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def rule(self, interaction: Interaction) -> torch.Tensor:
        """Scores ``[B, n_items]``."""
        return torch.zeros(len(interaction), self.n_items)

    def full_sort_predict(self, interaction: Interaction) -> torch.Tensor:
        return self.rule(interaction)


class Scorer(Ruled, SequentialRecommender):
    """With a history."""


class GeneralScorer(Ruled, GeneralRecommender):
    """Without one."""


def scorer(settings: dict[str, Any], rule: Any = Scorer.rule, model: str = "SASRec") -> tuple[Any, Protocol]:
    """A trainer whose model scores by ``rule(self, interaction)``."""
    config, protocol = prepared(settings, model)
    return started(config, protocol, type("Ruled", (Scorer,), {"rule": rule})), protocol


def rank(
    settings: dict[str, Any], scores: Any, target_columns: Any, *, counter: Counter[int] | None = None, **changes: Any
) -> tuple[dict[str, float], pd.DataFrame]:
    """Our result and table for scores of items 1, 2, ... ``[R, C]``, straight through the evaluator."""
    config = LLMConfig("Pop", config_dict={**settings, **PRECISE, **changes})
    scores = torch.as_tensor(scores, dtype=torch.float32)
    columns = torch.as_tensor(target_columns)
    items = torch.arange(1, scores.shape[1] + 1).expand(len(scores), -1)
    users, targets = np.arange(1, len(scores) + 1), columns.numpy() + 1
    names = np.array([f"n{i}" for i in range(max(scores.shape) + 1)])
    visible = Interaction({"user_id": torch.as_tensor(users)})
    rows = EvalRows("test", "uni1", visible, users, targets[:, None], None, [], names, names)
    ranking = Ranking()
    numbers = np.random.default_rng(0).permutation(len(scores))
    for part in (numbers[:2], numbers[2:]):  # two batches, in an order of their own
        if len(part):
            ranking.add(part, scores[part], columns[part, None], items[part], max(config["topk"]))
    evaluator = PerUserEvaluator(config)
    return evaluator.evaluate_ranking(ranking, rows, scores.shape[1] + 1, counter or Counter())


# Against RecBole and independent formulas


def recbole_metrics(
    settings: dict[str, Any], scores: np.ndarray, target: np.ndarray, **changes: Any
) -> dict[str, float]:
    """RecBole's own Evaluator on the lists that its collector would make of these scores."""
    config = LLMConfig("Pop", config_dict={**settings, **PRECISE, **changes})
    order = np.argsort(-scores, axis=1)[:, : max(config["topk"])]
    ones = np.ones((len(scores), 1))
    place = 1 + (scores > np.take_along_axis(scores, target[:, None], 1)).sum(1)
    struct = DataStruct()
    struct.set("rec.topk", torch.as_tensor(np.concatenate([order == target[:, None], ones], 1)).int())
    ranks = np.concatenate([place[:, None], scores.shape[1] * ones, ones], 1)
    struct.set("rec.meanrank", torch.as_tensor(ranks))
    return {name: float(value) for name, value in Evaluator(config).evaluate(struct).items()}


def test_metrics_equal_recbole(toy: dict[str, Any]) -> None:
    """Without ties: RecBole's result, GAUC too; each row by formula, their mean the result."""
    draw = np.random.default_rng(0)
    scores = draw.permuted(np.tile(np.arange(30.0), (50, 1)), axis=1)
    target = draw.integers(30, size=50)
    changes = {"metrics": [*TOPK_METRICS, "GAUC"], "topk": [1, 3, 10], "valid_metric": "NDCG@10"}
    result, table = rank(toy, scores, target, **changes)
    assert result == pytest.approx(recbole_metrics(toy, scores, target, **changes), abs=1e-9)
    places = 1 + (scores > scores[np.arange(50), target][:, None]).sum(1)
    assert table["rank"].tolist() == places.tolist()
    assert (table["tied"] == 1).all() and (table["answers"] == 30).all()
    for name, formula in FORMULAS.items():
        for k in (1, 3, 10):
            assert table[f"{name}@{k}"].tolist() == pytest.approx([formula(r, k) for r in places])
            assert result[f"{name}@{k}"] == pytest.approx(table[f"{name}@{k}"].mean())


def test_gauc_is_the_mean_auc(toy: dict[str, Any]) -> None:
    """The chance that the target is above another answer, ties half, by scipy; -inf is no answer."""
    draw = np.random.default_rng(1)
    scores = draw.integers(6, size=(40, 20)).astype(float)
    target = draw.integers(20, size=40)
    scores[draw.random((40, 20)) < 0.2] = -np.inf
    scores[np.arange(40), target] = draw.integers(6, size=40)
    result, table = rank(toy, scores, target, metrics=["GAUC", "NDCG"])
    areas = []
    for row, column in zip(scores, target, strict=True):
        others = np.delete(row, column)
        others = others[others > -np.inf]
        areas.append(mannwhitneyu([row[column]], others).statistic / len(others))
    assert result["gauc"] == pytest.approx(np.mean(areas))
    assert table["answers"].tolist() == (scores > -np.inf).sum(1).tolist()


def test_ties_stand_at_their_expected_rank(toy: dict[str, Any]) -> None:
    """Every metric of a tied target is its mean over all orders of what it ties with."""
    scores = np.array(
        [[3, 2, 2, 2, 1, 0], [5, 5, 5, 5, 5, 5], [0, 1, 1, 1, 1, 0], [9, 8, 7, 6, 6, 6], [2, 1, 0, 0, 0, 0.5]]
    )
    target = np.array([2, 0, 5, 4, 0])
    topk = [1, 2, 3, 5]
    result, table = rank(toy, scores, target, metrics=TOPK_METRICS, topk=topk, valid_metric="NDCG@5")
    for number, (row, column) in enumerate(zip(scores, target, strict=True)):
        places = []
        for order in itertools.permutations(range(6)):
            ranked = sorted(order, key=lambda c, row=row: -row[c])  # stable: ties stay in this order
            places.append(ranked.index(column) + 1)
        assert table["rank"][number] == pytest.approx(np.mean(places))
        assert table["tied"][number] == (row == row[column]).sum()
        for name, formula in FORMULAS.items():
            for k in topk:
                assert table[f"{name}@{k}"][number] == pytest.approx(np.mean([formula(r, k) for r in places]))
    assert result == pytest.approx({name: table[name].mean() for name in result})


@pytest.mark.parametrize("mode", ["uni9", "pop9", "full"])
@pytest.mark.parametrize("mask_history", [True, False])
def test_constant_scores_are_chance(toy: dict[str, Any], mode: str, mask_history: bool) -> None:
    """All answers tie: exactly k/C, the mean of 1/log2(r + 1) and of 1/r, whatever RecBole's ids tell."""
    settings = {
        **toy,
        **PRECISE,
        "eval_args": {"mode": mode},
        "mask_history": mask_history,
        "metrics": [*TOPK_METRICS, "GAUC"],
    }
    trainer, protocol = scorer(settings)
    result = trainer.evaluate(protocol.test, load_best_model=False)
    answers = 10 if mode != "full" else 60 - 11 * mask_history
    assert (trainer.per_user["answers"] == answers).all() and len(trainer.per_user) == 40
    chance = {
        f"{name}@{k}": np.mean([formula(r, k) for r in range(1, answers + 1)])
        for name, formula in FORMULAS.items()
        for k in (1, 5, 10)
    }
    assert accuracy(result) == pytest.approx({**chance, "gauc": 0.5}, abs=1e-9)


@pytest.mark.parametrize("mode", ["uni9", "full"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_errors(toy: dict[str, Any], mode: str, bad: float) -> None:
    """RecBole ranks NaN; -inf marks what is no answer, and the target is one."""

    def rule(self: Ruled, interaction: Interaction) -> torch.Tensor:
        scores = torch.rand(len(interaction), self.n_items)
        scores[-1] = bad
        return scores

    trainer, protocol = scorer({**toy, "eval_args": {"mode": mode}}, rule)
    with pytest.raises(UserError, match="not a number"):
        trainer.evaluate(protocol.test, load_best_model=False)


def test_one_bad_score_is_an_error(toy: dict[str, Any]) -> None:
    """Wherever it stands; -inf of another item is no answer and no error."""
    scores = np.random.default_rng(0).random((3, 10))
    for bad in (np.nan, np.inf):
        for column in (0, 4):
            spoilt = scores.copy()
            spoilt[2, column] = bad
            with pytest.raises(UserError, match="not a number"):
                rank(toy, spoilt, [0, 0, 0])
    scores[2, 4] = -np.inf
    assert rank(toy, scores, [0, 0, 0])[1]["answers"].tolist() == [10, 10, 9]


def test_order_of_candidates_moves_no_metric(toy: dict[str, Any]) -> None:
    rule = lambda self, x: (torch.arange(self.n_items) * 37 + x["user_id"][:, None] * 11) % 61.0  # noqa: E731
    trainer, protocol = scorer({**toy, "metrics": [*TOPK_METRICS, "GAUC"]}, rule)
    result = trainer.evaluate(protocol.test, load_best_model=False)
    table = trainer.per_user
    shuffled = np.random.default_rng(0).permuted(protocol.test.candidates, axis=1)
    assert not np.array_equal(shuffled, protocol.test.candidates)
    assert trainer.evaluate(replace(protocol.test, candidates=shuffled), load_best_model=False) == result
    pd.testing.assert_frame_equal(trainer.per_user, table)
    assert 0 < result["hit@5"] < 1


def test_batches_move_no_metric(toy: dict[str, Any]) -> None:
    """``eval_batch_size`` cuts users anywhere; the pairwise path and the path over all items agree."""
    results = []
    for mode in ("uni9", "full"):
        for size in (1, 7, 4096):
            config, protocol = prepared({**toy, "eval_batch_size": size, "eval_args": {"mode": mode}}, "BPR")
            trainer = started(config, protocol)
            torch.manual_seed(0)
            torch.nn.init.normal_(trainer.model.user_embedding.weight)
            torch.nn.init.normal_(trainer.model.item_embedding.weight)
            results.append((mode, trainer.evaluate(protocol.test, load_best_model=False)))

            def no_full(self: Any, interaction: Interaction) -> torch.Tensor:
                raise NotImplementedError

            trainer.model.full_sort_predict = no_full.__get__(trainer.model)
            results.append((mode, trainer.evaluate(protocol.test, load_best_model=False)))
    for mode in ("uni9", "full"):
        assert len({str(r) for m, r in results if m == mode}) == 1


# Beyond accuracy


def test_beyond_accuracy_by_hand(toy: dict[str, Any]) -> None:
    """Three users' top 2: (1, 2), (1, 3), (1, 2) of 4 items and the padding; 1, 2, 3 train 10, 4, 1 times.

    Lists hold item 1 three times, 2 twice, 3 once. RecBole's formulas:
    Gini: positions 3, 4, 5 of 5 hold counts 1, 2, 3: (0 * 1 + 2 * 2 + 4 * 3) / 6 / 5 = 16 / 30.
    Entropy of 1/2, 1/3, 1/6 is 1.011404, which RecBole divides by the 3 distinct items.
    """
    scores = [[9, 8, 1, 0], [9, 1, 8, 0], [9, 8, 1, 0]]
    changes = {"metrics": BEYOND_ACCURACY, "topk": [1, 2], "valid_metric": "ItemCoverage@2", "tail_ratio": 0.4}
    result, _ = rank(toy, scores, [0, 0, 0], counter=Counter({1: 10, 2: 4, 3: 1}), **changes)
    assert result == pytest.approx(
        {
            "itemcoverage@1": 1 / 5,
            "itemcoverage@2": 3 / 5,
            "giniindex@1": 4 * 3 / 3 / 5,
            "giniindex@2": 16 / 30,
            "averagepopularity@1": 10.0,
            "averagepopularity@2": (7 + 5.5 + 7) / 3,
            "tailpercentage@1": 0.0,
            "tailpercentage@2": 1 / 6,
            "shannonentropy@1": 0.0,
            "shannonentropy@2": 1.011404 / 3,
        },
        abs=1e-6,
    )


def test_beyond_accuracy_runs(toy: dict[str, Any]) -> None:
    """RecBole 1.2.1 itself fails on four of the five."""
    settings = {**toy, "metrics": [*BEYOND_ACCURACY, "NDCG"], "eval_args": {"mode": "full"}}
    result = run_recbole_llm("BPR", config_dict=settings)["test_result"]
    assert set(accuracy(result)) == {f"{m.lower()}@{k}" for m in [*BEYOND_ACCURACY, "NDCG"] for k in (1, 5, 10)}
    assert all(np.isfinite(v) for v in result.values())
    assert 0 < result["itemcoverage@1"] <= result["itemcoverage@10"] <= 1
    assert result["averagepopularity@10"] > 1
    with pytest.raises(UserError, match=r"--metrics: ItemCoverage.* for a user has \d+ items to be ranked and --topk="):
        run_recbole_llm("BPR", config_dict={**settings, "topk": [10, 60]})


def test_repeated_items_leave_a_list(toy: dict[str, Any], tmp_path: Path) -> None:
    """An item that a user met twice is one that is no answer."""
    once = random_events([12] * 20)
    again = [(user, item, rating, time + 1000 * n) for n in range(1, 6) for user, item, rating, time in once]
    write_events(tmp_path / "data", [*once, *again])
    settings = {**toy, "metrics": ["ItemCoverage", "NDCG"], "eval_args": {"mode": "full"}, "topk": [10]}
    _, protocol = prepared(settings, "Pop")
    assert all(len(items) == len(set(items)) for items in protocol.test.hidden)
    assert 0 < run_recbole_llm("Pop", config_dict=settings)["test_result"]["itemcoverage@10"] <= 1


# Rows


@pytest.mark.parametrize("model", ["BPR", "SASRec"])
def test_per_user_rows(toy: dict[str, Any], tmp_path: Path, model: str) -> None:
    """One row for each test row, in the order of the saved candidates; their means are the result."""
    write_events(tmp_path / "data", random_events([3 + n % 9 for n in range(45)]))
    result = run_recbole_llm(model, config_dict={**toy, "metrics": TOPK_METRICS})
    table = pd.read_csv(Path(result["run_folder"]) / "per_user.csv.gz")
    _, protocol = prepared(toy, model)
    asked = [(record["user"], record["target"]) for record in protocol.test.records()]
    assert list(zip(table["user"], table["target"], strict=True)) == asked
    assert len(table) == 45 and table["user"].is_unique
    means = {name: table[name].mean() for name in accuracy(result["test_result"])}
    assert means == pytest.approx(accuracy(result["test_result"]), abs=1e-6)
    assert (table["answers"] == 10).all() and table["rank"].between(1, 10).all()


def test_scores_move_to_the_device(toy: dict[str, Any]) -> None:
    """EASE and Random of RecBole score on the CPU, whatever the device is."""
    trainer, _ = scorer(toy, lambda self, interaction: torch.zeros(len(interaction) * self.n_items))
    trainer.device = torch.device("meta")
    visible = Interaction({"user_id": torch.ones(3, dtype=torch.long)})
    assert trainer._full_sort(visible).device.type == "meta"


def test_evaluation_moves_no_random_state(toy: dict[str, Any]) -> None:
    """Not even that of a model that draws while it ranks: evaluating oftener must not change training."""

    def rule(self: Ruled, interaction: Interaction) -> torch.Tensor:
        return torch.rand(len(interaction), self.n_items) + np.random.rand() + random.random()

    trainer, protocol = scorer(toy, rule)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = (random.random(), np.random.rand(), float(torch.rand(1)))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    trainer.evaluate(protocol.test, load_best_model=False)
    assert (random.random(), np.random.rand(), float(torch.rand(1))) == expected


def test_evaluation_leaves_the_data_as_they_were(toy: dict[str, Any]) -> None:
    rule = lambda self, x: torch.rand(len(x), self.n_items)  # noqa: E731
    trainer, protocol = scorer({**toy, "eval_args": {"mode": "full"}}, rule)
    before = [h.copy() for h in protocol.test.hidden], protocol.test.visible["item_id_list"].clone()
    trainer.evaluate(protocol.test, load_best_model=False)
    assert all(map(np.array_equal, protocol.test.hidden, before[0]))
    assert torch.equal(protocol.test.visible["item_id_list"], before[1])


# Full ranking


@pytest.mark.parametrize("base", [Scorer, GeneralScorer])
@pytest.mark.parametrize("mask_history", [True, False])
def test_one_masking_rule(toy: dict[str, Any], tmp_path: Path, base: type, mask_history: bool) -> None:
    """Items of the history, even beyond MAX_ITEM_LIST_LENGTH, are answers for all models or for none."""
    write_events(tmp_path / "data", events := random_events([12] * 30, items=40))
    settings = {**toy, "eval_args": {"mode": "full"}, "mask_history": mask_history, "MAX_ITEM_LIST_LENGTH": 3}
    config, protocol = prepared(settings, "SASRec" if base is Scorer else "BPR")
    met: dict[str, list[str]] = {}
    for user, item, _, _ in events:
        met.setdefault(user, []).append(item)
    ids = {token: number for number, token in enumerate(protocol.test.item_tokens.tolist())}
    order: list[int] = []

    def rule(self: Ruled, interaction: Interaction) -> torch.Tensor:
        """History first, then all others, the target last: a model that learnt nothing but history."""
        scores = torch.zeros(len(interaction), self.n_items)
        for row, user in enumerate(interaction["user_id"].tolist()):
            items = [ids[item] for item in met[str(protocol.test.user_tokens[user])]]
            scores[row, items[:-2]] = 2.0
            scores[row, items[-2]] = 3.0
            scores[row, items[-1]] = -1.0
            order.append(user)
        return scores

    trainer = started(config, protocol, type("Ruled", (base,), {"rule": rule}))
    test = trainer.evaluate(protocol.test, load_best_model=False)
    table = trainer.per_user
    assert set(order) == set(protocol.test.users.tolist())
    # 11 earlier items of 40; the target is behind all other answers.
    assert (table["answers"] == (29 if mask_history else 40)).all()
    assert (table["rank"] == table["answers"]).all() and test["hit@10"] == 0
    trainer.evaluate(protocol.valid, load_best_model=False)
    # In validation the test item is an answer like any other, and the 10 items before are not.
    assert (trainer.per_user["answers"] == (30 if mask_history else 40)).all()
    assert (trainer.per_user["rank"] == 1).all()


@pytest.mark.parametrize("mask_history", [True, False])
def test_a_repeated_target_can_be_ranked(toy: dict[str, Any], tmp_path: Path, mask_history: bool) -> None:
    """A user who comes back to an item: it stays an answer, other items of the history do not."""
    events = [(u, i, r, t) for u, i, r, t in random_events([6] * 20)]
    first = {u: i for u, i, _, t in reversed(events)}
    events += [(u, first[u], 3.0, 1e6) for u in first]
    write_events(tmp_path / "data", events)

    def rule(self: Ruled, interaction: Interaction) -> torch.Tensor:
        return torch.zeros(len(interaction), self.n_items).scatter(1, interaction["item_id_list"][:, :1], 1.0)

    trainer, protocol = scorer({**toy, "eval_args": {"mode": "full"}, "mask_history": mask_history}, rule)
    items = len({i for _, i, _, _ in events})
    assert trainer.evaluate(protocol.test, load_best_model=False)["hit@1"] == 1
    assert (trainer.per_user["answers"] == items - 5 * mask_history).all()


def test_padding_is_never_an_answer(toy: dict[str, Any]) -> None:
    """RecBole's item 0, even where a model scores it highest."""

    def rule(self: Ruled, interaction: Interaction) -> torch.Tensor:
        return torch.zeros(len(interaction), self.n_items).index_fill(1, torch.tensor([0]), 9.0)

    trainer, protocol = scorer({**toy, "eval_args": {"mode": "full"}, "mask_history": False}, rule)
    trainer.evaluate(protocol.test, load_best_model=False)
    assert (trainer.per_user["answers"] == 60).all() and (trainer.per_user["tied"] == 60).all()
