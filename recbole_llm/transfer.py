"""Train on one data set, rank another with the same adapter: what differs between the two configurations."""

from __future__ import annotations

from typing import Any

from recbole_llm.config import LLMConfig
from recbole_llm.errors import ConfigError

# Settings that belong to one data set: the other takes its own from `eval_config`, or the defaults.
OF_ONE_DATASET = (
    "dataset",
    "eval_dataset",
    "eval_config",
    "item_text",
    "load_col",
    "unload_col",
    "val_interval",
    "rm_dup_inter",
    "user_inter_num_interval",
    "item_inter_num_interval",
)
FIXED = ("USER_ID_FIELD", "ITEM_ID_FIELD", "model", "seed", "llm", "prompt", "MAX_ITEM_LIST_LENGTH", "metrics", "topk")


def eval_config_of(config: LLMConfig) -> LLMConfig:
    """The configuration that the data to be ranked are read with: ``config`` itself, or that of ``eval_dataset``.

    Raises:
        ConfigError: what is wrong with ``eval_dataset`` and ``eval_config``, told before any work.
    """
    if not config["eval_dataset"]:
        if config["eval_config"]:
            raise ConfigError([f"--eval_config={config['eval_config']!r}: it needs --eval_dataset=<name>."])
        return config
    own: dict[str, Any] = config["eval_config"] or {}
    fixed = [key for key in FIXED if key in own]
    if fixed:
        raise ConfigError([f"--eval_config: {', '.join(fixed)} must be that of the training run; leave it out."])
    shared = {k: v for k, v in config.external_config_dict.items() if k not in OF_ONE_DATASET}
    try:
        return LLMConfig(config["model"], config["eval_dataset"], None, {**shared, **own})
    except ConfigError as error:
        raise ConfigError([f"--eval_dataset={config['eval_dataset']}: {p}" for p in error.problems]) from None
