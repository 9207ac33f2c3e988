"""What each of our configuration keys may hold.

A key's meaning, unit and default stand in ``properties/``; here stands what is allowed. RecBole's own keys
are checked against the type of RecBole's default, and those that fail late or silently against a range.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from recbole_llm.key_checks import (
    Check,
    clipping,
    columns,
    flag,
    gpu,
    integer,
    interval,
    learner,
    mixed,
    negatives,
    number,
    off,
    one_of,
    optional_file_name,
    optional_text,
    or_auto,
    smoothing,
    table,
    text,
    text_or_list,
    value_intervals,
)

LOSSES = ("SFT", "DPO", "DMPO", "SDPO", "RosePO", "MultDPO")
REJECTED = ("uniform", "popularity", "low_rating", "self_hard", "semantic", "from_model")
SCORE_NORMS = ("sum", "mean", "pmi")
TOKEN_BUDGET = {"cpu": 2048, "cuda": 16384}  # what token_budget=auto is, by device: a GPU is not filled by less


# Keys that every model shares (properties/overall.yaml).
PROTOCOL_KEYS: dict[str, Check] = {
    "mask_history": flag,
    "next_items": integer(1),
    "candidate_seed": integer(),
    "eval_users": integer(1, optional=True),
    "few_shot": integer(1, optional=True),
    "few_shot_seed": integer(),
    "liked_only": flag,
    "rating_threshold": number(-math.inf),
    "min_disliked": integer(),
    "disjoint_users": flag,
    "valid_users": integer(1, optional=True),
    "encoder": text,
    "look_alikes": integer(1),
}
# Keys of LLMRanker (properties/model/LLMRanker.yaml).
LLM_KEYS: dict[str, Check] = {
    "llm": text,
    "dtype": one_of("auto", "float32", "bfloat16", "float16"),
    "quantization": one_of(None, "4bit"),
    "finetune": one_of("lora", "full", "none"),
    "attention": one_of("auto", "blocks", "flex", "sdpa", "eager"),
    "fast_linears": flag,
    "fsdp": flag,
    "gradient_checkpointing": flag,
    "save_every": number(),
    "resume": flag,
    "lora_r": integer(1),
    "lora_alpha": number(above=True),
    "lora_dropout": number(0, 0.99),
    "lora_target_modules": text_or_list,
    "item_text": text,
    "item_text_max_tokens": integer(4),
    "prompt": text,
    "loss": one_of(*LOSSES),
    "beta": number(above=True),
    "pairwise_mean": flag,
    "reference_free": flag,
    "sft_weight": number(),
    "smoothing": smoothing,
    "smoothing_max": number(0, 0.5),
    "robust": flag,
    "oracle_model": text,
    "oracle_folds": integer(2),
    "boundary_negatives": flag,
    "dynamic_beta": flag,
    "dynamic_margin": number(-math.inf),
    "chosen_num": integer(1),
    "rejected": mixed(*REJECTED),
    "rejected_num": integer(0),
    "rejected_pool": integer(1),
    "popularity_exponent": number(),
    "from_model": text,
    "recommender_config": table,
    "preference_epochs": integer(0),
    "preference_learning_rate": number(above=True),
    "preference_positions": integer(0),
    "sft_positions": integer(0),
    "lr_scheduler": one_of("cosine", "linear", "constant"),
    "warmup_ratio": number(0, 1),
    "token_budget": or_auto(integer(64)),
    "score_norm": one_of(*SCORE_NORMS),
    "full_ranking": one_of("rerank", "exact", "exact_topk"),
    "rerank_model": text,
    "rerank_topk": integer(1),
    "rerank_candidates": flag,
    "rerank_weight": or_auto(number(0, 1)),
    "generate_users": integer(),
    "eval_dataset": optional_file_name,
    "eval_config": table,
}
# Keys of DPO4Rec alone (properties/model/DPO4Rec.yaml); those of its LLM are above.
DPO4REC_KEYS: dict[str, Check] = {
    "recommender_model": one_of("SASRec", "GRU4Rec"),
    "knowledge": one_of("reasoning", "placebo", "none"),
    "text_encoder": text,
    "item_knowledge": flag,
    "adaptor": one_of("experts", "mlp"),
    "adaptor_width": integer(1),
    "adaptor_hidden": integer(1),
    "adaptor_dropout": number(0, 0.99),
    "shared_experts": integer(1),
    "own_experts": integer(1),
    "text_users": integer(1, optional=True),
    "text_positions": integer(1),
    "pair_users": integer(0),
    "reward_positions": integer(1),
    "reward_others": integer(1),
    "reasoning_prompt": text,
    "reasoning_item": text,
    "reasoning_history": integer(1),
    "reasoning_tokens": integer(1),
    "samples": integer(2),
    "temperature": number(above=True),
    "top_p": number(0, 1, above=True),
    "generation_batch": integer(1),
    "endpoint": optional_text,
    "endpoint_model": optional_text,
    "iterations": integer(0),
    "select_iteration": one_of("best", "last"),
    "alignment": one_of("DPO", "SFT"),
    "reward_gap": number(),
    "align_epochs": integer(1),
    "align_batch_size": integer(1),
    "align_learning_rate": number(above=True),
}
# RecBole's keys whose wrong values RecBole would meet late, or never tell.
RECBOLE_KEYS: dict[str, Check] = {
    "epochs": integer(0),
    "train_batch_size": integer(1),
    "eval_batch_size": integer(1),
    "eval_step": integer(0),
    "stopping_step": integer(0),
    "learning_rate": number(above=True),
    "weight_decay": number(),
    "learner": learner,
    "clip_grad_norm": clipping,
    "MAX_ITEM_LIST_LENGTH": integer(1),
    "metric_decimal_place": integer(0),
    "loss_decimal_place": integer(0),
    "seed": integer(0, 2**32 - 1),
    "worker": integer(0),
    "gpu_id": gpu,
    "data_path": text,
    "checkpoint_dir": text,
    "field_separator": text,
    "USER_ID_FIELD": text,
    "ITEM_ID_FIELD": text,
    "TIME_FIELD": text,
    "RATING_FIELD": text,
    "load_col": columns,
    "unload_col": columns,
    "encoding": one_of("utf-8", "UTF-8", "utf8"),
    "rm_dup_inter": one_of(None, "first", "last"),
    "val_interval": value_intervals,
    "train_neg_sample_args": negatives,
    "LIST_SUFFIX": text,
    "ITEM_LIST_LENGTH_FIELD": text,
    "NEG_PREFIX": text,
    "LABEL_FIELD": text,
    "entity_kg_num_interval": interval,
    "relation_kg_num_interval": interval,
    "user_inter_num_interval": interval,
    "item_inter_num_interval": interval,
    "filter_inter_by_user_or_item": off,
}
# RecBole's keys that say how a model trains, not what it is trained on or asked.
TRAINING_KEYS = {
    "epochs",
    "train_batch_size",
    "eval_batch_size",
    "learner",
    "learning_rate",
    "weight_decay",
    "clip_grad_norm",
    "eval_step",
    "stopping_step",
    "train_neg_sample_args",
    "loss_decimal_place",
    "shuffle",
    "transform",
    "require_pow",
    "enable_amp",
    "enable_scaler",
}
# Those of them that an LLM's training has no use for, and RecBole's defaults of them.
NOT_OF_LLMS = {"shuffle": True, "transform": None, "require_pow": False, "enable_amp": False, "enable_scaler": False}
# Keys by which a data set is read, which may differ between two data sets of one run (eval_config).
READING_KEYS = {
    "data_path",
    "field_separator",
    "seq_separator",
    "encoding",
    "TIME_FIELD",
    "RATING_FIELD",
    "load_col",
    "unload_col",
    "val_interval",
    "rm_dup_inter",
    "filter_inter_by_user_or_item",
    "user_inter_num_interval",
    "item_inter_num_interval",
    "item_text",
    "item_text_max_tokens",
}
CHECKS = RECBOLE_KEYS | PROTOCOL_KEYS | LLM_KEYS | DPO4REC_KEYS

# Keys with a choice called none, which the command line reads as an empty value.
NONE_IS_A_CHOICE = ("finetune", "encoder", "knowledge")

# Keys that RecBole reads but lists in no YAML of its own: for every model, and for some.
UNLISTED_KEYS = {"encoding", "tail_ratio"}
UNLISTED_MODEL_KEYS = {
    "HRM": {"reg_weight"},
    "DiffRec": {"norm"},
    "LDiffRec": {"norm"},
    "FEARec": {"sim", "tau", "contrast"},
    "AutoInt": {"has_residual"},
    "KD_DAGFM": {"feature_num"},
}
# Keys of RecBole's that cannot mean anything here, and why.
REFUSED = {
    "threshold": "it labels clicks, and here items are ranked; liked_only with rating_threshold leaves low ratings out",
    "benchmark_filename": "pre-split files are not supported; give one .inter file",
    "config_file": 'nothing reads it; it is called --config_files="a.yaml b.yaml"',
    "config_files": 'a file or dict names no more files; name all on the command line, --config_files="a.yaml b.yaml"',
    **dict.fromkeys(
        ("nproc", "ip", "port", "world_size", "group_offset", "offset", "local_rank"),
        "torchrun sets it (torchrun --nproc_per_node=2 -m recbole_llm run ...); leave it out",
    ),
    **dict.fromkeys(
        ("save_dataset", "save_dataloaders", "dataset_save_path", "dataloaders_save_path"),
        "data are prepared anew for each run and not saved; leave it out",
    ),
}


def ranks_titles(settings: Collection[str]) -> bool:
    """Whether these are settings of a model that ranks by the log-probs of titles (LLMRanker)."""
    return "score_norm" in settings
