"""Train on one data set, rank another: the same adapter, the other's rows, and no id that crosses over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from recbole_llm.config import LLMConfig
from recbole_llm.data.protocol import prepare_data
from recbole_llm.errors import ConfigError, UserError
from recbole_llm.llm.adapter import load_adapter
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.report.compare import compare
from recbole_llm.report.entries import Options, parse_models
from recbole_llm.report.grid import cells
from recbole_llm.run_folder import data_hash, make_run_folder, run_hash
from recbole_llm.transfer import eval_config_of
from tests.conftest import started, write_dataset

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def both(tiny: dict[str, Any]) -> dict[str, Any]:
    """The made-up data set, and beside it one of other users and another order of items."""
    write_dataset(Path(tiny["data_path"]), users=25, seed=5, name="other")
    return {**tiny, "eval_dataset": "other"}


def test_the_other_data_set_is_ranked_by_the_adapter_of_this_one(both: dict[str, Any]) -> None:
    """Per-user rows equal those of a ranker of the other data set into which the adapter was put by hand."""
    result = run_recbole_llm(config_dict=both)
    folder = Path(result["run_folder"])
    record = json.loads((folder / "result.json").read_text())
    assert (record["dataset"], record["training_dataset"], record["rows"]) == ("other", "toy", 25)

    here = {k: v for k, v in both.items() if k != "eval_dataset"} | {"dataset": "other"}
    config = LLMConfig(config_dict=here)
    protocol = prepare_data(config)
    assert protocol.candidate_hash == record["candidate_hash"]
    trainer = started(config, protocol)
    load_adapter(trainer.model.llm, folder)
    expected = trainer.evaluate(protocol.test, load_best_model=False)
    assert result["test_result"] == pytest.approx(expected, abs=1e-6)
    told = pd.read_csv(folder / "per_user.csv.gz")
    assert told["rank"].to_numpy() == pytest.approx(trainer.per_user["rank"].to_numpy())


def test_training_does_not_see_the_other_data_set(both: dict[str, Any], tmp_path: Path) -> None:
    """The adapter is that of a run without ``eval_dataset``, tensor for tensor."""
    plain = {k: v for k, v in both.items() if k != "eval_dataset"} | {"checkpoint_dir": str(tmp_path / "plain")}
    folders = [Path(run_recbole_llm(config_dict=settings)["run_folder"]) for settings in (both, plain)]
    assert folders[0].name != folders[1].name
    one, other = ((f / "adapter_model.safetensors").read_bytes() for f in folders)
    assert one == other


def test_a_comparison_may_hold_natives_and_foreigners(both: dict[str, Any]) -> None:
    """Pop of the other data set and an LLM trained on this one: one candidate hash, one table."""
    shared = {k: v for k, v in both.items() if k not in ("eval_dataset", "dataset", "model", "llm", "train_batch_size")}
    entries = ["Pop", "LLMRanker[dataset=toy,eval_dataset=other]"]
    shared["per_model"] = {"LLMRanker": {"llm": "tiny", "train_batch_size": 32}}
    done = compare(entries, "other", shared)
    assert not done["failed"] and len(done["table"]) == 2 and np.isfinite(done["table"]["ndcg@10"]).all()
    with pytest.raises(ConfigError, match="--dataset: must be the same"):
        compare(["Pop", "LLMRanker[dataset=toy]"], "other", shared)
    shared |= {"few_shot": 5, "few_shot_seed": 7}  # of training: the configuration of the other data set has none
    assert len(cells(parse_models(entries), Options(per_model=shared.pop("per_model")), shared, "other")) == 2


def test_settings_of_one_data_set_stay_with_it(both: dict[str, Any]) -> None:
    """Filters come from ``eval_config``, and its data are part of what names the run."""
    given = {**both, "item_inter_num_interval": "[1,inf)", "eval_config": {"user_inter_num_interval": "[13,inf)"}}
    with pytest.raises(UserError, match="--dataset=other: reading the data to be ranked"):  # no user has 13 events
        run_recbole_llm(config_dict=given)
    before = run_hash(LLMConfig(config_dict=both))
    file = Path(both["data_path"]) / "other" / "other.inter"
    file.write_text(file.read_text().replace("\t5\t", "\t4\t"))
    assert run_hash(LLMConfig(config_dict=both)) != before


def test_what_the_other_data_set_loads_names_the_run(both: dict[str, Any]) -> None:
    given = {**both, "eval_config": {"load_col": {"inter": ["user_id", "item_id", "timestamp"], "ent": ["ent_id"]}}}
    found = []
    for item in ("i1", "i2"):
        (Path(both["data_path"]) / "other" / "other.ent").write_text(f"ent_id:token\n{item}\n")
        found.append(run_hash(LLMConfig(config_dict=given)))
    assert found[0] != found[1]
    run_hash(LLMConfig(config_dict={**both, "eval_config": {"load_col": 3}}))  # named first, told as wrong after


def test_the_other_data_set_needs_nothing_that_only_training_needs(both: dict[str, Any]) -> None:
    """More few-shot users than it has, and rejected items by ratings that it lacks."""
    file = Path(both["data_path"]) / "other" / "other.inter"
    rows = [line.split("\t") for line in file.read_text().splitlines()]
    file.write_text("\n".join("\t".join((u, i, t)) for u, i, _, t in rows) + "\n")
    training = {"few_shot": 30, "rejected": "low_rating", "loss": "DMPO", "rejected_num": 2}
    assert run_recbole_llm(config_dict={**both, **training})["test_result"]["hit@10"] > 0


@pytest.mark.parametrize(
    "training",
    [
        {"loss": "SDPO", "rejected_num": 2, "boundary_negatives": True, "dynamic_beta": True},
        {"loss": "DMPO", "rejected_num": 2, "reference_free": True, "pairwise_mean": True},
        {"loss": "RosePO", "robust": True, "smoothing": 0.2},
        {"loss": "MultDPO", "chosen_num": 2},
        {
            "full_ranking": "rerank",
            "rerank_weight": 0.5,
            "rerank_model": "Pop",
            "eval_config": {"eval_args": {"mode": {"valid": "uni9", "test": "full"}}},
        },
    ],
)
def test_settings_of_training_are_not_asked_of_the_other_data_set(both: dict[str, Any], training: Any) -> None:
    config = LLMConfig(config_dict={**both, **training})
    assert eval_config_of(config)["dataset"] == "other"


def test_the_record_has_the_seed_and_data_of_what_was_ranked(both: dict[str, Any]) -> None:
    asked = {"split": {"RS": [0.8, 0.1, 0.1]}}  # the mode stays that of the run
    other = {"candidate_seed": 7, "eval_users": 8, "eval_args": asked}
    result = run_recbole_llm(config_dict={**both, "eval_config": other})
    folder = Path(result["run_folder"])
    record = json.loads((folder / "result.json").read_text())
    own, other = (
        data_hash(LLMConfig(config_dict={**both, "dataset": d, "eval_dataset": None})) for d in ("toy", "other")
    )
    assert (record["candidate_seed"], record["data_hash"], record["training_data_hash"]) == (7, other, own)
    card = (folder / "README.md").read_text()
    assert "7 (candidates)" in card and "split RS" in card and "A sample of users was asked" in card


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"eval_dataset": "nowhere"}, "--eval_dataset=nowhere: .*no file"),
        ({"eval_config": {"seed": 3}}, "--eval_config: seed cannot differ"),
        ({"eval_config": {"itemtext": "x"}}, "--eval_config: itemtext cannot differ; it may hold .*item_text"),
        ({"eval_config": {"eval_users": 0}}, "--eval_dataset=other: --eval_users=0"),
        ({"eval_config": 3}, "--eval_config=3: must be a table"),
    ],
)
def test_wrong_settings_are_told_before_any_work(both: dict[str, Any], changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        run_recbole_llm(config_dict={**both, **changes})
    assert not list(Path(both["checkpoint_dir"]).glob("*/result.json"))


def test_where_the_other_data_set_lies_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nobody said it: RecBole's own folder of ml-100k is not where the other lies."""
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "dataset", name="other")
    config = LLMConfig("LLMRanker", "ml-100k", None, {"llm": "tiny", "eval_dataset": "other"})
    again = yaml.safe_load((make_run_folder(config, tmp_path / "run") / "config.yaml").read_text(encoding="utf-8"))
    assert again["eval_config"]["data_path"] == config.internal_config_dict["data_path"]
    assert Path(again["eval_config"]["data_path"], "other", "other.inter").is_file()
