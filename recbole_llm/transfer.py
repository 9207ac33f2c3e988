"""Train on one data set, rank another with the same adapter: what differs between the two configurations."""

from __future__ import annotations

from typing import Any

from recbole_llm import keys
from recbole_llm.checks import SWITCHES
from recbole_llm.config import LLMConfig
from recbole_llm.errors import ConfigError
from recbole_llm.settings import laid_over

# What `eval_config` may hold: how that data set is read, whom it asks and what.
MAY_DIFFER = keys.READING_KEYS | {"eval_args", "eval_users", "candidate_seed", "min_disliked", "liked_only", "encoder"}
# What training alone needs; the other data set need not have as many users, nor ratings, and
# without `loss` its switches belong to none.
OF_TRAINING = {
    "few_shot",
    "few_shot_seed",
    "disjoint_users",
    "valid_users",
    "loss",
    "rejected",
    "chosen_num",
    *SWITCHES,
}


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
    fixed = [key for key in own if key not in MAY_DIFFER]
    if fixed:
        raise ConfigError(
            [f"--eval_config: {', '.join(fixed)} cannot differ; it may hold {', '.join(sorted(MAY_DIFFER))}."]
        )
    # Where the data lie may be said once for both; how they are read belongs to each.
    belongs = keys.READING_KEYS - {"data_path", "item_text_max_tokens"} | {"dataset", "eval_dataset", "eval_config"}
    left_out = belongs | OF_TRAINING | keys.TRAINING_KEYS
    shared = {k: v for k, v in config.external_config_dict.items() if k not in left_out}
    try:
        return LLMConfig(config["model"], config["eval_dataset"], None, laid_over(shared, own))
    except ConfigError as error:
        raise ConfigError([f"--eval_dataset={config['eval_dataset']}: {p}" for p in error.problems]) from None
