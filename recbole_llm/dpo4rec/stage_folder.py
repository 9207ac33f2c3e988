"""Where a stage of DPO4Rec lies: under the hash of what determines it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recbole.config import Config

from recbole_llm.environment import versions
from recbole_llm.files import content_hash
from recbole_llm.run_folder import data_hash

# What determines a trained recommender, besides data, texts and rows.
RECOMMENDER_KEYS = tuple(
    """
    recommender_model recommender_config epochs stopping_step train_batch_size learning_rate learner weight_decay
    clip_grad_norm eval_step seed valid_metric metrics topk metric_decimal_place MAX_ITEM_LIST_LENGTH
    knowledge item_knowledge adaptor adaptor_width adaptor_hidden adaptor_dropout shared_experts own_experts
    mask_history shuffle transform enable_amp enable_scaler
""".split()
)
ALIGN_KEYS = tuple(
    """
    alignment beta align_epochs align_batch_size align_learning_rate lr_scheduler warmup_ratio seed lora_r lora_alpha
    lora_dropout lora_target_modules quantization
""".split()
)
OF_POLICY = ("learner", "weight_decay", "clip_grad_norm")  # LLMRanker's, which alignment takes


def stage_folder(config: Config, kind: str, keys: Sequence[str], others: Sequence[Any]) -> Path:
    """``<checkpoint_dir>/stages/DPO4Rec-<kind>-<hash of the settings that keys name, others, data and code>``."""
    settings = {key: config[key] for key in keys}
    what = content_hash([settings, others, data_hash(config), versions()])
    return Path(config["checkpoint_dir"]) / "stages" / f"DPO4Rec-{kind}-{what[:12]}"
