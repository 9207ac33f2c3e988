"""One protocol: exact time order, RecBole's own training, one split and few-shot sample, run folders."""

from __future__ import annotations

import gzip
import json
import logging
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from recbole.config import Config
from recbole.data import create_dataset as recbole_dataset
from recbole.data import data_preparation
from recbole.trainer import Trainer
from recbole.utils import get_trainer, init_seed

from recbole_llm import environment, quick_start
from recbole_llm.config import LLMConfig
from recbole_llm.data.candidates import EvalRows
from recbole_llm.data.protocol import Protocol, prepare_data
from recbole_llm.errors import ConfigError, UserError
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.run_folder import data_hash
from recbole_llm.settings import PROPERTIES, read_yamls
from tests.conftest import Event, accuracy, prepared, random_events, started, write_dataset, write_events

SMALL_SASREC = {"hidden_size": 16, "inner_size": 32, "n_layers": 1, "n_heads": 1}
LS = {"LS": "valid_and_test"}
pytestmark = pytest.mark.usefixtures("one_thread")


def tokens(protocol: Protocol, users: np.ndarray, items: np.ndarray) -> list[tuple[str, str]]:
    """(user, item) pairs as the file spells them."""
    rows = protocol.test
    return list(zip(rows.user_tokens[users].tolist(), rows.item_tokens[items].tolist(), strict=True))


def trained_on(protocol: Protocol) -> Counter[tuple[str, str]]:
    """The interactions that a model's training loader holds; a sequence's first item is no row's target."""
    feat = protocol.train_data._dataset.inter_feat
    pairs = tokens(protocol, feat["user_id"].numpy(), feat["item_id"].numpy())
    if "item_id_list" in feat:
        first = feat["item_length"] == 1
        pairs += tokens(protocol, feat["user_id"][first].numpy(), feat["item_id_list"][first, 0].numpy())
    return Counter(pairs)


def targets(rows: EvalRows) -> dict[str, str]:
    """Target of each user, where every user has one row."""
    return {str(record["user"]): str(record["target"]) for record in rows.records()}


def rows_of(protocol: Protocol) -> list[tuple[Any, ...]]:
    """Everything evaluation asks of a model, by token and in order."""
    told: list[tuple[Any, ...]] = []
    for rows in (protocol.valid, protocol.test):
        history = rows.item_tokens[rows.visible["item_id_list"].numpy()]
        told += [
            (rows.split, rows.mode, r["user"], r["target"], r["candidates"], h.tolist())
            for r, h in zip(rows.records(), history, strict=True)
        ]
    return told


def by_user(events: list[Event]) -> dict[str, list[str]]:
    """Items of each user by exact time; equal times stay in file order."""
    found: dict[str, list[str]] = {}
    for user, item, _, _ in sorted(events, key=lambda e: e[3]):
        found.setdefault(user, []).append(item)
    return found


# Time


def test_exact_time_order(toy: dict[str, Any], tmp_path: Path) -> None:
    """Unix times 20 s apart are one and the same float32: RecBole holds out wrong targets, we the last."""
    rng = np.random.default_rng(1)
    events = [(u, i, r, 1_700_000_000.0 + t) for u, i, r, t in random_events([8] * 20)]
    events = [events[n] for n in rng.permutation(len(events))]  # in time order the file itself would tell
    write_events(tmp_path / "data", events)
    exact = by_user(events)
    assert len({np.float32(e[3]) for e in events}) <= 3

    config, protocol = prepared(toy, "SASRec")
    for rows, place in ((protocol.valid, -2), (protocol.test, -1)):
        assert len(rows) == 20
        for record, history in zip(rows.records(), rows.visible["item_id_list"].numpy(), strict=True):
            items = exact[record["user"]]
            assert record["target"] == items[place]
            assert rows.item_tokens[history[history > 0]].tolist() == items[:place]
    sequences = {
        protocol.test.user_tokens[u]: protocol.test.item_tokens[items].tolist()
        for u, items in protocol.training_sequences().items()
    }
    assert sequences == {user: items[:-2] for user, items in exact.items()}

    feat = recbole_dataset(config).build()[2].inter_feat
    theirs = tokens(protocol, feat["user_id"].numpy(), feat["item_id"].numpy())
    wrong = sum(exact[user][-1] != item for user, item in theirs)
    assert len(theirs) == 20 and wrong >= 10, "RecBole sorts exactly now: the sort of our own can go"


def test_equal_times_keep_file_order(toy: dict[str, Any], tmp_path: Path) -> None:
    events = [(user, item, 3.0, 5.0) for user, item, _, _ in random_events([6] * 10)]
    write_events(tmp_path / "data", events)
    _, protocol = prepared(toy, "SASRec")
    assert targets(protocol.test) == {user: items[-1] for user, items in by_user(events).items()}


@pytest.mark.parametrize("keep", ["first", "last"])
def test_equal_times_keep_file_order_where_doubles_go(toy: dict[str, Any], tmp_path: Path, keep: str) -> None:
    """``rm_dup_inter`` takes later (earlier) meetings of an item out and moves nothing else."""
    events = [(user, item, 3.0, float(n % 3)) for n, (user, item, _, _) in enumerate(random_events([30] * 60))]
    events += [(user, item, 3.0, 3 - time) for user, item, _, time in events[::7]]
    write_events(tmp_path / "data", events)
    _, protocol = prepared(toy, "SASRec", rm_dup_inter=keep)
    found = {}
    for user, items in by_user(events).items():
        once = list(dict.fromkeys(items if keep == "first" else items[::-1]))
        found[user] = once[-1] if keep == "first" else once[0]
    assert targets(protocol.test) == found


# RecBole's own run


def recbole_run(settings: dict[str, Any], model: str) -> tuple[Any, dict[str, float], dict[str, float], Any]:
    """RecBole's own run: trainer, best validation result, test result of the last epoch, training part."""
    known = {k: v for k, v in settings.items() if k not in ("mask_history", "dataset")}
    config = Config(model=model, dataset="toy", config_dict=known)
    init_seed(config["seed"], config["reproducibility"])
    dataset = recbole_dataset(config)
    train, valid, test = data_preparation(config, dataset)
    init_seed(config["seed"] + config["local_rank"], config["reproducibility"])
    recommender = config.model_class(config, train._dataset)
    trainer: Trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, recommender)
    _, best_valid = trainer.fit(train, valid, saved=False)
    return trainer, best_valid, trainer.evaluate(test, load_best_model=False), train._dataset


@pytest.mark.parametrize("model", ["SASRec", "BPR"])
def test_equals_recbole(toy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    """Same seed, same protocol: the same weights bit for bit and the same metrics as RecBole's own run.

    Times are small whole numbers, which float32 holds, and all users have 4 events: RecBole splits shorter
    histories otherwise for general models than for sequential ones.
    """
    monkeypatch.setattr(sys, "argv", ["pytest"])  # RecBole's Config reads it
    write_events(tmp_path / "data", random_events(4 + n % 9 for n in range(60)))
    if sequential := model == "SASRec":
        own = {**SMALL_SASREC, "loss_type": "CE", "train_neg_sample_args": None}
    else:
        own = {"embedding_size": 16}
    settings = {
        **toy,
        **own,
        "epochs": 2,
        "seed": 7,
        "train_batch_size": 64,
        "metric_decimal_place": 8,
        "MAX_ITEM_LIST_LENGTH": 20,
        "mask_history": not sequential,
        "eval_args": {"split": LS, "group_by": "user", "order": "TO", "mode": "full"},
        "topk": [1, 5, 10],
        "metrics": ["Hit", "NDCG", "MRR", "Recall", "GAUC"],
        "valid_metric": "NDCG@10",
        "load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]},
    }
    theirs, their_valid, their_test, their_part = recbole_run(settings, model)

    kept: list[Any] = []
    make = quick_start.trainer_for
    monkeypatch.setattr(quick_start, "trainer_for", lambda *args: kept.append(make(*args)) or kept[-1])
    ours = run_recbole_llm(model, config_dict=settings, saved=False)
    part = kept[0].protocol.train_data._dataset
    for field in ("user_id", "item_id"):
        assert torch.equal(part.inter_feat[field], their_part.inter_feat[field])
    mine, other = kept[0].model.state_dict(), theirs.model.state_dict()
    assert mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)
    assert len(their_test) == 13 and their_test["hit@10"] > 0
    for result, reference in ((ours["test_result"], their_test), (ours["best_valid_result"], their_valid)):
        mine = {name: float(value) for name, value in reference.items()}
        assert accuracy(result) == pytest.approx(mine, abs=1e-6)
    assert ours["best_valid_score"] == pytest.approx(float(theirs.best_valid_score), abs=1e-6)


# Split

SPLITS = {
    "leave-one-out": {"split": LS},
    "ratio": {"split": {"RS": [0.8, 0.1, 0.1]}},
    "ratio-of-all": {"split": {"RS": [0.8, 0.1, 0.1]}, "group_by": None},
    "time": {"split": {"TS": [0.8, 0.1, 0.1]}},
}
LENGTHS = [1, 2, 3, 4, 5] * 4 + [12] * 10 + [25] * 6


@pytest.mark.parametrize("few_shot", [None, 12])
@pytest.mark.parametrize("split", SPLITS)
def test_one_split_for_all(toy: dict[str, Any], tmp_path: Path, split: str, few_shot: int | None) -> None:
    """A general and a sequential model learn from the same interactions and are asked the same."""
    write_events(tmp_path / "data", random_events(LENGTHS))
    settings = {**toy, "eval_args": {**SPLITS[split], "mode": "uni9"}, "few_shot": few_shot, "MAX_ITEM_LIST_LENGTH": 30}
    found = {model: prepared(settings, model)[1] for model in ("SASRec", "BPR")}
    general, sequential = trained_on(found["BPR"]), trained_on(found["SASRec"])
    assert general == sequential and len(general) > 50
    assert rows_of(found["BPR"]) == rows_of(found["SASRec"])
    for protocol in found.values():
        counted = Counter(item for _, item in general.elements())
        assert {protocol.test.item_tokens[i]: n for i, n in protocol.item_counter.items()} == counted
        pairs = [(user, item) for user, items in protocol.training_sequences().items() for item in items]
        assert Counter(tokens(protocol, *np.array(pairs).T)) == general
        if few_shot:
            assert len({user for user, _ in general}) == len(protocol.train_users) == few_shot


def test_a_knowledge_graph_changes_no_question(graph: dict[str, Any]) -> None:
    """RecBole leaves out who is not linked and numbers items anew; a linked item's entity has the item's number."""
    _, without = prepared(graph, "BPR")
    _, protocol = prepared(graph, "CKE")
    assert rows_of(protocol) == rows_of(without) and trained_on(protocol) == trained_on(without)
    data = protocol.dataset
    links = Path(graph["data_path"], "toy", "toy.link").read_text(encoding="utf-8").splitlines()[1:-1]
    entities = data.field2token_id["head_id"]
    assert all(data.field2token_id["item_id"][i] == entities[e] for i, e in (line.split("\t") for line in links))
    heads = data.field2id_token["entity_id"][data.kg_feat["head_id"].numpy()]
    assert set(heads[: len(links)]) == {line.split("\t")[1] for line in links}
    assert data.entity_num == data.item_num + 4  # genres


@pytest.mark.parametrize(("model", "settings"), [("BPR", {}), ("GRU4Rec", {"loss_type": "BPR"})])
def test_popular_negatives_are_of_training(toy: dict[str, Any], model: str, settings: dict[str, Any]) -> None:
    """What is drawn as popular is what training users met before the split."""
    drawn = {"train_neg_sample_args": {"distribution": "popularity", "sample_num": 1, "alpha": 1.0}, "few_shot": 5}
    _, protocol = prepared(toy, model, **drawn, **settings)
    sampler = protocol.train_data._sampler
    trained = protocol.train_data._dataset.inter_feat["item_id"].numpy()
    share = Counter(sampler._get_candidates_list())
    assert {item: n / share.total() for item, n in share.items()} == {
        item: n / len(trained) for item, n in Counter(trained).items()
    }


def test_leave_one_out_by_hand(toy: dict[str, Any], tmp_path: Path) -> None:
    """Of 2 events both train; of 3 the last tests; of more, the one before validates; 1 alone is nothing."""
    events = random_events(LENGTHS)
    write_events(tmp_path / "data", events)
    exact = by_user(events)
    for model in ("SASRec", "BPR"):
        _, protocol = prepared(toy, model)
        train = Counter((u, i) for u, items in exact.items() if len(items) > 1 for i in items[: max(2, len(items) - 2)])
        assert trained_on(protocol) == train
        assert targets(protocol.valid) == {u: items[-2] for u, items in exact.items() if len(items) > 3}
        assert targets(protocol.test) == {u: items[-1] for u, items in exact.items() if len(items) > 2}


@pytest.mark.parametrize("model", ["SASRec", "BPR", "Pop"])
def test_short_histories_run(toy: dict[str, Any], tmp_path: Path, model: str) -> None:
    write_events(tmp_path / "data", random_events(LENGTHS))
    result = run_recbole_llm(model, config_dict={**toy, **(SMALL_SASREC if model == "SASRec" else {})})
    assert set(accuracy(result["test_result"])) == {f"{m}@{k}" for m in ("hit", "ndcg", "mrr") for k in (1, 5, 10)}


def test_no_validation_rows_is_told(toy: dict[str, Any], tmp_path: Path) -> None:
    write_events(tmp_path / "data", random_events([3] * 10))
    with pytest.raises(UserError, match="at least 4 events"):
        prepared(toy, "BPR")


# Few-shot


def few_shot_users(protocol: Protocol) -> set[str]:
    return {user for user, _ in trained_on(protocol)}


def test_few_shot_users_are_shared(toy: dict[str, Any], tmp_path: Path) -> None:
    """Neither the model nor its seed moves the sample, ``few_shot_seed`` does; evaluation stays as it was."""
    events = random_events(LENGTHS)
    write_events(tmp_path / "data", events)
    drawn = {}
    for model, seed in (("SASRec", 1), ("BPR", 2), ("Pop", 3), ("GRU4Rec", 4)):
        np.random.seed(seed)
        _, protocol = prepared(toy, model, few_shot=6, seed=seed)
        drawn[model] = few_shot_users(protocol)
        assert sum(protocol.item_counter.values()) == trained_on(protocol).total()
    assert len(drawn["SASRec"]) == 6
    assert len(set(map(frozenset, drawn.values()))) == 1
    _, other = prepared(toy, "BPR", few_shot=6, few_shot_seed=1)
    assert few_shot_users(other) != drawn["BPR"]
    _, everyone = prepared(toy, "BPR")
    assert rows_of(other) == rows_of(everyone) and other.candidate_hash == everyone.candidate_hash
    assert few_shot_users(other) < few_shot_users(everyone)


def test_few_shot_follows_tokens(toy: dict[str, Any], tmp_path: Path) -> None:
    """The file's order, which RecBole numbers users by, does not move the sample."""
    events = random_events(LENGTHS)
    write_events(tmp_path / "data", events)
    _, forward = prepared(toy, "BPR", few_shot=6)
    write_events(tmp_path / "data", events[::-1])
    _, backward = prepared(toy, "BPR", few_shot=6)
    assert forward.test.user_tokens.tolist() != backward.test.user_tokens.tolist()
    assert trained_on(forward) == trained_on(backward)


def test_few_shot_too_large(toy: dict[str, Any], tmp_path: Path) -> None:
    write_events(tmp_path / "data", random_events([1] * 5 + [6] * 10))
    for model in ("SASRec", "BPR"):
        assert len(few_shot_users(prepared(toy, model, few_shot=10)[1])) == 10
        with pytest.raises(UserError, match="--few_shot=11: only 10 users"):
            prepared(toy, model, few_shot=11)


def test_loaders_left_by_recbole_are_not_used(toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """RecBole takes a file of loaders that it finds in ``checkpoint_dir``: that would be another split."""
    monkeypatch.setattr(sys, "argv", ["pytest"])
    settings = {
        **toy,
        "eval_args": {"split": LS, "group_by": "user", "order": "TO", "mode": "uni9"},
        "MAX_ITEM_LIST_LENGTH": 20,
        "normalize_all": False,
        "load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]},
    }
    config = Config("BPR", "toy", config_dict={**settings, "save_dataloaders": True})
    data_preparation(config, recbole_dataset(config))
    assert list(Path(toy["checkpoint_dir"]).glob("*dataloader.pth"))
    _, protocol = prepared(settings, "BPR", few_shot=3)
    assert len(few_shot_users(protocol)) == 3


@pytest.mark.parametrize("key", ["save_dataset", "save_dataloaders"])
def test_saved_data_is_refused(toy: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        LLMConfig("BPR", config_dict={**toy, key: True})


@pytest.mark.parametrize(
    ("model", "changes", "told"),
    [
        ("BPR", {"metrics": ["AUC", "NDCG"]}, "AUC is no ranking metric"),
        ("BPR", {"metrics": ["Nonsense", "NDCG"]}, "Nonsense is no ranking metric"),
        ("BPR", {"metrics": ["NDCG"], "valid_metric": "Hit@10"}, "not among --metrics"),
        ("BPR", {"eval_args": {"split": {"XX": 1}}}, "split"),
        ("FM", {}, "--model=FM"),
    ],
)
def test_what_cannot_be_ranked_is_told_first(
    toy: dict[str, Any], model: str, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        LLMConfig(model, config_dict={**toy, **changes})


# Runs and their folders


def test_code_and_data_of_a_run_are_those_of_its_start(toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Who commits, or changes a file of the data, while it goes on changes nothing of what it ran with."""
    file, real = Path(toy["data_path"]) / "toy/toy.item", quick_start.fit
    monkeypatch.setattr(environment, "git_commit", lambda: "before")
    before = data_hash(LLMConfig("Pop", config_dict=toy))

    def changed_meanwhile(*args: Any) -> Any:
        monkeypatch.setattr(environment, "git_commit", lambda: "after")
        file.write_text(file.read_text(encoding="utf-8") + "i99\tlate film\t2030\n", encoding="utf-8")
        return real(*args)

    monkeypatch.setattr(quick_start, "fit", changed_meanwhile)
    folder = Path(run_recbole_llm("Pop", config_dict=toy)["run_folder"])
    record, machine = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("result.json", "env.json"))
    assert record["data_hash"] == record["training_data_hash"] == before != data_hash(LLMConfig("Pop", config_dict=toy))
    assert machine["git_commit"] == "before" and "commit before)" in (folder / "README.md").read_text(encoding="utf-8")


def test_the_log_of_a_run_that_is_given_again_goes_on(toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process that was cut off had told stays, and it is said where the next one begins."""
    real = quick_start.fit

    def dies(*_: Any) -> Any:
        logging.getLogger().info("told before the kill")
        raise KeyboardInterrupt

    monkeypatch.setattr(quick_start, "fit", dies)
    with pytest.raises(KeyboardInterrupt):
        run_recbole_llm("Pop", config_dict=toy)
    monkeypatch.setattr(quick_start, "fit", real)
    folder = Path(run_recbole_llm("Pop", config_dict=toy)["run_folder"])
    log = (folder / "train.log").read_text(encoding="utf-8")
    first, second = log.split("The run is started again")
    assert "told before the kill" in first and "test result:" not in first
    assert "test result:" in second and "told before the kill" not in second


def test_run_folder_is_whole(toy: dict[str, Any]) -> None:
    result = run_recbole_llm("SASRec", config_dict={**toy, **SMALL_SASREC, "few_shot": 20})
    folder = Path(result["run_folder"])
    assert {f.name for f in folder.iterdir()} - {".lock"} == {
        "config.yaml",
        "env.json",
        "train.log",
        "SASRec.pth",
        "per_user.csv.gz",
        "top.csv.gz",
        "candidates-valid.jsonl.gz",
        "candidates-test.jsonl.gz",
        "README.md",
        "result.json",
    }
    record = json.loads((folder / "result.json").read_text())
    assert record["metrics"] == result["test_result"]
    assert record["valid_metrics"] == result["best_valid_result"]
    assert record["candidate_hash"] == result["candidate_hash"] != record["valid_candidate_hash"]
    expected = {
        "model": "SASRec",
        "dataset": "toy",
        "mode": "uni9",
        "few_shot": 20,
        "training_users": 20,
        "training_interactions": 20 * 10,
        "rows": 40,
    }
    assert {key: record[key] for key in expected} == expected
    weights = torch.load(folder / "SASRec.pth", weights_only=True)["state_dict"]
    assert record["trainable_parameters"] == sum(w.numel() for w in weights.values())
    told = {"seed", "candidate_seed", "few_shot_seed", "data_hash", "device", "timings", "versions"}
    assert told <= record.keys()
    assert all(seconds >= 0 for seconds in record["timings"].values())
    assert json.loads((folder / "env.json").read_text())["versions"] == record["versions"]
    with gzip.open(folder / "candidates-test.jsonl.gz", "rt") as lines:
        assert len(list(lines)) == 40
    users = pd.read_csv(folder / "per_user.csv.gz")
    assert len(users) == 40
    top = pd.read_csv(folder / "top.csv.gz").pivot(index="row", columns="place", values="item")
    with gzip.open(folder / "candidates-test.jsonl.gz", "rt") as lines:
        asked = [json.loads(line) for line in lines]
    assert top.shape == (40, 10)
    for row, question in enumerate(asked):  # 10 of 10 are ranked
        assert set(top.loc[row]) == set(question["candidates"])
        assert top.loc[row, users["rank"][row]] == question["target"]


def test_same_run_same_result(toy: dict[str, Any], tmp_path: Path) -> None:
    first = run_recbole_llm("SASRec", config_dict={**toy, **SMALL_SASREC})
    names = ("per_user.csv.gz", "candidates-test.jsonl.gz", "config.yaml")
    files = {name: (Path(first["run_folder"]) / name).read_bytes() for name in names}
    torch.rand(3), np.random.rand(3)
    again = run_recbole_llm("SASRec", config_dict={**toy, **SMALL_SASREC})
    assert again["run_folder"] == first["run_folder"] and again["test_result"] == first["test_result"]
    assert files == {name: (Path(again["run_folder"]) / name).read_bytes() for name in names}
    changed = run_recbole_llm("SASRec", config_dict={**toy, **SMALL_SASREC, "seed": 3})
    assert changed["run_folder"] != first["run_folder"]
    assert changed["candidate_hash"] == first["candidate_hash"]
    write_dataset(tmp_path / "data", seed=5)
    moved = run_recbole_llm("Pop", config_dict=toy)
    assert moved["candidate_hash"] != first["candidate_hash"]


def test_evaluates_the_best_epoch(toy: dict[str, Any]) -> None:
    """``saved``: the checkpoint of the best epoch is what is tested; it loads by itself as plain tensors."""
    settings = {**toy, **SMALL_SASREC, "epochs": 4, "learning_rate": 0.05}
    result = run_recbole_llm("SASRec", config_dict=settings)
    file = Path(result["run_folder"]) / "SASRec.pth"
    state = torch.load(file, weights_only=True)
    assert state["model"] == "SASRec" and state["best_valid_score"] == result["best_valid_score"]
    trainer = started(*prepared(settings, "SASRec"))
    assert trainer.evaluate(trainer.protocol.valid, model_file=str(file)) == result["best_valid_result"]
    assert trainer.evaluate(trainer.protocol.test, model_file=str(file)) == result["test_result"]
    assert max(result["best_valid_result"].values()) > 0


def test_failed_run_leaves_no_result(toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the result of the same run, done before."""
    folder = Path(run_recbole_llm("BPR", config_dict=toy)["run_folder"])
    assert (folder / "result.json").is_file()
    bpr = LLMConfig("BPR", config_dict=toy).model_class

    def fail(*_: Any) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(bpr, "calculate_loss", fail)
    with pytest.raises(UserError, match="training failed: RuntimeError: planted"):
        run_recbole_llm("BPR", config_dict=toy)
    assert folder.is_dir() and not (folder / "result.json").exists()


def test_checkpoint_is_whole_or_the_old_one(toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up in the middle of a checkpoint."""
    folder = Path(run_recbole_llm("SASRec", config_dict={**toy, **SMALL_SASREC})["run_folder"])
    before = (folder / "SASRec.pth").read_bytes()

    def half(state: Any, file: str) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(UserError, match="No space left on device"):
        run_recbole_llm("SASRec", config_dict={**toy, **SMALL_SASREC})
    assert (folder / "SASRec.pth").read_bytes() == before
    assert not list(folder.glob("*.tmp")) and not (folder / "result.json").exists()


def test_foreign_checkpoint_is_told(toy: dict[str, Any], tmp_path: Path) -> None:
    """A file that a user names is data alone: nothing in it is run."""

    class Planted:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "run",)

    file = tmp_path / "foreign.pth"
    torch.save({"state_dict": {}, "other_parameter": Planted()}, file)
    trainer = started(*prepared(toy, "BPR"))
    with pytest.raises(UserError, match="no checkpoint of plain tensors"):
        trainer.evaluate(trainer.protocol.test, model_file=str(file))
    assert not (tmp_path / "run").exists()


def test_folder_that_cannot_be_written_is_told(toy: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--checkpoint_dir"):
        run_recbole_llm("Pop", config_dict={**toy, "checkpoint_dir": str(tmp_path / "file")})


def test_each_run_has_its_own_log(toy: dict[str, Any]) -> None:
    """Two runs in one process; RecBole would write both into the first one's file."""
    folders = {model: Path(run_recbole_llm(model, config_dict=toy)["run_folder"]) for model in ("BPR", "Pop")}
    told = {model: (folder / "train.log").read_text(encoding="utf-8") for model, folder in folders.items()}
    for model, other in (("BPR", "Pop"), ("Pop", "BPR")):
        assert f"{model}(" in told[model] and f"{other}(" not in told[model]
        assert told[model].count("test result") == 1 and "candidate hash" in told[model]


@pytest.mark.parametrize("name", ["few-shot-ml-100k", "full-ml-100k"])
def test_published_tables_are_asked_as_before(name: str) -> None:
    """Users and candidates of a table in results/ come of its YAML still."""
    settings = read_yamls([str(PROPERTIES / "compare" / f"{name}.yaml")])
    kept = {key: settings[key] for key in ("few_shot", "eval_users", "valid_users", "eval_args") if key in settings}
    protocol = prepare_data(LLMConfig("Pop", "ml-100k", None, {**kept, "encoder": "none", "gpu_id": ""}))
    (table,) = json.loads((PROPERTIES.parent / "results" / name / "table.json").read_text(encoding="utf-8"))
    assert protocol.candidate_hash == table["candidate_hash"]


def test_what_was_not_to_be_kept_is_no_finished_run(toy: dict[str, Any]) -> None:
    """The last epoch's result would pass for the best one's in a comparison."""
    kept = run_recbole_llm("BPR", config_dict=toy)
    record = (Path(kept["run_folder"]) / "result.json").read_bytes()
    result = run_recbole_llm("BPR", config_dict=toy, saved=False)
    assert not (Path(result["run_folder"]) / "result.json").exists()
    assert (Path(kept["run_folder"]) / "result.json").read_bytes() == record
