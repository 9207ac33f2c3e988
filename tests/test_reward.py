"""Rewards and pairs: values against sklearn, RecBole and hand-worked lists; a planted good text wins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from recbole.evaluator.metrics import MAP, NDCG
from sklearn.metrics import ndcg_score

from recbole_llm.dpo4rec.places import draw_places
from recbole_llm.dpo4rec.reward import Reward, RewardList, choose_pairs, reward, reward_lists, rewards_of
from recbole_llm.errors import UserError
from tests.conftest import prepared


def test_hand_worked() -> None:
    """Relevant items at places 1 and 4 of six, two relevant."""
    scores, relevant = np.array([9.0, 8, 7, 6, 5, 4]), np.array([True, False, False, True, False, False])
    found = reward(scores, relevant)
    assert found.ndcg == pytest.approx((1 + 1 / np.log2(5)) / (1 + 1 / np.log2(3)))
    assert found.map == pytest.approx((1 / 1 + 2 / 4) / 2)
    shares = np.exp(scores) / np.exp(scores).sum()
    assert found.logp == pytest.approx(np.log(shares[[0, 3]]).mean())


def test_random_lists_against_sklearn_and_recbole() -> None:
    """Lists of 10 with one to eight relevant."""
    rng = np.random.default_rng(0)
    for count in (1, 4, 5, 8):
        relevant = rng.permutation(np.arange(10) < count)
        scores = rng.normal(size=10)
        found = reward(scores, relevant)
        assert found.ndcg == pytest.approx(ndcg_score([relevant], [scores], k=5))
        hits = relevant[np.argsort(-scores)][None, :5]
        ndcg = NDCG({"topk": [5], "metric_decimal_place": 9}).metric_info(hits, np.array([count]))
        mean = MAP({"topk": [5], "metric_decimal_place": 9}).metric_info(hits, np.array([count]))
        assert (found.ndcg, found.map) == pytest.approx((ndcg[0, -1], mean[0, -1]))


class Matches:
    """A made-up recommender: an item's score is the inner product of its vector and the text's."""

    def __init__(self, items: np.ndarray) -> None:
        self.items = items

    def scores_of_texts(self, histories: list[Any], texts: np.ndarray) -> np.ndarray:
        assert len(histories) == len(texts)
        return texts @ self.items.T


def test_planted_good_text_beats_the_bad_one() -> None:
    """Of two texts, one points at what the user chose next and one away from it."""
    rng = np.random.default_rng(1)
    items = rng.normal(size=(30, 8))
    lists = [RewardList(1, np.array([1, 2]), np.arange(10, 20), np.isin(np.arange(10, 20), [11, 14, 15, 19]))]
    wanted = items[[11, 14, 15, 19]].sum(0)
    good, bad = wanted / np.linalg.norm(wanted), -wanted / np.linalg.norm(wanted)
    found = rewards_of(Matches(items), lists, [np.stack([bad, good])])
    (pair,) = choose_pairs(found, [["bad", "good"]], 0.01)
    assert (pair.row, pair.best, pair.worst) == (0, 1, 0)


def test_pairs_by_order_and_gap() -> None:
    """NDCG first, then MAP, then log-prob; ties under the gap, equal and empty texts make no pair."""
    a, b, c = Reward(0.5, 0.2, -1), Reward(0.5, 0.3, -2), Reward(0.5, 0.3, -1)
    assert [(p.best, p.worst) for p in choose_pairs([[a, b, c]], [["a", "b", "c"]], 0.0)] == [(2, 0)]
    assert choose_pairs([[a, b, c]], [["a", "b", "c"]], 0.01) == []
    high = Reward(0.6, 0.1, -9)
    assert [(p.best, p.worst) for p in choose_pairs([[a, high]], [["a", "h"]], 0.05)] == [(1, 0)]
    assert choose_pairs([[a, high]], [["same", " same "]], 0.0) == []
    assert choose_pairs([[a, high]], [["a", " "]], 0.0) == []  # the best one says nothing
    assert choose_pairs([[a, a]], [["a", "b"]], 0.0) == []


def test_lists_of_the_protocol(toy: dict[str, Any]) -> None:
    """The next four items and six that the user has not met in training, the same whatever comes before."""
    config, protocol = prepared(toy, "DPO4Rec", llm="tiny", text_encoder="llm", pair_users=12)
    places = draw_places(config, protocol)
    lists = reward_lists(config, protocol, places.pairs)
    assert len(lists) == 12
    for one in lists:
        mine, known = protocol.events.items_of(one.user), places.pairs[one.user]
        assert set(one.items[one.relevant]) == set(mine[known : known + 4])
        assert len(one.items) == 10
        assert not set(one.items[~one.relevant]) & set(mine[: protocol.train_ends[one.user]])
        assert np.array_equal(one.history, mine[:known])
        assert known + 4 == protocol.train_ends[one.user]  # neither validation nor test
    later = [set(one.items) & set(protocol.events.items_of(one.user)[protocol.train_ends[one.user] :]) for one in lists]
    assert any(later)  # validation and test items are drawn like any other
    with pytest.raises(UserError, match=r"--reward_others=80: there are only 5. items that user u\d+ has not met"):
        reward_lists({**config.final_config_dict, "reward_others": 80}, protocol, places.pairs)
    fewer = reward_lists(config, protocol, dict(list(places.pairs.items())[3:5]))
    assert [f.items.tolist() for f in fewer] == [f.items.tolist() for f in lists[3:5]]
