"""Which keys of LLMRanker a run reads hangs on its other settings; what it does not read does not name it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recbole_llm import keys

LORA_KEYS = {"lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"}
FINETUNE_KEYS = {"learning_rate", "lr_scheduler", "warmup_ratio", "sft_positions", "epochs", "train_batch_size"}
# Read by preference losses alone. Not here: switches that are refused where nothing reads them.
PREFERENCE_KEYS = {
    "beta",
    "sft_weight",
    "preference_epochs",
    "preference_learning_rate",
    "preference_positions",
}
REJECTED_KEYS = {"rejected", "rejected_num"}  # SFT on pairs of titles draws too
CHOSEN_ALONE = {"stream", "stream_games", "instruct", "instruct_games"}  # our prompts that list no pairs
POOL_STRATEGIES = {"self_hard", "semantic", "from_model"}  # draw from ``rejected_pool`` items
ORACLE_KEYS = {"oracle_model", "oracle_folds", "smoothing_max"}
BASE_KEYS = {"rerank_model", "rerank_topk"}
# What determines the SFT adapter, besides data, model and windows. A preference loss shares the stage of all others.
SFT_KEYS = tuple(
    """
    llm dtype quantization finetune lora_r lora_alpha lora_dropout lora_target_modules item_text item_text_max_tokens
    prompt epochs learning_rate train_batch_size learner weight_decay lr_scheduler warmup_ratio clip_grad_norm
    eval_step seed MAX_ITEM_LIST_LENGTH
""".split()
)
# `token_budget` bounds its passes, and `rejected` says what it is trained against.
NEVER_READ = {"eval_batch_size", "train_neg_sample_args"}


def unread(settings: Mapping[str, Any]) -> set[str]:
    """Keys that change nothing under the others: of LoRA without it, of preference losses under SFT, of re-ranking
    where the LLM ranks alone, of full ranking where there is none, of recommenders where none is trained. Empty for
    models that rank no titles.

    In doubt a key is not among them: then equal runs are made twice, never different ones taken for one.
    """
    if not keys.ranks_titles(settings):
        return set()
    found, prefers = set(NEVER_READ), settings["finetune"] != "none" and settings["loss"] != "SFT"
    if settings["finetune"] != "lora":
        found |= LORA_KEYS
    if settings["finetune"] == "none":
        found |= FINETUNE_KEYS
    if not prefers:
        found |= PREFERENCE_KEYS
        if settings["prompt"] in CHOSEN_ALONE or settings["finetune"] == "none":
            found |= REJECTED_KEYS
    if not prefers or settings["loss"] != "RosePO":
        found |= ORACLE_KEYS | {"smoothing"}
    elif settings["smoothing"] != "oracle":
        found |= ORACLE_KEYS
    if not prefers or not settings["dynamic_beta"]:
        found.add("dynamic_margin")
    strategies = set(settings["rejected"].split("+")) if prefers else set()
    if "popularity" not in strategies:
        found.add("popularity_exponent")
    if "from_model" not in strategies:
        found.add("from_model")
    if not strategies & POOL_STRATEGIES:
        found.add("rejected_pool")
    if not any(reranks(settings, mode) for mode in asked_modes(settings)):
        found |= BASE_KEYS
    if "full" not in asked_modes(settings):
        found.add("full_ranking")
    # Loaders, and so their processes, are the recommenders' alone.
    return found if needed_recommenders(settings) else found | {"recommender_config", "worker"}


def needed_recommenders(settings: Mapping[str, Any]) -> list[str]:
    """The keys that name a model which this run will train first, or that is a part of its own."""
    if "recommender_model" in settings:
        return ["recommender_model"]
    if not keys.ranks_titles(settings):
        return []
    prefers = settings["loss"] != "SFT"
    needed = {
        "oracle_model": settings["loss"] == "RosePO" and settings["smoothing"] == "oracle",
        "from_model": prefers and "from_model" in settings["rejected"].split("+"),
        "rerank_model": any(reranks(settings, mode) for mode in asked_modes(settings)),
    }
    return [key for key, is_needed in needed.items() if is_needed]


def reranks(settings: Mapping[str, Any], mode: str) -> bool:
    """Whether LLMRanker orders the top of ``rerank_model`` alone where it is asked in this mode (full, uniN, ...)."""
    return settings["full_ranking"] == "rerank" if mode == "full" else bool(settings["rerank_candidates"])


def answers_of(settings: Mapping[str, Any], mode: str) -> int | None:
    """How many candidates a row has in this mode; None where all items are."""
    return None if mode == "full" else int(mode[3:]) + settings["next_items"]


def asked_modes(settings: Mapping[str, Any]) -> list[Any]:
    """Modes (full, uniN, ...) of validation and test, and those that ``eval_config`` names for another data set."""
    return [*settings["eval_args"]["mode"].values(), *eval_config_modes(settings)]


def eval_config_modes(settings: Mapping[str, Any]) -> list[Any]:
    """Those of ``eval_config``, as they were typed: runs are named before it is checked."""
    other = (settings["eval_config"] or {}).get("eval_args")
    mode = other.get("mode") if isinstance(other, dict) else None
    return [*mode.values()] if isinstance(mode, dict) else [mode] if mode is not None else []
