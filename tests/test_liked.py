"""Liked items alone: low ratings leave every sequence, and come back as candidates; disjoint and nested users."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recbole_llm.config import LLMConfig
from recbole_llm.data.dataset import create_dataset
from recbole_llm.data.protocol import Protocol, prepare_data
from recbole_llm.errors import UserError
from recbole_llm.recommender import recommender_config
from recbole_llm.run_folder import run_hash
from tests.conftest import Event, prepared, random_events, write_events

pytestmark = pytest.mark.usefixtures("one_thread")

LOW1 = {"mode": {"valid": "low1", "test": "low1"}}

# By time; `never` and `bad` are liked by nobody, bob dislikes what ann likes (c), and ann changes her mind on e.
ANN = [("a", 5), ("never", 1), ("b", 4), ("e", 2), ("c", 5), ("bad", 3), ("d", 4), ("e", 5), ("g", 2)]
BOB = [("b", 5), ("a", 4), ("c", 1), ("d", 5), ("f", 5)]
CAT = [("a", 2), ("c", 4), ("b", 4), ("f", 5), ("d", 5)]
BY_HAND: list[Event] = [
    (user, item, float(rating), float(time))
    for user, told in (("ann", ANN), ("bob", BOB), ("cat", CAT), ("dan", [("a", 1), ("z", 2)]))
    for time, (item, rating) in enumerate(told)
]


def names(protocol: Protocol, items: Any) -> list[str]:
    return protocol.test.item_tokens[np.asarray(items, dtype=int)].tolist()


def ids(protocol: Protocol) -> dict[str, int]:
    return {str(name): number for number, name in enumerate(protocol.test.user_tokens)}


def rows_of(protocol: Protocol) -> list[Any]:
    """All that evaluation asks, by token: split, user, target, candidates, whole history."""
    return [
        (rows.split, r["user"], r["target"], r["candidates"], names(protocol, h))
        for rows in (protocol.valid, protocol.test)
        for r, h in zip(rows.records(), rows.history, strict=True)
    ]


def asked(protocol: Protocol, split: str) -> set[str]:
    return {str(r["user"]) for r in getattr(protocol, split).records()}


def trained(protocol: Protocol) -> Counter[tuple[str, str]]:
    """(user, item) pairs that a model's training loader holds, a sequence's first item among them."""
    feat = protocol.train_data._dataset.inter_feat
    pairs = list(zip(feat["user_id"].tolist(), feat["item_id"].tolist(), strict=True))
    if "item_id_list" in feat:
        first = feat["item_length"] == 1
        pairs += list(zip(feat["user_id"][first].tolist(), feat["item_id_list"][first, 0].tolist(), strict=True))
    users, items = zip(*pairs, strict=True)
    return Counter(zip(protocol.test.user_tokens[list(users)].tolist(), names(protocol, items), strict=True))


def learners(protocol: Protocol) -> set[str]:
    return {user for user, _ in trained(protocol)}


@pytest.fixture
def by_hand(toy: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    write_events(tmp_path / "data", BY_HAND)
    return {**toy, "liked_only": True, "eval_args": LOW1}


@pytest.fixture
def many(toy: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """90 users with 8 to 22 events, three in five of them low."""
    write_events(tmp_path / "data", many_events())
    return {**toy, "liked_only": True, "eval_args": LOW1}


def many_events() -> list[Event]:
    return random_events([8 + n % 15 for n in range(90)])


# ---- liked_only


@pytest.mark.parametrize("model", ["SASRec", "BPR", "Pop"])
def test_by_hand(by_hand: dict[str, Any], model: str) -> None:
    """ann likes a b c d e, bob b a d f, cat c b f d; dan nothing, so that he is gone, and z with him."""
    _, protocol = prepared(by_hand, model)
    assert set(protocol.test.user_tokens) == {"[PAD]", "ann", "bob", "cat"}
    assert set(protocol.test.item_tokens) == {"[PAD]", *"abcdefg", "never", "bad"}
    rows = {(split, user): (target, history) for split, user, target, _, history in rows_of(protocol)}
    expected = {
        ("valid", "ann"): ("d", ["a", "b", "c"]),
        ("test", "ann"): ("e", ["a", "b", "c", "d"]),
        ("valid", "bob"): ("d", ["b", "a"]),
        ("test", "bob"): ("f", ["b", "a", "d"]),
        ("valid", "cat"): ("f", ["c", "b"]),
        ("test", "cat"): ("d", ["c", "b", "f"]),
    }
    assert rows == expected
    pairs = [("ann", i) for i in "abc"] + [("bob", i) for i in "ba"] + [("cat", i) for i in "cb"]
    assert trained(protocol) == Counter(pairs)
    assert {protocol.test.item_tokens[i]: n for i, n in protocol.item_counter.items()} == {"a": 2, "b": 3, "c": 2}


def test_disliked_by_hand(by_hand: dict[str, Any]) -> None:
    """What was rated low no later than the event that is number ``end``; what is liked by then is not disliked."""
    _, protocol = prepared(by_hand, "SASRec")
    disliked = protocol.events.disliked
    user = ids(protocol)
    told = [set(names(protocol, disliked(user["ann"], end))) for end in range(6)]
    # Liked events: a at 0, b at 2, c at 4, d at 6, e at 7.
    assert told == [
        set(),
        {"never"},
        {"never", "e"},
        {"never", "e", "bad"},
        {"never", "e", "bad"},
        {"never", "bad", "g"},
    ]
    assert [set(names(protocol, disliked(user["bob"], end))) for end in range(5)] == [set(), set(), {"c"}, {"c"}, {"c"}]
    assert [set(names(protocol, disliked(user["cat"], end))) for end in range(2)] == [{"a"}, {"a"}]
    assert protocol.events.disliked_counts().tolist() == [{"ann": 3, "bob": 1, "cat": 1}.get(u, 0) for u in user]
    assert set(names(protocol, protocol.events.met(user["ann"]))) == {i for i, _ in ANN}


def test_equal_times_are_not_later(toy: dict[str, Any], tmp_path: Path) -> None:
    events = [("u", i, r, 1.0) for i, r in (("a", 5.0), ("x", 1.0))] + [("u", i, 5.0, 2.0) for i in "bcd"]
    write_events(tmp_path / "data", [*events, ("u", "y", 2.0, 2.0), ("u", "w", 2.0, 3.0)])
    _, protocol = prepared({**toy, "liked_only": True, "eval_args": LOW1}, "Pop")
    (user,) = protocol.test.users
    told = ["".join(sorted(names(protocol, protocol.events.disliked(user, end)))) for end in range(5)]
    assert told == ["x", "xy", "xy", "xy", "wxy"]


def test_disliked_of_ordinary_events(toy: dict[str, Any], tmp_path: Path) -> None:
    """Without liked_only low ratings stand among the events, and those before event ``end`` count."""
    events = many_events()
    write_events(tmp_path / "data", events)
    _, protocol = prepared(toy, "SASRec", rating_threshold=2)
    by_user: dict[str, list[Event]] = {}
    for event in sorted(events, key=lambda e: e[3]):
        by_user.setdefault(event[0], []).append(event)
    for name, number in ids(protocol).items():
        own = by_user.get(name, [])
        for end in range(len(own) + 1):
            low = {item for _, item, rating, _ in own[:end] if rating <= 2}
            assert set(names(protocol, protocol.events.disliked(number, end))) == low
    assert protocol.events.disliked_counts().sum() == sum(e[2] <= 2 for e in events)


def test_disliked_of_changed_minds(toy: dict[str, Any], tmp_path: Path) -> None:
    """Liked events and low ones set aside tell the same as all events together, cut at the same moment."""
    rng = np.random.default_rng(3)
    events = [("u", f"i{rng.integers(6)}", float(rng.integers(1, 6)), float(t)) for t in range(40)]
    write_events(tmp_path / "data", [*events, *random_events([9] * 8)])
    _, aside = prepared({**toy, "liked_only": True, "eval_args": LOW1}, "Pop")
    _, among = prepared(toy, "Pop", eval_args={"mode": "full"})
    moments = [n for n, event in enumerate(events) if event[2] > 3]
    for end, moment in enumerate(moments):
        one = names(aside, aside.events.disliked(ids(aside)["u"], end))
        other = names(among, among.events.disliked(ids(among)["u"], moment))
        assert set(one) == set(other)


def test_no_low_rating_in_any_history_or_target(many: dict[str, Any]) -> None:
    """And every model trains on, and is asked, the same."""
    events = many_events()
    liked = {(u, i) for u, i, r, _ in events if r > 3}
    found = {model: prepared(many, model)[1] for model in ("SASRec", "BPR", "Pop")}
    for protocol in found.values():
        assert set(trained(protocol)) <= liked and set(trained(protocol).values()) == {1}
        for rows in (protocol.valid, protocol.test):
            assert len(rows) > 40
            for row, user in enumerate(rows.user_tokens[rows.users]):
                seen = rows.visible["item_id_list"][row]
                told = names(protocol, [*seen[seen > 0].tolist(), *rows.history[row], rows.targets[row]])
                assert {(user, item) for item in told} <= liked
                assert names(protocol, rows.history[row])[-len(seen[seen > 0]) :] == names(protocol, seen[seen > 0])
    assert len({str(rows_of(p)) for p in found.values()}) == 1
    assert len({p.candidate_hash for p in found.values()}) == 1
    assert trained(found["SASRec"]) == trained(found["BPR"]) == trained(found["Pop"])
    kept = {u: sum((v, i) in liked for v, i, _, _ in events if v == u) for u in {e[0] for e in events}}
    assert asked(found["Pop"], "test") == {u for u, n in kept.items() if n > 2}  # everybody dislikes something


def test_threshold_is_the_last_low_rating(by_hand: dict[str, Any]) -> None:
    """Over 1: ann keeps all but `never`."""
    _, protocol = prepared(by_hand, "Pop", rating_threshold=1, eval_args={"mode": "full"})
    kept = names(protocol, protocol.events.items_of(ids(protocol)["ann"]))
    assert kept == [item for item, _ in ANN if item != "never"]


@pytest.mark.parametrize(
    ("interval", "users", "items"),
    [
        # Liked events: ann 5, bob 4, cat 4; a 2, b 3, c 2, d 3, e 1, f 2, g never bad 0.
        ({"user_inter_num_interval": "[5,inf)"}, {"ann"}, {*"abcdeg", "never", "bad"}),
        ({"user_inter_num_interval": "[4,inf)"}, {"ann", "bob", "cat"}, {*"abcdefg", "never", "bad"}),
        ({"item_inter_num_interval": "[2,inf)"}, {"ann", "bob", "cat"}, {*"abcdf"}),
        ({"item_inter_num_interval": "[0,2]"}, {"ann", "bob", "cat"}, {*"acefg", "never", "bad"}),
    ],
)
def test_filters_count_liked_events(
    by_hand: dict[str, Any], interval: dict[str, str], users: set[str], items: set[str]
) -> None:
    dataset = create_dataset(LLMConfig("Pop", config_dict={**by_hand, **interval}))
    assert set(dataset.field2id_token["user_id"]) - {"[PAD]"} == users
    assert set(dataset.field2id_token["item_id"]) - {"[PAD]"} == items


def test_disliked_items_are_candidates_of_others(toy: dict[str, Any], tmp_path: Path) -> None:
    """uniN draws what the user never met, liked or not: `hated` is in no sequence, and is asked of those without it."""
    liked = [(f"u{n}", f"i{(n + k) % 9}", 5.0, float(k)) for n in range(60) for k in range(5)]
    write_events(tmp_path / "data", [*liked, *((f"u{n}", "hated", 1.0, 9.0) for n in range(30))])
    mode = {"mode": {"valid": "uni4", "test": "uni4"}}
    _, protocol = prepared({**toy, "liked_only": True, "eval_args": mode}, "Pop")
    with_it = {str(r["user"]) for r in protocol.test.records() if "hated" in r["candidates"]}
    assert with_it and with_it <= {f"u{n}" for n in range(30, 60)}
    assert set(names(protocol, protocol.events.catalogue)) == {e[1] for e in liked} | {"hated"}


def test_liked_only_needs_ratings(toy: dict[str, Any], by_hand: dict[str, Any]) -> None:
    columns = {"inter": ["user_id", "item_id", "timestamp"]}
    with pytest.raises(UserError, match="--liked_only=True: the rating column 'rating' is not read; see --load_col"):
        prepared({**by_hand, "load_col": columns}, "Pop")
    with pytest.raises(UserError, match="--rating_threshold=5: none of 21 interactions is rated above it, .* is 5"):
        prepared(by_hand, "Pop", rating_threshold=5)
    _, protocol = prepared({**toy, "load_col": columns, "eval_args": {"mode": "full"}}, "Pop")
    assert protocol.events.disliked_counts().sum() == 0


# ---- lowN


def test_low_candidates_are_the_users_own_low_ratings(many: dict[str, Any]) -> None:
    events = many_events()
    low = {u: {i for v, i, r, _ in events if v == u and r <= 3} for u in {e[0] for e in events}}
    modes = {"mode": {"valid": "low2", "test": "low4"}}
    _, protocol = prepared({**many, "eval_args": modes}, "SASRec")
    for rows, number in ((protocol.valid, 2), (protocol.test, 4)):
        for record in rows.records():
            others = [i for i in record["candidates"] if i != record["target"]]
            assert len(others) == len(set(others)) == number and set(others) <= low[record["user"]]
            assert record["candidates"].count(record["target"]) == 1
        place = (rows.candidates == rows.targets[:, None]).argmax(1)
        assert len(set(place)) == number + 1
    _, again = prepared({**many, "eval_args": modes}, "BPR")
    assert rows_of(again) == rows_of(protocol)
    _, other = prepared({**many, "eval_args": modes, "candidate_seed": 4}, "BPR")
    assert rows_of(other) != rows_of(protocol)


def test_low_candidates_come_from_all_times(by_hand: dict[str, Any]) -> None:
    """ann dislikes never, bad and, after her last liked item, g; e she liked in the end. Others have one item."""
    _, protocol = prepared({**by_hand, "eval_args": {"mode": {"valid": "low1", "test": "low3"}}}, "Pop")
    (row,) = protocol.test.records()
    assert row["user"] == "ann" and set(row["candidates"]) == {"never", "bad", "g", "e"}
    assert asked(protocol, "valid") == {"ann", "bob", "cat"}


def test_a_user_of_one_event_has_a_place(toy: dict[str, Any], tmp_path: Path) -> None:
    """Such a user is never drawn, and takes a number all the same, as every user who met anything."""
    write_events(tmp_path / "data", random_events([1 if user == 4 else 5 for user in range(10)]))
    _, protocol = prepared({**toy, "few_shot": 4}, "Pop")
    place = np.random.default_rng([2020, 1]).random(11)  # by token, "[PAD]" first
    expected = sorted((user for user in range(10) if user != 4), key=lambda user: place[1 + user])[:4]
    tokens = protocol.dataset.field2id_token["user_id"]
    assert {str(tokens[u]) for u in protocol.training_sequences()} == {f"u{user}" for user in expected}


def test_users_without_interactions_move_no_draw(toy: dict[str, Any]) -> None:
    """A model that loads `.user` knows users whom nobody else knows; who trains and who is asked stays."""
    folder = Path(toy["data_path"]) / "toy"
    names = [line.split("\t")[0] for line in (folder / "toy.inter").read_text().splitlines()[1:]]
    (folder / "toy.user").write_text("\n".join(["user_id:token", "a", *dict.fromkeys(names), "z"]) + "\n")
    columns = {"inter": ["user_id", "item_id", "rating", "timestamp"]}
    drawn = []
    for load_col in (columns, {**columns, "user": ["user_id"]}):
        settings = {**toy, "few_shot": 10, "eval_users": 6, "valid_users": 4, "load_col": load_col}
        protocol = prepare_data(LLMConfig("SASRec", config_dict={**settings, "train_neg_sample_args": None}))
        tokens = protocol.dataset.field2id_token["user_id"]
        users = (protocol.training_sequences(), protocol.valid.users, protocol.test.users)
        drawn.append([sorted({str(tokens[u]) for u in mine}) for mine in users])
    assert drawn[0] == drawn[1] and [len(mine) for mine in drawn[0]] == [10, 4, 6]


def test_fewer_users_than_asked_for(toy: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    protocol = prepare_data(LLMConfig("Pop", config_dict={**toy, "eval_users": 1000, "valid_users": 3}))
    everyone = len(set(protocol.test.users))
    assert f"--eval_users=1000: there are {everyone} users with such rows; all are asked." in caplog.text
    assert "--valid_users" not in caplog.text


def test_rows_left_out_are_told(by_hand: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    prepared({**by_hand, "eval_args": {"mode": {"valid": "low1", "test": "low3"}}, "state": "INFO"}, "Pop")
    assert caplog.text.count("rows are left out") == 1
    assert "2 test rows are left out, of 2 users with fewer than 3 items rated <= 3; 1 users stay." in caplog.text


def test_low_needs_liked_only_and_low_ratings(by_hand: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--eval_args: mode lowN .* set --liked_only=True"):
        prepared(by_hand, "Pop", liked_only=False)
    with pytest.raises(
        UserError, match="mode low4: of 3 users with test interactions none has 4 items .* the most is 3"
    ):
        prepared({**by_hand, "eval_args": {"mode": {"valid": "low1", "test": "low4"}}}, "Pop")


# ---- min_disliked


@pytest.mark.parametrize("liked_only", [True, False])
@pytest.mark.parametrize("model", ["SASRec", "BPR"])
def test_min_disliked(many: dict[str, Any], model: str, liked_only: bool) -> None:
    """Only users with enough low ratings train and are asked."""
    events = many_events()
    low = Counter(u for u, _, r, _ in events if r <= 3)
    few = {u for u, n in low.items() if n >= 8}
    settings = {**many, "liked_only": liked_only, "eval_args": {"mode": {"valid": "uni4", "test": "uni4"}}}
    _, everyone = prepared(settings, model)
    _, protocol = prepared(settings, model, min_disliked=8)
    assert 10 < len(few) < 80
    assert learners(protocol) == learners(everyone) & few and len(protocol.train_users) == len(learners(protocol))
    for split in ("valid", "test"):
        assert asked(protocol, split) == asked(everyone, split) & few
    kept = [row for row in rows_of(everyone) if row[1] in few]
    assert rows_of(protocol) == kept  # the rows that stay are asked as before
    _, shot = prepared(settings, model, min_disliked=8, few_shot=5)
    assert len(learners(shot)) == 5 and learners(shot) <= few
    assert np.array_equal(shot.popularity, everyone.popularity)
    with pytest.raises(UserError, match="--min_disliked=50.*none has 50 items"):
        prepared(settings, model, min_disliked=50)
    if liked_only:
        modes = {"valid": "uni4", "test": "low60"}
        with pytest.raises(UserError, match="^--eval_args mode low60: .*none has 60 items"):
            prepared({**settings, "eval_args": {"mode": modes}}, model, min_disliked=2)


# ---- who trains and who is asked


def test_few_shot_users_are_nested(many: dict[str, Any]) -> None:
    sets = [learners(prepared(many, "BPR", few_shot=n)[1]) for n in (4, 16, 40)]
    assert [len(s) for s in sets] == [4, 16, 40] and sets[0] < sets[1] < sets[2]
    assert learners(prepared(many, "BPR", few_shot=16, few_shot_seed=1)[1]) != sets[1]


def test_few_shot_users_are_not_those_asked(many: dict[str, Any]) -> None:
    """Both seeds are 2020 by default; were the draws the same, the users trained on would be those tested."""
    _, protocol = prepared(many, "BPR", few_shot=20, eval_users=20)
    assert len(learners(protocol) & asked(protocol, "test")) < 14


def test_valid_users(many: dict[str, Any]) -> None:
    """Another number of users validates; without disjoint_users they are among, or include, those tested."""
    _, fewer = prepared(many, "BPR", eval_users=20, valid_users=5)
    _, more = prepared(many, "BPR", eval_users=20, valid_users=30)
    _, plain = prepared(many, "BPR", eval_users=20)
    assert [len(p.valid) for p in (fewer, more, plain)] == [5, 30, 20]
    assert asked(fewer, "valid") < asked(plain, "valid") < asked(more, "valid")
    assert fewer.candidate_hash == more.candidate_hash == plain.candidate_hash


DISJOINT = {"disjoint_users": True, "few_shot": 10, "eval_users": 25, "valid_users": 8}


def test_disjoint_users(many: dict[str, Any]) -> None:
    """Three sets, the same for every model; few_shot moves neither of the two that are asked."""
    found = {model: prepared(many, model, **DISJOINT)[1] for model in ("SASRec", "BPR", "Pop")}
    assert len({str((sorted(learners(p)), rows_of(p))) for p in found.values()}) == 1
    small = found["BPR"]
    sets = [learners(small), asked(small, "valid"), asked(small, "test")]
    assert [len(s) for s in sets] == [10, 8, 25] and len(set.union(*sets)) == 43
    _, large = prepared(many, "BPR", **{**DISJOINT, "few_shot": 40})
    assert rows_of(large) == rows_of(small) and learners(small) < learners(large)
    assert not learners(large) & (asked(large, "valid") | asked(large, "test"))
    _, seeded = prepared(many, "BPR", **DISJOINT, few_shot_seed=7)
    assert rows_of(seeded) == rows_of(small) and learners(seeded) != learners(small)
    _, other = prepared(many, "BPR", **DISJOINT, candidate_seed=7)
    assert asked(other, "test") != asked(small, "test")
    _, as_many = prepared(many, "BPR", **{**DISJOINT, "valid_users": None})
    assert len(asked(as_many, "valid")) == 25 and not asked(as_many, "valid") & asked(as_many, "test")
    assert asked(as_many, "test") == asked(small, "test")


@pytest.mark.parametrize(
    "modes", [("uni4", "low8"), ("low8", "uni4"), ("low1", "low9"), ("low2", "low2"), ("uni4", "pop4")]
)
def test_a_model_that_serves_a_run_has_its_users(many: dict[str, Any], modes: tuple[str, str]) -> None:
    """Who is tested where the test asks for N low ratings trains no judge of the pairs and no base of a re-ranking."""
    settings = {**DISJOINT, "few_shot": 18, "eval_args": {"mode": dict(zip(("valid", "test"), modes, strict=True))}}
    config, run = prepared(many, "LLMRanker", llm="tiny", loss="DMPO", rejected="from_model", **settings)
    serving = prepare_data(recommender_config(config, "SASRec"))
    assert learners(serving) == learners(run) and len(learners(run)) == 18
    assert serving.valid.digest == run.valid.digest
    assert asked(serving, "test") == asked(run, "test")
    assert not learners(serving) & (asked(run, "test") | asked(run, "valid"))


def test_a_test_that_draws_no_users_names_no_serving_model(many: dict[str, Any]) -> None:
    """With disjoint users too it is shared by runs whose tests ask alike many low ratings, or none."""
    names = []
    for changes in (("uni4", "pop4", 0), ("uni4", "full", 0), ("uni4", "low1", 1), ("uni4", "low2", 2)):
        settings = {"eval_args": {"mode": dict(zip(("valid", "test"), changes, strict=False))}}
        config, _ = prepared(many, "LLMRanker", llm="tiny", **DISJOINT, **settings, min_disliked=changes[2])
        own = recommender_config(config, "SASRec")
        assert own["eval_args"]["mode"] == {"valid": "uni4", "test": "uni4"}
        names.append(run_hash(own))
    assert names[0] == names[1]


def test_disjoint_users_follow_tokens(many: dict[str, Any], tmp_path: Path) -> None:
    _, forward = prepared(many, "BPR", **DISJOINT)
    write_events(tmp_path / "data", many_events()[::-1])
    _, backward = prepared(many, "BPR", **DISJOINT)
    assert learners(forward) == learners(backward)
    for split in ("valid", "test"):
        assert asked(forward, split) == asked(backward, split)


def test_too_few_disjoint_users(many: dict[str, Any]) -> None:
    _, everyone = prepared(many, "BPR")
    there = len(everyone.test)
    for changes, told in (
        ({"eval_users": 500}, f"--eval_users=500: only {there} users have test rows"),
        ({"valid_users": 80}, r"--valid_users=80: only \d+ users who are not tested have validation rows"),
        ({"few_shot": 80}, r"--few_shot=80: only \d+ users have training interactions and are neither validated nor"),
        (
            {"eval_users": 50, "valid_users": None},
            r"--eval_users=50: only \d+ users who are not tested have validation",
        ),
        ({"few_shot": None}, "--few_shot=100"),
        ({"eval_users": None}, "--disjoint_users=True: say how many users are tested"),
    ):
        with pytest.raises(UserError, match=told):
            prepared(many, "BPR", **{**DISJOINT, **changes})


# ---- training on part of the users


@pytest.mark.parametrize("model", ["SASRec", "BPR"])
def test_prepare_data_on_part_of_the_users(many: dict[str, Any], model: str) -> None:
    """Ids, rows and popularity stay; training is that of the named users alone."""
    config, whole = prepared(many, model, few_shot=20)
    half = whole.train_users[::2]
    outside = np.setdiff1d(np.arange(1, len(whole.test.user_tokens)), whole.train_users)[:3]
    part = prepare_data(config, np.append(half, outside))
    assert np.array_equal(part.train_users, half)
    assert np.array_equal(part.test.user_tokens, whole.test.user_tokens)
    assert np.array_equal(part.test.item_tokens, whole.test.item_tokens)
    assert rows_of(part) == rows_of(whole) and part.candidate_hash == whole.candidate_hash
    assert np.array_equal(part.popularity, whole.popularity)
    by_user = {str(whole.test.user_tokens[u]) for u in half}
    assert trained(part) == Counter({p: n for p, n in trained(whole).items() if p[0] in by_user})
    assert sum(part.item_counter.values()) == trained(part).total()
    assert set(part.training_sequences()) == set(half.tolist())
    config, everyone = prepared(many, model)
    part = prepare_data(config, half)
    assert np.array_equal(part.train_users, half)


def test_popularity_is_that_of_all_users(many: dict[str, Any]) -> None:
    """Few-shot moves the counter of training items, not the popularity."""
    _, everyone = prepared(many, "SASRec")
    _, few = prepared(many, "BPR", few_shot=5)
    counted = Counter(item for _, item in trained(everyone).elements())
    for protocol in (everyone, few):
        assert {n: int(c) for n, c in zip(protocol.test.item_tokens, protocol.popularity, strict=True) if c} == counted
    assert sum(few.item_counter.values()) < few.popularity.sum()


def test_an_item_without_a_rating_is_not_rated_low(toy: dict[str, Any], tmp_path: Path) -> None:
    """RecBole fills a missing rating with the mean, 1.67 here; that is nobody's opinion."""
    rows = [("a", "i1", "", 1), ("a", "i2", "1", 2), ("a", "i3", "3", 3), ("a", "i4", "1", 4), ("a", "i5", "", 5)]
    home = tmp_path / "gaps" / "toy"
    home.mkdir(parents=True)
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += ["\t".join(map(str, (u + str(k), i, r, t))) for k in range(3) for u, i, r, t in rows]
    lines += [f"other\ti{k}\t3\t{k}" for k in range(6, 12)]
    (home / "toy.inter").write_text("\n".join(lines) + "\n")
    _, protocol = prepared(toy, "Pop", data_path=str(tmp_path / "gaps"), rating_threshold=2, eval_args={"mode": "uni1"})
    user = protocol.dataset.token2id("user_id", "a0")
    low = protocol.dataset.id2token("item_id", protocol.events.disliked(user, 5))
    assert sorted(low.tolist()) == ["i2", "i4"]
    _, liked = prepared(
        toy, "Pop", data_path=str(tmp_path / "gaps"), rating_threshold=2, liked_only=True, eval_args={"mode": "uni1"}
    )
    user = liked.dataset.token2id("user_id", "a0")
    assert liked.dataset.id2token("item_id", liked.events.items_of(user)).tolist() == ["i1", "i3", "i5"]
