"""What a run does not read changes no result, and does not name it; what it reads names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from recbole_llm.config import LLMConfig
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.read_keys import BASE_KEYS, FINETUNE_KEYS, LORA_KEYS, PREFERENCE_KEYS, unread
from recbole_llm.run_folder import run_folder_of

SINGLE = {"full_ranking", "recommender_config"}
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
}
RUNS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "zero-shot": (
        {"finetune": "none"},
        LORA_KEYS | FINETUNE_KEYS | PREFERENCE_KEYS | SINGLE | BASE_KEYS,
    ),
    "SFT": ({}, PREFERENCE_KEYS | SINGLE | BASE_KEYS),
    "SFT on pairs": (
        {
            "prompt": "pair",
            "eval_args": {"mode": {"valid": "uni1", "test": "uni1"}},
            "metrics": ["Hit"],
            "topk": [1],
            "valid_metric": "Hit@1",
        },
        PREFERENCE_KEYS | SINGLE | BASE_KEYS,
    ),
    "full weights": ({"finetune": "full"}, LORA_KEYS | PREFERENCE_KEYS | SINGLE | BASE_KEYS),
    "DPO": ({"loss": "DPO", "rejected_num": 1, "eval_step": 0}, SINGLE | BASE_KEYS),
}


def test_every_key_that_may_be_unread_is_tried() -> None:
    assert set(OTHER) == LORA_KEYS | FINETUNE_KEYS | PREFERENCE_KEYS | SINGLE | BASE_KEYS


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
    assert any(name.startswith("DPO-") for name in stages[0]) == (name == "DPO")


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"loss": "RosePO", "smoothing": "oracle"}, {"oracle_model", "recommender_config", "beta"}),
        ({"loss": "DMPO", "rejected": "from_model"}, {"from_model", "recommender_config", "preference_positions"}),
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
