"""RosePO's oracle: calibrated, cross-fitted, and blind to test events."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.special import expit

from recbole_llm.config import LLMConfig
from recbole_llm.data.prompt import Window
from recbole_llm.data.protocol import prepare_data
from recbole_llm.errors import ConfigError, UserError
from recbole_llm.harm import title_vectors
from recbole_llm.oracle import Calibration, Oracle, _negatives, calibrate, judged, train_oracle
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.recommender import check_recommenders, recommender_config, train_recommender
from recbole_llm.report.plot_data import run_seconds
from recbole_llm.run_folder import run_hash

pytestmark = pytest.mark.usefixtures("one_thread")


class Rows(SimpleNamespace):
    """Evaluation rows by hand."""

    def __len__(self) -> int:
        return len(self.users)


class Judge:
    """Scores every item by a table, whatever the history."""

    def __init__(self, scores: Any) -> None:
        self.table = np.array(scores, dtype=float)

    def scores(self, histories: Any) -> np.ndarray:
        return np.tile(self.table, (len(histories), 1))


def test_epsilon_is_the_probability_that_the_rejected_is_preferred() -> None:
    """By hand: judge 0 gives items 1, 2, 3 the scores 2, 0, 5; at tau 2 the pair (1 over 2) errs with s(-1)."""
    oracle = Oracle([Judge([0, 2, 0, 5]), Judge([0, 0, 1, 0])], np.array([0, 0, 1]), Calibration(2.0, 1, 1, 1), 0.5)
    windows = [
        Window(1, (3, 1), (1,), rejected=((2, 3),)),
        Window(2, (3, 1), (1,), rejected=((2, 3),)),
    ]
    one, other = oracle.smoothing(windows)
    assert one[0] == pytest.approx([expit(-1.0), 0.5])  # item 3 is preferred with s(1.5): clipped to one half
    assert other[0] == pytest.approx([0.5, 0.5])
    oracle.most = 0.1
    assert oracle.smoothing(windows)[0][0] == pytest.approx([0.1, 0.1])


def test_calibration_finds_the_temperature_that_made_the_data() -> None:
    """Pairs whose order is drawn with probability s(difference / 3): the fitted temperature is 3 again."""
    rng = np.random.default_rng(0)
    n = 4000
    score = rng.normal(0, 6, size=(n, 2))
    right = rng.random(n) < expit((score[:, 0] - score[:, 1]) / 3)
    target = np.where(right, 0, 1)  # which of the two the user chose
    judge = SimpleNamespace(scores=lambda histories: np.array([[0, *score[h[0]]] for h in histories]))
    rows = Rows(
        users=np.zeros(n, dtype=int),
        targets=target + 1,
        relevant=target[:, None] + 1,
        candidates=np.tile([1, 2], (n, 1)),
        history=[np.array([i]) for i in range(n)],
        hidden=[np.array([], dtype=int)] * n,
        item_tokens=np.arange(3),
    )
    found = calibrate([judge], np.zeros(1, dtype=int), rows, seed=0)
    assert found.tau == pytest.approx(3, rel=0.08)
    assert found.accuracy == pytest.approx(((score[:, 0] > score[:, 1]) == right).mean())
    assert found.confidence == pytest.approx(found.accuracy, abs=0.015)
    assert found.pairs == n


def test_what_nobody_met_is_no_negative() -> None:
    """In full ranking; a model that loads `.item` knows such items."""
    hidden = np.array([2, *range(10, 1000)])
    rows = Rows(
        users=np.array([4]),
        relevant=np.array([[3]]),
        candidates=None,
        history=[np.array([1, 2])],
        hidden_of=[hidden].__getitem__,
        item_tokens=np.arange(1000),
    )
    assert sorted(_negatives(rows, 0, seed=1)) == [4, 5, 6, 7, 8, 9]


def test_many_places_are_judged_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    judge = SimpleNamespace(scores=lambda h: (asked.append(len(h)), np.array([[x[0], 2 * x[0]] for x in h]))[1])
    places = [(0, [i], [0, 1]) for i in range(600)]
    found = judged([judge], np.zeros(1, dtype=int), places)
    assert asked == [256, 256, 88]
    assert np.array_equal(found, [[i, 2 * i] for i in range(600)])


SMALL = {"train_batch_size": 256, "epochs": 1}


def rosepo(toy: dict[str, Any], **changes: Any) -> dict[str, Any]:
    given = {"model": "LLMRanker", "llm": "tiny", "loss": "RosePO", "recommender_config": SMALL, "few_shot": 20}
    return {**toy, **given, **changes}


def test_a_judge_has_not_seen_the_users_it_judges(toy: dict[str, Any]) -> None:
    config = LLMConfig(config_dict=rosepo(toy, oracle_folds=3))
    protocol = prepare_data(config)
    oracle = train_oracle(config, protocol)
    users = set(protocol.training_sequences())
    seen = [set(judge.protocol.training_sequences()) for judge in oracle.judges]
    for fold, mine in enumerate(seen):
        judged = {u for u in users if oracle.fold_of[u] == fold}
        assert judged and not judged & mine and judged | mine == users
        trained = oracle.judges[fold].protocol.train_data._dataset.inter_feat["user_id"].numpy()
        assert set(trained.tolist()) == mine
    assert [len(s) for s in seen] in ([13, 13, 14], [13, 14, 13], [14, 13, 13])


def test_no_test_event_reaches_oracle_or_recommender(toy: dict[str, Any], tmp_path: Path) -> None:
    """A marker planted in every user's last event, another item, changes no score, no temperature and no epsilon."""
    file = Path(toy["data_path"]) / "toy" / "toy.inter"
    header, *lines = file.read_text().splitlines()
    # RecBole numbers items by first appearance: six users who come first and stay as they are fix the numbers.
    fixed = [f"fix{k // 10}\ti{k}\t5\t{870000000 + k}" for k in range(60)]
    rows = [line.split("\t") for line in lines]
    found = []
    for name in ("plain", "marked"):
        if name == "marked":
            last = {row[0]: i for i, row in enumerate(rows)}
            for user, i in last.items():
                met = {row[1] for row in rows if row[0] == user}
                rows[i][1] = next(f"i{k}" for k in range(59, -1, -1) if f"i{k}" not in met)
        home = tmp_path / name / "toy"
        shutil.copytree(file.parent, home)
        (home / file.name).write_text("\n".join([header, *fixed, *("\t".join(row) for row in rows)]) + "\n")
        places = {"data_path": str(tmp_path / name), "checkpoint_dir": str(tmp_path / f"{name}-saved")}
        # Candidates are items that a user never met, last event included: valid rows with fixed ones for both.
        config = LLMConfig(config_dict=rosepo(toy, **places, eval_args={"mode": {"valid": "full", "test": "uni9"}}))
        protocol = prepare_data(config)
        users = np.array(sorted(protocol.training_sequences()))
        vectors = title_vectors(config, protocol.dataset)
        found.append((protocol, train_recommender(config, "SASRec", users), train_oracle(config, protocol), vectors))
    (plain, one, before, told), (marked, other, after, told_marked) = found
    np.testing.assert_array_equal(told, told_marked)
    assert plain.test.targets.tolist() != marked.test.targets.tolist()
    history = [[1, 2, 3], [4, 5]]
    np.testing.assert_array_equal(one.scores(history), other.scores(history))
    for mine, theirs in zip(before.judges, after.judges, strict=True):
        np.testing.assert_array_equal(mine.scores(history), theirs.scores(history))
    assert before.calibration == after.calibration
    window = [Window(7, (1, 2, 3), (2,), rejected=((4, 5),))]
    assert before.smoothing(window) == after.smoothing(window)


def test_a_recommender_is_trained_once(toy: dict[str, Any]) -> None:
    config = LLMConfig(config_dict=rosepo(toy))
    one = train_recommender(config, "SASRec")
    folder = next((Path(toy["checkpoint_dir"]) / "stages").glob("SASRec-*"))
    written = (folder / "stage.json").stat().st_mtime_ns
    other = train_recommender(config, "SASRec")
    assert (folder / "stage.json").stat().st_mtime_ns == written
    np.testing.assert_array_equal(one.scores([[1, 2]]), other.scores([[1, 2]]))
    users = np.array(sorted(one.protocol.training_sequences()))[:10]
    assert (train_recommender(config, "SASRec", users).scores([[1, 2]]) != one.scores([[1, 2]])).any()
    assert one.told["made"] and not other.told["made"]
    assert other.told["what"] == "SASRec" and other.told["where"] == folder.name
    assert other.told["seconds"] == one.told["seconds"] > 0


@pytest.mark.parametrize(
    "asked",
    [{"topk": [1, 10]}, {"metrics": ["NDCG", "Hit"]}, {"look_alikes": 3}, {"encoder": "none"}, {"eval_users": 7}],
)
def test_how_the_test_asks_names_no_recommender(toy: dict[str, Any], asked: dict[str, Any]) -> None:
    settings = rosepo(toy, valid_users=20)
    one, other = (recommender_config(LLMConfig(config_dict=s), "SASRec") for s in (settings, {**settings, **asked}))
    assert run_hash(one) == run_hash(other)
    first, second = prepare_data(one), prepare_data(other)
    assert first.valid.digest == second.valid.digest
    assert first.training_sequences().keys() == second.training_sequences().keys()


def test_what_serves_a_run_is_counted_where_it_was_found(toy: dict[str, Any]) -> None:
    """The first run trains the judges in its own seconds; one with another beta finds them, and says what they took."""
    records = []
    for beta in (1.0, 0.5):
        result = run_recbole_llm(config_dict=rosepo(toy, beta=beta))
        records.append(json.loads((Path(result["run_folder"]) / "result.json").read_text()))
    first, second = (record["stages"][-1] for record in records)
    assert [judge["made"] for judge in first["recommenders"]] == [True, True]
    assert [judge["made"] for judge in second["recommenders"]] == [False, False]
    judges = sum(judge["seconds"] for judge in second["recommenders"])
    assert first["seconds"] > judges > 0
    assert run_seconds(records[0], cpu=False) == records[0]["timings"]["total_s"]
    sft, references = records[1]["stages"][0]["seconds"], sum(part["seconds"] for part in second["found"])
    assert run_seconds(records[1], cpu=False) == pytest.approx(
        records[1]["timings"]["total_s"] + sft + judges + references
    )


def test_a_model_that_serves_twice_is_counted_once(toy: dict[str, Any]) -> None:
    """The base of a re-ranking that also chooses the rejected titles, in the run that trains it and in one that finds
    the stage."""
    settings = rosepo(toy, loss="DMPO", smoothing=0.1, rejected="from_model", rerank_candidates=True, eval_step=0)
    settings |= {"rerank_model": "SASRec", "from_model": "SASRec", "rejected_num": 2}
    records = []
    for topk in ([10], [5, 10]):
        result = run_recbole_llm(config_dict={**settings, "topk": topk})
        records.append(json.loads((Path(result["run_folder"]) / "result.json").read_text()))
    first, second = records
    assert run_seconds(first, cpu=False) == first["timings"]["total_s"]
    (trained,) = second["recommenders"]
    shared = sum(stage["seconds"] for stage in second["stages"])
    assert all(stage["reused"] for stage in second["stages"]) and not trained["made"]
    expected = second["timings"]["total_s"] + shared + trained["seconds"]
    assert run_seconds(second, cpu=False) == pytest.approx(expected)


def test_rosepo_runs_with_its_oracle(toy: dict[str, Any]) -> None:
    result = run_recbole_llm(config_dict=rosepo(toy, rejected="self_hard+semantic+popularity", rejected_num=3))
    record = (Path(result["run_folder"]) / "result.json").read_text()
    assert '"mean_epsilon"' in record and '"tau"' in record


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"oracle_model": "BPR"}, "--oracle_model=BPR.*sequential"),
        ({"oracle_model": "SASRek"}, "did you mean `SASRec`"),
        ({"recommender_config": {"epoch": 3}}, "--recommender_config: --epoch: no such key; did you mean `epochs`"),
        ({"rejected": "from_model", "from_model": "Pop"}, "--from_model=Pop"),
        ({"robust": True}, "smoothing_max"),
        ({"recommender_config": {"few_shot": None, "eval_args": {}}}, "few_shot, eval_args must be that of the run"),
    ],
)
def test_wrong_judges_are_told_before_any_work(toy: dict[str, Any], changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_recommenders(LLMConfig(config_dict=rosepo(toy, **changes)))


@pytest.mark.parametrize("key", ["oracle_model", "from_model"])
def test_a_judge_that_needs_more_than_a_history_is_told_before_training(toy: dict[str, Any], key: str) -> None:
    """Caser is sequential and wants the user's id; that shows before the LLM has trained."""
    with pytest.raises(UserError, match=f"--{key}=Caser: it cannot score"):
        run_recbole_llm(config_dict=rosepo(toy, rejected="from_model", **{key: "Caser"}))
    assert not list(Path(toy["checkpoint_dir"]).glob("stages/SFT-*"))


def test_one_training_user_cannot_be_judged(toy: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--few_shot=1: the oracle"):
        run_recbole_llm(config_dict=rosepo(toy, few_shot=1))


def test_recommenders_share_the_ids_of_the_run(toy: dict[str, Any]) -> None:
    """Whatever decides which items there are reaches the judge as well."""
    config = LLMConfig(config_dict=rosepo(toy, item_inter_num_interval="[8,inf)", eval_args={"mode": "uni3"}))
    protocol, judge = prepare_data(config), train_recommender(config, "SASRec")
    assert protocol.dataset.item_num < 61
    tokens = [p.dataset.field2id_token["item_id"].tolist() for p in (protocol, judge.protocol)]
    assert tokens[0] == tokens[1]
