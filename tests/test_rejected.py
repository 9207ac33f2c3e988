"""Who is rejected, on a catalogue small enough to know the right answer by eye."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from recbole_llm.data.events import Events
from recbole_llm.data.prompt import Window
from recbole_llm.data.rejected import RejectedItems, Sources
from recbole_llm.errors import UserError
from recbole_llm.quick_start import run_recbole_llm

# Ann (user 1) met items 1 to 6: four for training, then 5 and 6 held out. Bob (user 2) met 7, 8, 9, all for training.
ITEMS = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9])
RATINGS = np.array([5.0, 1.0, 4.0, 2.0, 1.0, 5.0, 5.0, 5.0, 5.0])
TRAINED = {1: 4, 2: 3}
ANN = Window(1, (1, 2, 3, 4), (1, 2, 3))


def settings(**changes: Any) -> dict[str, Any]:
    defaults = {
        "rejected": "uniform",
        "rejected_num": 2,
        "rejected_pool": 3,
        "rating_threshold": 3,
        "popularity_exponent": 1.0,
        "seed": 7,
    }
    return {**defaults, **changes}


def world(items: np.ndarray = ITEMS, ratings: np.ndarray = RATINGS, counts: dict[int, int] | None = None) -> Any:
    """A protocol with nine items and no file."""
    low = np.flatnonzero(ratings <= 3)
    users = np.array([1] * 6 + [2] * 3)
    start = np.array([0, 0, 6, 9])
    events = Events(
        user=users,
        item=items,
        rating=ratings,
        start=start,
        threshold=3,
        low_item=items[low],
        low_from=low - start[users[low]] + 1,
        low_start=np.searchsorted(users[low], np.arange(4)),
    )
    dataset = SimpleNamespace(
        item_num=10, uid_field="user_id", field2id_token={"user_id": np.array(["", "ann", "bob"])}
    )
    return SimpleNamespace(
        events=events,
        train_ends=np.array([0, 4, 3]),
        item_counter=Counter(counts or {i: 1 for i in range(1, 10)}),
        dataset=dataset,
    )


def filled(protocol: Any, sources: Sources | None = None, windows: list[Window] | None = None, **changes: Any) -> Any:
    return RejectedItems(settings(**changes), protocol, sources or Sources()).fill(windows or [ANN])


def items_of(windows: list[Window]) -> list[tuple[int, ...]]:
    return [r for w in windows for r in w.rejected]


def policy(scores: dict[int, float]) -> Any:
    """A policy whose log-prob of an item is what the table says."""
    return lambda windows: [
        [[0.0, *(scores[i] for i in r)] for r in w.rejected] for w in windows
    ]  # fmt: skip


def test_uniform_leaves_out_training_items_alone() -> None:
    """Held-out items 5 and 6 may be drawn: to spare them would tell them."""
    draws = Counter(i for seed in range(300) for r in items_of(filled(world(), seed=seed)) for i in r)
    assert set(draws) == {5, 6, 7, 8, 9}
    share = np.array([draws[i] for i in (5, 6, 7, 8, 9)]) / sum(draws.values())
    assert np.abs(share - 0.2).max() < 0.03  # 1,800 draws: three standard errors are .028


def test_popularity_draws_in_proportion_to_training_counts() -> None:
    counts = {5: 1, 6: 0, 7: 2, 8: 5, 9: 0, 1: 100}
    draws = Counter(
        r[0]
        for seed in range(500)
        for r in items_of(filled(world(counts=counts), rejected="popularity", rejected_num=1, seed=seed))
    )
    assert set(draws) == {5, 7, 8}
    share = np.array([draws[i] for i in (5, 7, 8)]) / 1500
    assert np.abs(share - np.array([1, 2, 5]) / 8).max() < 0.04
    flat = Counter(
        r[0]
        for seed in range(500)
        for r in items_of(
            filled(world(counts=counts), rejected="popularity", rejected_num=1, seed=seed, popularity_exponent=0.0)
        )
    )
    assert max(abs(flat[i] / 1500 - 1 / 3) for i in (5, 7, 8)) < 0.04


def test_low_rating_takes_what_the_user_disliked_in_training() -> None:
    """Items 2 and 4 were rated low in training; 5 was rated low later, and is no different from any other item."""
    (window,) = filled(world(), rejected="low_rating")
    assert window.targets == (2,)  # of the targets only item 3 was liked
    assert set(window.rejected[0]) == {2, 4}
    wide = items_of(filled(world(), rejected="low_rating", rejected_num=3))
    assert all({2, 4} < set(r) for r in wide)  # the third is filled up
    with pytest.raises(UserError, match="rating_threshold"):
        filled(world(ratings=np.ones(9)), rejected="low_rating")
    with pytest.raises(UserError, match="low_rating"):
        filled(world(ratings=np.full(9, np.nan)), rejected="low_rating")


def test_semantic_takes_the_nearest_to_the_history() -> None:
    """Ann's history points along the first axis, and of the free items 7 and 9 do so too."""
    vectors = np.zeros((10, 2), dtype=np.float32)
    vectors[[1, 2, 3, 4, 7, 9]] = (1, 0)
    vectors[[5, 6, 8]] = (0, 1)
    found = items_of(filled(world(), Sources(vectors=vectors), rejected="semantic", rejected_pool=2))
    assert all(set(r) == {7, 9} for r in found)
    # A history that turns: before the last target it points along the second axis.
    vectors[[2, 3]] = (0, 1)
    first, _, last = items_of(filled(world(), Sources(vectors=vectors), rejected="semantic", rejected_pool=2))
    assert set(first) == {7, 9} and set(last) <= {5, 6, 8}


def test_from_model_takes_the_best_scored_that_the_user_has_not_met() -> None:
    asked = []

    def recommend(histories: Any) -> np.ndarray:
        asked.extend(histories)
        return np.tile(np.array([0, 99, 99, 99, 99, 1, 2, 8, 9, 3], dtype=float), (len(histories), 1))

    found = items_of(filled(world(), Sources(recommend=recommend), rejected="from_model", rejected_pool=2))
    assert all(set(r) == {7, 8} for r in found)
    assert asked == [(1,), (1, 2), (1, 2, 3)]


def test_self_hard_takes_what_the_policy_ranks_first_of_its_pool() -> None:
    scores = {5: -9.0, 6: -1.0, 7: -5.0, 8: -2.0, 9: -7.0}
    found = items_of(filled(world(), Sources(policy=policy(scores)), rejected="self_hard", rejected_pool=5))
    assert found == [(6, 8)] * 3
    small = items_of(filled(world(), Sources(policy=policy(scores)), rejected="self_hard", rejected_pool=2))
    assert all(scores[a] > scores[b] for a, b in small)  # both of the pool, the better one first


def test_mixed_strategies_share_the_places() -> None:
    vectors = np.zeros((10, 2), dtype=np.float32)
    vectors[[1, 2, 3, 4, 9]] = (1, 0)
    scores = dict.fromkeys(range(1, 10), -5.0) | {8: -1.0}
    sources = Sources(policy=policy(scores), vectors=vectors)
    mixed = {"rejected": "self_hard+semantic", "rejected_pool": 5}
    found = items_of(filled(world(), sources, rejected_num=2, **mixed | {"rejected_pool": 5}))
    assert all(8 in r for r in found) and all(len(set(r)) == 2 for r in found)
    one = items_of(filled(world(), sources, rejected_num=1, rejected="self_hard+low_rating"))
    assert {r[0] for r in one} <= {2, 4, 5, 6, 7, 8, 9}
    turns = Counter(
        r[0] in (2, 4)
        for seed in range(300)
        for r in items_of(filled(world(), sources, rejected_num=1, rejected="uniform+low_rating", seed=seed))
    )
    assert abs(turns[True] / 300 - 0.5) < 0.09  # each has half of the pairs


@pytest.mark.parametrize("strategy", ["uniform", "popularity", "low_rating", "semantic", "from_model", "self_hard"])
def test_no_strategy_looks_at_held_out_events(strategy: str) -> None:
    """Planted markers: other held-out items and ratings of Ann's, exchanged with later users', change no draw."""
    rng = np.random.default_rng(0)
    sources = Sources(
        policy=policy(dict(enumerate(rng.normal(size=10)))),
        vectors=rng.normal(size=(10, 3)).astype(np.float32),
        recommend=lambda histories: np.tile(rng.permutation(10) * 0 + np.arange(10.0), (len(histories), 1)),
    )
    items, ratings = np.array([1, 2, 3, 4, 7, 8, 5, 6, 9]), RATINGS.copy()
    assert sorted(items) == sorted(ITEMS) and (items[:4] == ITEMS[:4]).all() and set(items[4:6]) != set(ITEMS[4:6])
    ratings[4:6] = (5.0, 1.0)
    told = [filled(world(i, r), sources, rejected=strategy) for i, r in ((ITEMS, RATINGS), (items, ratings))]
    assert told[0] == told[1]


@pytest.mark.parametrize("strategy", ["uniform", "popularity", "semantic", "from_model", "self_hard"])
def test_no_strategy_looks_at_the_target(strategy: str) -> None:
    """Another target at the last place, with the same history and the same items met, is given the same rejected."""
    rng = np.random.default_rng(0)
    sources = Sources(
        policy=policy(dict(enumerate(rng.normal(size=10)))),
        vectors=rng.normal(size=(10, 3)).astype(np.float32),
        recommend=lambda histories: np.tile(np.arange(10.0), (len(histories), 1)),
    )
    one = filled(world(), sources, [Window(1, (1, 2, 3), (2,))], rejected=strategy)
    other = filled(world(), sources, [Window(1, (1, 2, 4), (2,))], rejected=strategy)
    assert one[0].rejected == other[0].rejected


def test_same_seed_same_draw_and_positions_differ() -> None:
    draws = [items_of(filled(world(), seed=s, rejected_num=3)) for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) > 1


def test_too_many_are_told() -> None:
    with pytest.raises(UserError, match=r"--rejected_num=6: user ann has only 5"):
        filled(world(), rejected_num=6)


def test_also_chosen_are_liked_and_never_rejected() -> None:
    """Of several chosen items none may be one that the user rated low, which low_rating rejects."""
    several = Window(1, (1, 2, 3, 4), (1, 2, 3), also=((3,), (1,), (5,)))
    (window,) = filled(world(), windows=[several], rejected="low_rating")
    assert (window.targets, window.also) == ((2,), ((1,),))  # 2 and 4 are disliked
    told = Window(1, (1, 3, 9), (1,), also=((2,),))
    with pytest.raises(UserError, match="rating_threshold"):
        filled(world(), windows=[told], rejected="low_rating")


def test_self_hard_scores_its_pool_alone() -> None:
    """Items that are chosen beside the target take no part in the ranking of wrong ones."""
    seen = []

    def scored(windows: list[Window]) -> list[list[list[float]]]:
        seen.extend(windows)
        return policy({5: -9.0, 6: -1.0, 7: -5.0, 8: -2.0, 9: -7.0})(windows)

    several = Window(1, (1, 2, 3), (1, 2), also=((3,), (4,)))
    (window,) = filled(world(), Sources(policy=scored), [several], rejected="self_hard", rejected_pool=5)
    assert window.rejected == ((6, 8), (6, 8)) and window.also == several.also
    assert not any(any(w.also) for w in seen)


def test_no_position_with_so_many_chosen_is_told() -> None:
    with pytest.raises(UserError, match="--chosen_num=4"):
        RejectedItems(settings(chosen_num=4), world(), Sources()).fill([])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"loss": "DMPO", "rejected_num": 60}, r"--rejected_num=60: user \w+ has only 50 items"),
        ({"loss": "MultDPO", "chosen_num": 30}, "--chosen_num=30: no user has a training position"),
        ({"loss": "DMPO", "rejected": "low_rating", "rating_threshold": 4.5}, "--rating_threshold=4.5: no training"),
    ],
)
def test_pairs_that_cannot_be_made_are_told_before_sft(
    tiny: dict[str, Any], tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    """Events are rated 4, but for the test's, which are rated 5."""
    file = tmp_path / "data" / "toy" / "toy.inter"
    events = pd.read_csv(file, sep="\t")
    last = events.groupby("user_id:token").cumcount(ascending=False) == 0
    events["rating:float"] = np.where(last, 5.0, 4.0)
    events.to_csv(file, sep="\t", index=False)
    with pytest.raises(UserError, match=told):
        run_recbole_llm(config_dict={**tiny, **changes})
    assert not list(Path(tiny["checkpoint_dir"]).glob("stages/SFT-*"))
