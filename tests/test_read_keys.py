"""What a run does not read changes no result, and does not name it; what it reads names it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from recbole_llm.config import LLMConfig
from recbole_llm.data.protocol import prepare_data
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.read_keys import (
    BASE_KEYS,
    FINETUNE_KEYS,
    LORA_KEYS,
    NEVER_READ,
    ORACLE_KEYS,
    PREFERENCE_KEYS,
    REJECTED_KEYS,
    unread,
)
from recbole_llm.run_folder import _hash_of, data_hash, run_folder_of
from recbole_llm.stages import preference_folder, sft_folder

SINGLE = {"full_ranking", "recommender_config", "worker"} | NEVER_READ
DRAW_KEYS = {"popularity_exponent", "from_model", "rejected_pool"}
PREFERENCE_ALONE = PREFERENCE_KEYS | ORACLE_KEYS | DRAW_KEYS | {"smoothing", "dynamic_margin"}
# Of each key a value that is not the default.
OTHER: dict[str, Any] = {
    "lora_r": 2,
    "lora_alpha": 5.0,
    "lora_dropout": 0.5,
    "lora_target_modules": ["q_proj"],
    "learning_rate": 0.02,
    "lr_scheduler": "constant",
    "warmup_ratio": 0.5,
    "sft_positions": 1,
    "epochs": 3,
    "train_batch_size": 5,
    "eval_batch_size": 7,
    "train_neg_sample_args": {"distribution": "popularity", "sample_num": 2},
    "rejected": "popularity",
    "rejected_num": 2,
    "rejected_pool": 17,
    "popularity_exponent": 0.5,
    "beta": 3.0,
    "sft_weight": 2.0,
    "smoothing": 0.3,
    "smoothing_max": 0.2,
    "oracle_model": "GRU4Rec",
    "oracle_folds": 3,
    "dynamic_margin": 1.5,
    "from_model": "GRU4Rec",
    "preference_epochs": 4,
    "preference_learning_rate": 0.03,
    "preference_positions": 2,
    "full_ranking": "exact",
    "rerank_model": "BPR",
    "rerank_topk": 3,
    "recommender_config": {"epochs": 1},
    "worker": 2,
}
RUNS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "zero-shot": (
        {"finetune": "none"},
        LORA_KEYS | FINETUNE_KEYS | PREFERENCE_ALONE | REJECTED_KEYS | SINGLE | BASE_KEYS,
    ),
    "SFT": ({}, PREFERENCE_ALONE | REJECTED_KEYS | SINGLE | BASE_KEYS),
    "SFT on pairs": (
        {
            "prompt": "pair",
            "eval_args": {"mode": {"valid": "uni1", "test": "uni1"}},
            "metrics": ["Hit"],
            "topk": [1],
            "valid_metric": "Hit@1",
        },
        PREFERENCE_ALONE | SINGLE | BASE_KEYS,
    ),
    "full weights": ({"finetune": "full"}, LORA_KEYS | PREFERENCE_ALONE | REJECTED_KEYS | SINGLE | BASE_KEYS),
    "DPO": (
        {"loss": "DPO", "rejected_num": 1, "eval_step": 0},
        PREFERENCE_ALONE - PREFERENCE_KEYS | SINGLE | BASE_KEYS,
    ),
    "RosePO": (
        {"loss": "RosePO", "rejected_num": 1, "eval_step": 0, "smoothing": 0.2},
        ORACLE_KEYS | DRAW_KEYS | {"dynamic_margin"} | SINGLE | BASE_KEYS,
    ),
}


def test_every_key_that_may_be_unread_is_tried() -> None:
    assert set(OTHER) == LORA_KEYS | FINETUNE_KEYS | PREFERENCE_ALONE | REJECTED_KEYS | SINGLE | BASE_KEYS


@pytest.mark.parametrize("name", RUNS)
def test_what_a_run_does_not_read_changes_no_result(name: str, tiny: dict[str, Any], tmp_path: Path) -> None:
    given, expected = RUNS[name]
    settings = {**tiny, "few_shot": 20, "eval_users": 20, "preference_epochs": 1, **given}
    assert unread(LLMConfig(config_dict=settings).final_config_dict) == expected
    ranks, folders, stages = [], [], []
    for place, other in (("one", {}), ("two", {key: OTHER[key] for key in expected})):
        result = run_recbole_llm(config_dict={**settings, **other, "checkpoint_dir": str(tmp_path / place)})
        folder = Path(result["run_folder"])
        ranks.append(pd.read_csv(folder / "per_user.csv.gz"))
        folders.append(folder.name)
        stages.append({stage.name for stage in tmp_path.glob(f"{place}/stages/*/")})
    pd.testing.assert_frame_equal(*ranks)
    assert folders[0] == folders[1]
    assert stages[0] == stages[1]  # so runs of other models and modes share them
    assert {stage.split("-")[0] for stage in stages[0]} - {"SFT", "reference"} == {name} & {"DPO", "RosePO"}


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (
            {"loss": "RosePO", "smoothing": "oracle"},
            ORACLE_KEYS | {"recommender_config", "worker", "beta", "smoothing", "train_batch_size"},
        ),
        ({"loss": "RosePO", "smoothing": 0.1}, {"smoothing"}),
        ({"loss": "DMPO", "dynamic_beta": True, "rejected": "popularity"}, {"dynamic_margin", "popularity_exponent"}),
        (
            {"loss": "DMPO", "rejected": "from_model"},
            {"from_model", "recommender_config", "worker", "preference_positions", "rejected_pool"},
        ),
        ({"rerank_candidates": True}, {"rerank_model", "rerank_topk", "recommender_config"}),
        (
            {"eval_args": {"mode": {"valid": "uni9", "test": "full"}}},
            {"rerank_model", "recommender_config", "full_ranking"},
        ),
        (
            {"eval_dataset": "toy", "eval_config": {"eval_args": {"mode": {"test": "full"}}}},
            {"rerank_model", "rerank_topk", "recommender_config", "full_ranking"},
        ),
        ({"eval_dataset": "toy", "eval_config": {"eval_args": {"mode": "full"}}}, {"rerank_model", "full_ranking"}),
        ({}, LORA_KEYS | FINETUNE_KEYS),
    ],
)
def test_what_a_run_reads_names_it(given: dict[str, Any], read: set[str], tiny: dict[str, Any]) -> None:
    before = run_folder_of(LLMConfig(config_dict={**tiny, **given}))
    for key in read:
        assert run_folder_of(LLMConfig(config_dict={**tiny, **given, key: OTHER[key]})) != before, key


@pytest.mark.parametrize("asked", ["full", {"mode": 3}, {"mode": ["full"]}, {"mode": None}, None])
def test_an_unchecked_eval_config_is_no_obstacle(asked: Any, tiny: dict[str, Any]) -> None:
    """compare names its runs first, and tells what is wrong with eval_config after."""
    settings = {**tiny, "eval_dataset": "toy", "eval_config": {"eval_args": asked}}
    assert "full_ranking" in unread(LLMConfig(config_dict=settings).final_config_dict)


def test_keys_of_other_models_are_all_read(toy: dict[str, Any]) -> None:
    assert unread(LLMConfig(config_dict={**toy, "model": "SASRec"}).final_config_dict) == set()
    assert unread(LLMConfig(config_dict={**toy, "model": "DPO4Rec", "llm": "tiny"}).final_config_dict) == set()


def test_which_gpu_names_no_run_but_a_cpu_does(tiny: dict[str, Any]) -> None:
    """`dtype=auto` is another type on each."""
    config = LLMConfig(config_dict=tiny)
    names = []
    for number, device in (("", "cpu"), ("0", "cuda:0"), ("3", "cuda:0")):
        config.final_config_dict |= {"gpu_id": number, "device": torch.device(device)}
        names.append(run_folder_of(config).name)
    assert names[1] == names[2] != names[0]


# ---- names of stages


def stage_names(settings: dict[str, Any]) -> tuple[str, str]:
    """Of the SFT and of the preference stage."""
    config = LLMConfig(config_dict=settings)
    protocol = prepare_data(config)
    return sft_folder(config, protocol, "base", []).name, preference_folder(config, protocol, "base").name


@pytest.fixture
def pairs(tiny: dict[str, Any]) -> dict[str, Any]:
    return {**tiny, "few_shot": 20, "eval_users": 5, "loss": "DMPO", "rejected_num": 2}


FULL = {"eval_args": {"mode": {"valid": "uni9", "test": "full"}}}


@pytest.mark.parametrize(
    ("shared", "one", "other"),
    [
        ({}, {"full_ranking": "exact"}, {"full_ranking": "rerank"}),
        ({}, FULL, {"full_ranking": "rerank"}),
        ({"full_ranking": "rerank", "eval_step": 0}, FULL, {}),
        (FULL, {"rerank_topk": 3}, {"rerank_topk": 5}),
        (FULL, {"recommender_config": {"epochs": 3}}, {}),
        ({"rerank_candidates": True}, {"rerank_weight": "auto"}, {"rerank_weight": 1.0}),
        ({"eval_step": 0}, {"valid_metric": "Hit@1", "stopping_step": 9}, {}),
        ({}, {"attention": "sdpa", "token_budget": 512}, {"attention": "eager"}),
        ({}, {"gradient_checkpointing": True, "fast_linears": False}, {}),
        ({}, {"encoder": "tfidf", "mask_history": False}, {"encoder": "none"}),
    ],
)
def test_what_does_not_train_names_no_stage(pairs: dict[str, Any], shared: Any, one: Any, other: Any) -> None:
    assert stage_names({**pairs, **shared, **one}) == stage_names({**pairs, **shared, **other})


@pytest.mark.parametrize(
    ("shared", "changed", "sft_too"),
    [
        ({"loss": "RosePO", "eval_step": 0}, {"valid_metric": "Hit@1"}, False),  # its judges are validated
        ({"rejected": "from_model", "eval_step": 0}, {"metric_decimal_place": 2}, False),
        ({"rejected": "from_model"}, {"recommender_config": {"epochs": 3}}, False),
        ({"rejected": "from_model"}, {"worker": 2}, False),  # whose processes draw its negatives
        ({}, {"valid_metric": "Hit@1"}, True),
        ({"rerank_candidates": True}, {"rerank_topk": 3}, True),
        ({"rerank_candidates": True}, {"rerank_weight": 0.5}, True),
        ({"lora_dropout": 0.1}, {"token_budget": 512}, True),
        ({}, {"beta": 0.7}, False),
        ({"rejected": "semantic", "encoder": "tfidf"}, {"encoder": "minilm"}, False),
        ({"eval_args": {"mode": "full"}}, {"mask_history": False}, True),
    ],
)
def test_what_trains_names_its_stage(pairs: dict[str, Any], shared: Any, changed: Any, sft_too: bool) -> None:
    before, after = stage_names({**pairs, **shared}), stage_names({**pairs, **shared, **changed})
    assert before[1] != after[1] and (before[0] != after[0]) == sft_too


def test_validation_histories_name_the_sft_stage(pairs: dict[str, Any]) -> None:
    """They select its epoch, and may differ where users, targets and candidates do not."""
    config = LLMConfig(config_dict=pairs)
    protocol = prepare_data(config)
    names = [sft_folder(config, protocol, "base", []).name]
    for eval_step in (1, 0):
        config["eval_step"] = eval_step
        for shorter in (False, True):
            kept = [history[shorter:] for history in protocol.valid.history]
            asked = replace(protocol, valid=replace(protocol.valid, history=kept))
            names.append(sft_folder(config, asked, "base", []).name)
    assert names[0] == names[1] != names[2] and names[3] == names[4]


def test_the_device_of_recommenders_names_a_preference_stage(pairs: dict[str, Any]) -> None:
    """A GPU trains another recommender, whose top is rejected; of uniform titles the device moves last bits alone."""
    for rejected, same in (("uniform", True), ("from_model", False)):
        config = LLMConfig(config_dict={**pairs, "rejected": rejected, "dtype": "float32", "token_budget": 512})
        protocol, names = prepare_data(config), []
        for device in ("cpu", "cuda:0"):
            config.final_config_dict |= {"device": torch.device(device)}
            names.append(preference_folder(config, protocol, "base").name)
        assert (names[0] == names[1]) == same


def test_processes_that_draw_negatives_name_a_run(toy: dict[str, Any]) -> None:
    """Those of RecBole's loaders draw by states of their own: other numbers."""
    settings = {**toy, "model": "BPR", "epochs": 3, "learning_rate": 0.05}
    one, two = (run_recbole_llm(config_dict={**settings, "worker": number}) for number in (0, 2))
    assert one["best_valid_result"] != two["best_valid_result"]
    assert Path(one["run_folder"]).name != Path(two["run_folder"]).name


def test_every_file_that_is_loaded_names_a_run(toy: dict[str, Any]) -> None:
    """Of an own suffix too, whether `load_col` or `additional_feat_suffix` names it; what is not loaded does not."""
    file = Path(toy["data_path"]) / "toy" / "toy.ent"
    inter = {"inter": ["user_id", "item_id", "rating", "timestamp"]}
    vectors = {"load_col": {**inter, "ent": ["ent_id", "ent_emb"]}, "alias_of_item_id": ["ent_id"]}
    cases = [{"model": "BPR"}, vectors, {"additional_feat_suffix": "ent"}, {"additional_feat_suffix": ["ent"]}]
    hashes = []
    for vector in ("1.0 2.0", "3.0 4.0"):
        file.write_text(f"ent_id:token\tent_emb:float_seq\ni1\t{vector}\n", encoding="utf-8")
        configs = [LLMConfig(config_dict={"model": "GRU4RecKG", **toy, **given}) for given in cases]
        hashes.append([(data_hash(config), run_folder_of(config)) for config in configs])
    assert [one[0] == other[0] for one, other in zip(*hashes, strict=True)] == [True, False, False, False]
    assert [one[1] == other[1] for one, other in zip(*hashes, strict=True)][1:] == [False] * 3
    home = file.parent  # by hand: suffix and content of each file in turn
    told = hashlib.sha256()
    for suffix in ("inter", "item"):
        told.update(suffix.encode() + (home / f"toy.{suffix}").read_bytes())
    assert data_hash(LLMConfig(config_dict={**toy, "model": "Pop"})) == told.hexdigest()


def test_data_are_hashed_once_until_they_change(toy: dict[str, Any]) -> None:
    before, known = [data_hash(LLMConfig(config_dict={**toy, "model": "Pop"})) for _ in range(3)], _hash_of.cache_info()
    assert len(set(before)) == 1 and known.hits >= 2
    file = Path(toy["data_path"]) / "toy" / "toy.inter"
    file.write_text(file.read_text() + "u1\ti1\t5\t999\n")
    assert data_hash(LLMConfig(config_dict={**toy, "model": "Pop"})) != before[0]
    assert _hash_of.cache_info().misses == known.misses + 1


@pytest.mark.parametrize(
    ("model", "key"), [("NAIS", "pretrain_path"), ("NeuMF", "mf_pretrain_path"), ("ConvNCF", "pre_model_path")]
)
def test_weights_that_a_model_begins_with_name_a_run(toy: dict[str, Any], tmp_path: Path, model: str, key: str) -> None:
    file, names = tmp_path / "begin.pth", []
    for content in (b"a", b"b", b"a"):
        file.write_bytes(content)
        names.append(run_folder_of(LLMConfig(config_dict={**toy, "model": model, key: str(file)})))
    assert names[0] == names[2] != names[1]


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("encoder", {"model": "Pop"}),
        ("encoder", {"model": "LLMRanker", "llm": "tiny"}),
        ("text_encoder", {"model": "DPO4Rec", "llm": "tiny"}),
    ],
)
def test_other_weights_in_a_folder_are_another_run(
    toy: dict[str, Any], folder: Path, key: str, settings: dict[str, Any]
) -> None:
    given = {**toy, **settings, key: str(folder)}
    before = run_folder_of(LLMConfig(config_dict=given))
    assert run_folder_of(LLMConfig(config_dict=given)) == before
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    assert run_folder_of(LLMConfig(config_dict=given)) != before


def test_other_weights_that_choose_pairs_are_another_stage(pairs: dict[str, Any], folder: Path) -> None:
    given = {**pairs, "rejected": "semantic", "encoder": str(folder)}
    before = stage_names(given)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    after = stage_names(given)
    assert before[0] == after[0] and before[1] != after[1]
