"""Pair metrics by hand, against scikit-learn, and through the evaluation of a run with two candidates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from recbole_llm.pair_metrics import auc, auc_coin_flip, auc_global, pair_metrics, paired_accuracy
from recbole_llm.quick_start import run_recbole_llm
from tests.conftest import prepared, started

pytestmark = pytest.mark.usefixtures("one_thread")
TARGET, OTHER = np.array([3.0, 1.0, 2.0, 5.0]), np.array([2.0, 2.0, 2.0, 1.0])


def test_by_hand() -> None:
    """Four rows: won, lost, tied, won: (1 + 0 + 1/2 + 1) / 4.

    Of the 16 pairs of a target's and an other's score: 3 is above all 4; 1 ties one; 2 ties three and is above
    one; 5 is above all 4: (4 + .5 + 2.5 + 4) / 16.
    """
    assert paired_accuracy(TARGET, OTHER).tolist() == [1, 0, 0.5, 1]
    assert auc_global(TARGET, OTHER) == 11 / 16


def test_coin_flip_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coins keep the target's score in rows 1 and 3 (3, 2) and the other's in rows 2 and 4 (2, 1): 3.5 of 4 pairs."""

    class Coins:
        def random(self, size: int) -> np.ndarray:
            return np.array([0.1, 0.9, 0.2, 0.5])[:size]

    seeds: list[int] = []
    monkeypatch.setattr(np.random, "default_rng", lambda seed: seeds.append(seed) or Coins())
    assert auc_coin_flip(TARGET, OTHER) == 3.5 / 4
    assert seeds == [42]


def test_auc_equals_scikit_learn() -> None:
    """With ties, and -inf as the least of all scores."""
    draw = np.random.default_rng(0)
    for _ in range(20):
        scores, labels = draw.integers(8, size=50).astype(float), draw.integers(2, size=50)
        assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))
        unanswered = np.where(scores == 0, -np.inf, scores)
        assert auc(unanswered, labels) == pytest.approx(roc_auc_score(labels, scores))


def test_coin_flip_keeps_half() -> None:
    """One score a row: with targets all above others it is 1, with both drawn alike about a half; seeded."""
    draw = np.random.default_rng(1)
    low, high = draw.random(4000), draw.random(4000)
    assert auc_coin_flip(low + 1, high) == 1
    assert auc_coin_flip(low, high) == pytest.approx(0.5, abs=0.03)
    assert auc_coin_flip(low, high) == auc_coin_flip(low, high)
    assert auc_coin_flip(low, high) != auc_global(low, high)


def test_a_constant_a_row_moves_the_global_auc_alone() -> None:
    draw = np.random.default_rng(2)
    target, other = draw.normal(1, 1, 300), draw.normal(0, 1, 300)
    shift = draw.normal(0, 50, 300)
    assert np.array_equal(paired_accuracy(target + shift, other + shift), paired_accuracy(target, other))
    assert auc_global(target, other) > 0.7
    assert auc_global(target + shift, other + shift) == pytest.approx(0.5, abs=0.05)


def test_one_label_gives_no_auc() -> None:
    """A single row: its coin keeps one score, and there is nothing to compare it with."""
    assert np.isnan(auc(np.array([1.0, 2.0]), np.array([1, 1])))
    assert pair_metrics(np.array([1 / 3]), np.array([0.0]), 6) == {"paired_accuracy": 1.0, "auc_global": 1.0}


def test_rounded_as_asked() -> None:
    found = pair_metrics(np.array([1.0, 2.0, 0.0]), np.array([0.0, 0.0, 1.0]), 3)
    assert found["paired_accuracy"] == 0.667


@pytest.mark.parametrize("mode", ["uni1", "pop1"])
def test_two_candidates_in_a_run(toy: dict[str, Any], mode: str) -> None:
    """Paired accuracy is Hit@1; the AUC is that of the very scores that were ranked."""
    config, protocol = prepared({**toy, "eval_args": {"mode": mode}, "topk": [1], "valid_metric": "NDCG@1"}, "BPR")
    trainer = started(config, protocol)
    result = trainer.evaluate(protocol.valid, load_best_model=False)
    assert list(result)[:4] == ["paired_accuracy", "auc_global", "auc_coin_flip", "hit@1"]
    assert result["paired_accuracy"] == result["hit@1"] and 0 < result["hit@1"] < 1
    assert trainer.per_user["paired_accuracy"].tolist() == trainer.per_user["hit@1"].tolist()
    rows = np.arange(len(protocol.valid))
    scores, items = trainer.score_rows(protocol.valid, rows)
    labels = items.numpy() == protocol.valid.targets[:, None]
    assert labels.sum(1).tolist() == [1] * len(rows)
    expected = roc_auc_score(labels.ravel(), scores.detach().numpy().ravel())
    assert result["auc_global"] == pytest.approx(expected, abs=1e-6)


def test_other_modes_have_no_pair_metrics(toy: dict[str, Any]) -> None:
    for mode in ("uni2", "full"):
        result = run_recbole_llm("Pop", config_dict={**toy, "eval_args": {"mode": mode}})["test_result"]
        assert not {"paired_accuracy", "auc_global", "auc_coin_flip"} & set(result)
