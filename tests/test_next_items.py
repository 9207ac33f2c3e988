"""``next_items``: one list a user that holds the next P items; and one next item is what it was."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.evaluator import Evaluator
from recbole.evaluator.collector import DataStruct
from sklearn.metrics import ndcg_score, roc_auc_score

from recbole_llm.config import LLMConfig
from recbole_llm.data.candidates import EvalRows
from recbole_llm.data.protocol import Protocol
from recbole_llm.errors import ConfigError, UserError
from recbole_llm.evaluator import PerUserEvaluator, Ranking
from recbole_llm.harm import hallucination
from recbole_llm.oracle import _negatives
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.report.caption import protocol_sentences
from recbole_llm.report.entries import parse_models
from recbole_llm.report.grid import Setting
from recbole_llm.report.results import Line, Results
from recbole_llm.settings import read_yaml
from tests.conftest import Event, accuracy, prepared, random_events, started, write_events

pytestmark = pytest.mark.usefixtures("one_thread")
METRICS = ["Hit", "NDCG", "MRR", "MAP", "Recall", "Precision", "GAUC"]
FOUR = {"next_items": 4, "eval_args": {"mode": "uni6"}}
# Validation and test rows of the toy data, by the code before `next_items` was there (numpy 2.x draws them).
BEFORE = {
    "uni9": (
        "780c282e27fafbee3dc75d3abfe859ad5ee8ced2052821b3a854c1aece96b9d9",
        "a85b53d877345aa1d32d6bf1e9eaca1fe56c443db25a0b4d021e7cb68bab389a",
    ),
    "pop5": (
        "fd01919e21f4772c85ca5b56f42e14d16d0f17cad304bcfd4cba07ce915655e9",
        "4691df513a42edc8899551f090420ce2bab2a6d0d9916597793233a01187cdb9",
    ),
    "full": (
        "3beb596a6ace304312a92ec51959e57385269018fbf24528e42153d6f566f23f",
        "077867e92c20ed85eca0b3a15522dae76d004d70b312ee1109361d6acb2ee40b",
    ),
}


def sequence(user: str, items: Iterable[str]) -> list[Event]:
    """Events of one user at times 0, 1, ..."""
    return [(user, item, 3.0, float(time)) for time, item in enumerate(items)]


def asked(rows: EvalRows) -> dict[str, tuple[list[str], list[str]]]:
    """User -> items of the history that a model sees, and targets, by token."""
    seen = rows.item_tokens[rows.visible["item_id_list"].numpy()]
    lengths = rows.visible["item_length"].tolist()
    return {
        str(record["user"]): (history[:length].tolist(), record["targets"])
        for record, history, length in zip(rows.records(), seen, lengths, strict=True)
    }


def trained(protocol: Protocol) -> dict[str, list[str]]:
    """User -> items that the training loader holds, sorted; the first of a sequence is no row's target."""
    feat, rows = protocol.train_data._dataset.inter_feat, protocol.test
    pairs = list(zip(feat["user_id"].tolist(), feat["item_id"].tolist(), strict=True))
    if "item_id_list" in feat:
        first = feat["item_length"] == 1
        pairs += zip(feat["user_id"][first].tolist(), feat["item_id_list"][first, 0].tolist(), strict=True)
    found: dict[str, list[str]] = {}
    for user, item in pairs:
        found.setdefault(str(rows.user_tokens[user]), []).append(str(rows.item_tokens[item]))
    return {user: sorted(items) for user, items in found.items()}


# The split


@pytest.mark.parametrize("model", ["SASRec", "BPR"])
def test_split_by_hand(toy: dict[str, Any], tmp_path: Path, model: str) -> None:
    """P = 2: the last two are the test, the two before validation; who has too few loses validation, then the test."""
    lengths = {"u8": 8, "u6": 6, "u5": 5, "u4": 4, "u3": 3}
    events = [e for user, n in lengths.items() for e in sequence(user, [f"{user}-{i}" for i in range(n)])]
    write_events(tmp_path / "data", events)
    _, protocol = prepared(toy, model, next_items=2, eval_args={"mode": "uni3"})

    def items(user: str, *places: int) -> list[str]:
        return [f"{user}-{i}" for i in places]

    assert asked(protocol.valid) == {
        "u8": (items("u8", 0, 1, 2, 3), items("u8", 4, 5)),
        "u6": (items("u6", 0, 1), items("u6", 2, 3)),
    }
    assert asked(protocol.test) == {
        "u8": (items("u8", *range(6)), items("u8", 6, 7)),
        "u6": (items("u6", *range(4)), items("u6", 4, 5)),
        "u5": (items("u5", 0, 1, 2), items("u5", 3, 4)),
        "u4": (items("u4", 0, 1), items("u4", 2, 3)),
    }
    expected = {"u8": range(4), "u6": range(2), "u5": range(3), "u4": range(2), "u3": range(3)}
    assert trained(protocol) == {user: items(user, *places) for user, places in expected.items()}
    assert [h.tolist() for h in protocol.test.history] == [
        protocol.events.items_of(u)[: len(protocol.events.items_of(u)) - 2].tolist() for u in protocol.test.users
    ]


def test_too_short_is_told(toy: dict[str, Any], tmp_path: Path) -> None:
    write_events(tmp_path / "data", random_events([9] * 10))
    with pytest.raises(UserError, match=r"no valid interactions.*at least 10 events \(--next_items=4\)"):
        prepared(toy, "Pop", **FOUR)


@pytest.mark.parametrize("mode", BEFORE)
def test_one_next_item_is_what_it_was(toy: dict[str, Any], mode: str) -> None:
    """Candidates, targets and their hash; a changed hash would part new runs from finished ones."""
    _, protocol = prepared(toy, "Pop", eval_args={"mode": mode})
    assert (protocol.valid.digest, protocol.test.digest) == BEFORE[mode]
    assert (protocol.test.relevant == protocol.test.targets[:, None]).all()
    assert set(next(protocol.test.records())) == {"user", "target", "candidates"}


# Candidates


@pytest.mark.parametrize("mode", ["uni6", "pop6"])
def test_lists_hold_the_targets_and_unseen_items(toy: dict[str, Any], mode: str) -> None:
    _, protocol = prepared(toy, "SASRec", next_items=4, eval_args={"mode": mode})
    met = {str(protocol.test.user_tokens[u]): set(protocol.events.met(u)) for u in protocol.test.users}
    places = []
    for rows in (protocol.valid, protocol.test):
        assert len(rows) == 40 and rows.candidates.shape == (40, 10) and rows.relevant.shape == (40, 4)
        for row, record in enumerate(rows.records()):
            candidates = set(rows.candidates[row])
            assert len(candidates) == 10 and candidates & met[record["user"]] == set(rows.relevant[row])
            assert record["targets"] == rows.item_tokens[rows.relevant[row]].tolist()
            places += np.flatnonzero(np.isin(rows.candidates[row], rows.relevant[row])).tolist()
    assert np.bincount(places, minlength=10).min() > 15  # 32 are expected at each place


@pytest.mark.parametrize("mode", ["uni6", "pop6"])
def test_draw_does_not_look_at_the_targets(toy: dict[str, Any], tmp_path: Path, mode: str) -> None:
    """Other next items that nobody else is asked about, and every other candidate stays in its place."""
    events = random_events([14] * 60)
    # Two users have met everything, so that the catalogue stays the same.
    extra = sequence("low", [f"i{n}" for n in range(40)])
    extra += sequence("high", [*(f"i{n}" for n in range(20, 60)), "new0", "new1", "new2", "new3"])
    lists = []
    for swap in (False, True):
        # The last 4 of 14 events; event n of user u has the time 60 n + u.
        changed = [(u, f"new{int(t // 60) - 10}" if swap and t >= 600 else i, r, t) for u, i, r, t in events]
        write_events(tmp_path / "data", changed + extra)
        _, protocol = prepared(toy, "Pop", next_items=4, eval_args={"mode": mode})
        rows = protocol.test
        lists.append({r["user"]: (r["candidates"], r["targets"]) for r in rows.records() if r["user"][0] == "u"})
    still = 0
    for user, (before, old) in lists[0].items():
        after, new = lists[1][user]
        assert old != new
        touched = {*old, *new} & ({*before} - {*old} | {*after} - {*new})
        if not touched:  # neither an old target, now free, nor a new one was drawn
            still += 1
            kept = [(place, item) for place, item in enumerate(before) if item not in old]
            assert kept == [(place, item) for place, item in enumerate(after) if item not in new]
    assert still >= 8


def test_repeated_item_counts_once(toy: dict[str, Any], tmp_path: Path) -> None:
    """Three distinct targets of four: lists stay as long, by one more drawn item; the ideal ranking scores 1."""
    events = random_events([12] * 20)
    stretch = ["i1", "i2", "i1", "i3"]
    repeats = sequence("again", [f"i{n}" for n in range(50, 58)] + stretch)
    write_events(tmp_path / "data", events + repeats)
    _, protocol = prepared(toy, "Pop", **FOUR, metrics=METRICS, topk=[3, 4], valid_metric="MAP@3")
    rows = protocol.test
    (row,) = (n for n, u in enumerate(rows.users) if rows.user_tokens[u] == "again")
    record = list(rows.records())[row]
    assert record["targets"] == ["i1", "i2", "i3"] and len(set(record["candidates"])) == 10
    assert {*record["candidates"]} & {e[1] for e in repeats} == {"i1", "i2", "i3"}
    ranking = Ranking()
    items = torch.as_tensor(rows.candidates)
    columns = torch.as_tensor(np.argmax(rows.candidates[:, None] == rows.relevant[:, :, None], axis=2))
    scores = torch.zeros(items.shape).scatter(1, columns, 1.0) + torch.rand(items.shape) / 2
    ranking.add(np.arange(len(rows)), scores, columns, items, 4)
    config = LLMConfig("Pop", config_dict={**toy, **FOUR, "metrics": METRICS, "topk": [3, 4], "valid_metric": "MAP@3"})
    result, table = PerUserEvaluator(config).evaluate_ranking(ranking, rows, 61, {})
    assert table["target"][row] == "i1 i2 i3"
    assert table["precision@4"][row] == 0.75 and table["recall@3"][row] == 1
    assert result["ndcg@4"] == result["map@4"] == result["recall@4"] == result["gauc"] == 1


def test_hash_tells_the_targets(toy: dict[str, Any]) -> None:
    """Lists of ten may be 4 and 6, or 1 and 9; and P moves the hash in full mode as well."""
    args = [(1, "uni9"), (4, "uni6"), (2, "uni8"), (4, "pop6"), (4, "full"), (2, "full"), (1, "full")]
    found = {prepared(toy, "Pop", next_items=p, eval_args={"mode": m})[1].candidate_hash for p, m in args}
    assert len(found) == len(args)


# What a model sees


@pytest.mark.parametrize("model", ["SASRec", "BPR"])
def test_targets_do_not_leak(toy: dict[str, Any], tmp_path: Path, model: str) -> None:
    """Held-out events carry marks of their own: items, ratings and times that no visible or training row may hold."""
    events = []
    for user in range(30):
        items = [f"i{(user * 7 + n) % 40}" for n in range(6)]
        held = [f"held{(user + n) % 30}" for n in range(4)]
        events += [(f"u{user}", item, 3.0, float(n)) for n, item in enumerate(items)]
        events += [(f"u{user}", item, 77.0, 9000.0 + n) for n, item in enumerate(held)]
    write_events(tmp_path / "data", events)
    _, protocol = prepared(toy, model, next_items=4, eval_args={"mode": "uni6"}, MAX_ITEM_LIST_LENGTH=50)
    rows = protocol.test
    marked = {n for n, token in enumerate(rows.item_tokens) if str(token).startswith("held")}
    assert set(rows.relevant.reshape(-1)) == marked and {"rating_list", "timestamp_list"} <= set(
        rows.visible.interaction
    )
    assert set(rows.visible.interaction) == {
        "user_id",
        "item_id_list",
        "rating_list",
        "timestamp_list",
        "item_length",
    }
    for split in (protocol.valid, protocol.test):
        assert not marked & set(split.visible["item_id_list"].reshape(-1).tolist())
        assert split.visible["rating_list"].max() < 77 and split.visible["timestamp_list"].max() < 9000
    feat = protocol.train_data._dataset.inter_feat
    held_out = marked | set(protocol.valid.relevant.reshape(-1)) - {
        int(i) for items in protocol.training_sequences().values() for i in items
    }
    for name in ("item_id", "item_id_list"):
        assert name not in feat or not held_out & set(feat[name].reshape(-1).tolist())
    assert feat["rating"].max() < 77 and feat["timestamp"].max() < 9000
    assert all(len(items) == 2 for items in protocol.training_sequences().values())
    assert not marked & set(protocol.item_counter)


def test_full_mode_hides_history_and_no_target(toy: dict[str, Any], tmp_path: Path) -> None:
    """A target that the user met before is asked for all the same."""
    events = random_events([12] * 20, seed=3) + sequence(
        "again", [f"i{n}" for n in range(12)] + ["i3", "i4", "i40", "i41"]
    )
    write_events(tmp_path / "data", events)
    _, protocol = prepared(toy, "SASRec", next_items=4, eval_args={"mode": "full"})
    rows = protocol.test
    for row, hidden in enumerate(rows.hidden):
        assert set(hidden) == set(rows.history[row]) - set(rows.relevant[row])
    trainer = started(*prepared(toy, "BPR", next_items=4, eval_args={"mode": "full"}, metrics=METRICS))
    result = trainer.evaluate(trainer.protocol.test, load_best_model=False)
    assert len(trainer.per_user) == 21 and all(0 <= value <= 1 for value in accuracy(result).values())


# Metrics


def rank(settings: dict[str, Any], scores: Any, relevant: Any, **changes: Any) -> tuple[dict[str, float], pd.DataFrame]:
    """Our result and table for scores of items 1, 2, ... ``[R, C]``, whose columns ``relevant [R, P]`` are targets."""
    config = LLMConfig("Pop", config_dict={**settings, "metric_decimal_place": 12, **changes})
    scores, columns = torch.as_tensor(scores, dtype=torch.float32), torch.as_tensor(relevant)
    items = torch.arange(1, scores.shape[1] + 1).expand(len(scores), -1)
    users, names = np.arange(1, len(scores) + 1), np.array([f"n{i}" for i in range(max(scores.shape) + 1)])
    targets = columns.numpy() + 1
    rows = EvalRows(
        "test",
        "uni6",
        Interaction({"user_id": torch.as_tensor(users)}),
        users,
        targets,
        None,
        [],
        names,
        names,
    )
    ranking = Ranking()
    numbers = np.random.default_rng(0).permutation(len(scores))
    for part in (numbers[:2], numbers[2:]):  # two batches, in an order of their own
        if len(part):
            ranking.add(part, scores[part], columns[part], items[part], max(config["topk"]))
    return PerUserEvaluator(config).evaluate_ranking(ranking, rows, scores.shape[1] + 1, {})


def random_lists(rows: int, size: int, targets: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores without ties and the columns of the targets."""
    draw = np.random.default_rng(0)
    scores = draw.permuted(np.tile(np.arange(float(size)), (rows, 1)), axis=1)
    return scores, draw.permuted(np.tile(np.arange(size), (rows, 1)), axis=1)[:, :targets]


@pytest.mark.parametrize(("size", "targets"), [(10, 4), (5, 4), (30, 2)])
def test_metrics_equal_recbole(toy: dict[str, Any], size: int, targets: int) -> None:
    """RecBole's Evaluator on the lists that its collector would make; K beyond the list and the targets included."""
    scores, relevant = random_lists(50, size, targets)
    changes = {"metrics": METRICS, "topk": [1, 3, 5, 7], "valid_metric": "MAP@5", "metric_decimal_place": 12}
    result, table = rank(toy, scores, relevant, **changes)
    order = np.argsort(-scores, axis=1)
    hits = np.array([np.isin(o, r) for o, r in zip(order, relevant, strict=True)])[:, :7]
    hits = np.pad(hits, ((0, 0), (0, 7 - hits.shape[1])))
    places = np.argsort(order, axis=1) + 1
    ranks = np.take_along_axis(places, relevant, axis=1)
    struct = DataStruct()
    struct.set("rec.topk", torch.as_tensor(np.column_stack([hits, np.full(50, targets)])).int())
    struct.set("rec.meanrank", torch.as_tensor([[r.sum(), size, targets] for r in ranks]).double())
    theirs = Evaluator(LLMConfig("Pop", config_dict={**toy, **changes})).evaluate(struct)
    assert result == pytest.approx({name: float(value) for name, value in theirs.items()}, abs=1e-9)
    assert result == pytest.approx({n: table[n].mean() for n in result if n != "gauc"} | {"gauc": result["gauc"]})
    assert table["rank"].tolist() == ranks.min(1).tolist() and (table["tied"] == 1).all()
    assert table["target"].tolist() == [" ".join(f"n{c + 1}" for c in row) for row in relevant]


def test_metrics_equal_sklearn(toy: dict[str, Any]) -> None:
    """NDCG@k and the area under the curve, written by others."""
    scores, relevant = random_lists(50, 10, 4)
    changes = {"metrics": ["NDCG", "GAUC"], "topk": [3, 5], "valid_metric": "NDCG@5"}
    result, table = rank(toy, scores, relevant, **changes)
    labels = np.zeros((50, 10))
    np.put_along_axis(labels, relevant, 1, axis=1)
    for k in (3, 5):
        each = [ndcg_score(y[None], s[None], k=k) for y, s in zip(labels, scores, strict=True)]
        assert table[f"ndcg@{k}"].tolist() == pytest.approx(each)
    assert result["gauc"] == pytest.approx(np.mean([roc_auc_score(y, s) for y, s in zip(labels, scores, strict=True)]))


def test_metrics_by_hand(toy: dict[str, Any]) -> None:
    """Targets at places 2, 3, 6 and 10 of ten."""
    scores = -np.arange(10.0)[None]
    changes = {"metrics": ["MAP", "NDCG", "MRR", "Recall", "Hit"], "topk": [1, 3, 5, 7], "valid_metric": "MAP@5"}
    result, table = rank(toy, scores, [[5, 2, 9, 1]], **changes)
    gains = [1 / np.log2(n + 1) for n in range(1, 8)]
    assert (
        result
        == pytest.approx(
            {
                "map@1": 0,
                "map@3": (1 / 2 + 2 / 3) / 3,  # three places could hold three targets
                "map@5": (1 / 2 + 2 / 3) / 4,
                "map@7": (1 / 2 + 2 / 3 + 3 / 6) / 4,
                "ndcg@1": 0,
                "ndcg@3": (gains[1] + gains[2]) / sum(gains[:3]),
                "ndcg@5": (gains[1] + gains[2]) / sum(gains[:4]),
                "ndcg@7": (gains[1] + gains[2] + gains[5]) / sum(gains[:4]),
                "mrr@1": 0,
                **dict.fromkeys(["mrr@3", "mrr@5", "mrr@7"], 1 / 2),
                "recall@1": 0,
                "recall@3": 2 / 4,
                "recall@5": 2 / 4,
                "recall@7": 3 / 4,
                "hit@1": 0,
                **dict.fromkeys(["hit@3", "hit@5", "hit@7"], 1),
            }
        )
    )
    assert table["rank"].tolist() == [2] and table["target"].tolist() == ["n6 n3 n10 n2"]


def test_constant_scores_are_chance(toy: dict[str, Any]) -> None:
    """All ten tie: the order of the candidates, which says nothing, decides; `rank` and GAUC are exact."""
    draw = np.random.default_rng(5)
    relevant = draw.permuted(np.tile(np.arange(10), (4000, 1)), axis=1)[:, :4]
    changes = {"metrics": ["Recall", "Hit", "GAUC"], "topk": [1, 3, 5], "valid_metric": "Hit@5"}
    result, table = rank(toy, np.zeros((4000, 10)), relevant, **changes)
    for k in (1, 3, 5):
        assert result[f"recall@{k}"] == pytest.approx(k / 10, abs=0.015)
    assert result["gauc"] == pytest.approx(0.5)
    assert table["rank"].tolist() == pytest.approx([11 / 5] * 4000)  # of the first of 4 among 10
    assert (table["tied"] == 10).all()


def test_ties_do_not_hang_on_batches(toy: dict[str, Any]) -> None:
    settings = {**toy, **FOUR, "metrics": ["MAP"], "topk": [5], "valid_metric": "MAP@5"}
    found = []
    for size in (1, 7, 4096):
        trainer = started(*prepared(settings, "BPR", eval_batch_size=size))
        for weights in trainer.model.parameters():
            weights.data.zero_()
        found.append((trainer.evaluate(trainer.protocol.test, load_best_model=False), trainer.per_user))
    assert found[0][0] == found[1][0] == found[2][0]
    assert all(found[0][1].equals(table) for _, table in found[1:])


def test_bad_scores_of_any_target_are_told(toy: dict[str, Any]) -> None:
    scores = np.random.default_rng(0).random((3, 10))
    scores[1, 7] = -np.inf
    assert rank(toy, scores, [[0, 1], [2, 3], [4, 5]])[1]["answers"].tolist() == [10, 9, 10]
    with pytest.raises(UserError, match="not a number"):
        rank(toy, scores, [[0, 1], [2, 7], [4, 5]])


def test_other_measures_know_all_targets(toy: dict[str, Any]) -> None:
    """What looks alike and is a target is no hallucination; an oracle's pairs hold no target as the other."""
    alike, top = np.array([[5, 6, 7, 8]]), np.array([[5, 6, 1, 7]])
    assert hallucination(top, np.array([[6, 7, 7]]), alike).tolist() == [1 / 4]
    for mode in ("uni6", "full"):
        _, protocol = prepared(toy, "SASRec", next_items=4, eval_args={"mode": mode})
        others = [_negatives(protocol.valid, row, 0) for row in range(40)]
        assert {len(o) for o in others} == {6 if mode == "uni6" else 19}
        assert not any(set(o) & set(r) for o, r in zip(others, protocol.valid.relevant, strict=True))


# Settings and runs


@pytest.mark.parametrize(
    ("model", "changes", "told"),
    [
        ("Pop", {"next_items": 0}, "--next_items=0: must be a whole number >= 1"),
        ("Pop", {"next_items": 2.5}, "--next_items=2.5: must be a whole number >= 1"),
        ("Pop", {"eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}}}, "--next_items=4: split .* no fixed number"),
        ("Pop", {"eval_args": {"mode": "low6"}, "liked_only": True}, "--next_items=4: mode lowN .* or --next_items=1"),
        ("LLMRanker", {"generate_users": 5}, "--next_items=4: --generate_users .* or --next_items=1"),
        ("LLMRanker", {"prompt": "pair", "eval_args": {"mode": "uni1"}}, "--next_items: a pair prompt"),
    ],
)
def test_wrong_settings_are_told(toy: dict[str, Any], model: str, changes: dict[str, Any], told: str) -> None:
    settings = {**toy, **FOUR, **changes, **({"llm": "tiny"} if model == "LLMRanker" else {})}
    with pytest.raises(ConfigError, match=told):
        LLMConfig(model, config_dict=settings)


def test_runs_from_end_to_end(toy: dict[str, Any]) -> None:
    """Pop and SASRec on the same lists; validation selects by MAP@5, and everything is in the run folder."""
    settings = {**toy, **FOUR, "metrics": ["MAP", "NDCG"], "topk": [1, 3, 5, 7], "valid_metric": "MAP@5"}
    small = {"hidden_size": 16, "inner_size": 32, "n_layers": 1, "n_heads": 1, "epochs": 30, "learning_rate": 0.01}
    results = {
        model: run_recbole_llm(model, config_dict={**settings, **own})
        for model, own in (("Pop", {}), ("SASRec", small))
    }
    assert len({r["candidate_hash"] for r in results.values()}) == 1
    for result in results.values():
        folder = Path(result["run_folder"])
        record = json.loads((folder / "result.json").read_text())
        assert record["next_items"] == 4 and record["rows"] == 40
        shown = Results(Setting(None, None, False, None), [Line("A", [record], [])])
        assert "the next 4 items among 6 others" in protocol_sentences(shown)[1]
        assert result["best_valid_score"] == result["best_valid_result"]["map@5"]
        names = [f"{name}@{k}" for name in ("map", "ndcg") for k in (1, 3, 5, 7)]
        assert list(accuracy(result["test_result"])) == names
        table = pd.read_csv(folder / "per_user.csv.gz")
        assert len(table) == 40 and (table["target"].str.split().str.len() == 4).all()
        assert table[names].mean().to_dict() == pytest.approx(accuracy(result["test_result"]), abs=1e-6)
        with gzip.open(folder / "candidates-test.jsonl.gz", "rt") as lines:
            first = json.loads(next(lines))
        assert len(first["targets"]) == 4 and len(first["candidates"]) == 10
    # The toy data go round a cycle: the next items are predictable by what was met last, not by popularity.
    assert results["SASRec"]["test_result"]["map@5"] > results["Pop"]["test_result"]["map@5"] + 0.2


def test_ready_comparison_is_accepted() -> None:
    file = Path(__file__).resolve().parents[1] / "properties" / "compare" / "rerank_lists.yaml"
    settings = read_yaml(str(file))
    dataset, per_model = settings.pop("dataset"), settings.pop("per_model")
    entries = parse_models(settings.pop("models"))
    for entry in entries:
        config = LLMConfig(entry.model, dataset, None, {**settings, **per_model.get(entry.model, {}), **entry.settings})
        assert (config["next_items"], config["eval_args"]["mode"]) == (4, {"valid": "uni6", "test": "uni6"})
        assert config["valid_metric"] == "MAP@5" and config["topk"] == [1, 3, 5, 7]
    assert [entry.label for entry in entries] == ["Pop", "SASRec", "GRU4Rec"]
