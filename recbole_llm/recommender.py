"""A RecBole recommender that serves an LLM run: base of a re-ranking, source of rejected items, judge of pairs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.utils import ModelType, init_seed

from recbole_llm import checks, keys
from recbole_llm.config import PROPERTIES, LLMConfig
from recbole_llm.costs import Clock
from recbole_llm.data.protocol import Protocol, prepare_data
from recbole_llm.distributed import from_first
from recbole_llm.errors import ConfigError, UserError
from recbole_llm.files import content_hash, found_or_made
from recbole_llm.model import model_class
from recbole_llm.read_keys import needed_recommenders
from recbole_llm.run_folder import run_hash
from recbole_llm.trainer import trainer_class


@dataclass(frozen=True)
class Recommender:
    """A trained model with the configuration and the data it was trained under.

    Attributes:
        told: for the record of the run: ``what`` it is, ``where`` it lies, the ``seconds`` and ``cpu_seconds`` that its
            training took, and whether it was ``made`` just now or found.
    """

    model: AbstractRecommender
    config: LLMConfig
    protocol: Protocol
    told: dict[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def scores(self, histories: Sequence[Sequence[int]]) -> np.ndarray:
        """Scores of all items after each history of item ids, oldest first ``[B, n_items]``; -inf for padding."""
        most, found = self.config["MAX_ITEM_LIST_LENGTH"], []
        for first in range(0, len(histories), 256):
            kept = [list(h[-most:]) for h in histories[first : first + 256]]
            rows = Interaction(
                {
                    self.model.ITEM_SEQ: torch.tensor([h + [0] * (most - len(h)) for h in kept]),
                    self.model.ITEM_SEQ_LEN: torch.tensor([len(h) for h in kept]),
                }
            ).to(self.config["device"])
            found.append(self.model.full_sort_predict(rows).view(len(kept), -1).float().cpu().numpy())
        scores = np.concatenate(found)
        scores[:, 0] = -np.inf
        return scores


def check_recommenders(config: LLMConfig) -> None:
    """Everything that is wrong with the settings of the models that serve a run, before any work.

    Raises:
        ConfigError: a model that cannot score the items after a history, or settings that it does not take.
    """
    problems: list[str] = []
    needed = needed_recommenders(config)
    others = checks.shared_keys(PROPERTIES) | set(keys.PROTOCOL_KEYS)
    fixed = [k for k in config["recommender_config"] or {} if k in others - keys.TRAINING_KEYS] if needed else []
    if fixed:
        problems.append(f"--recommender_config: {', '.join(fixed)} must be that of the run; leave it out.")
    for key in needed:
        name = config[key]
        try:
            found: Any = model_class(name)
            if key != "rerank_model" and (found.type != ModelType.SEQUENTIAL or hasattr(found, "rerank_with")):
                problems.append(
                    f"--{key}={name}: it must score items after any history; name a sequential model of RecBole, such "
                    "as SASRec."
                )
            elif found.full_sort_predict is AbstractRecommender.full_sort_predict:
                problems.append(f"--{key}={name}: it scores single pairs alone; name a model that scores all items.")
            elif not fixed:
                recommender_config(config, name)
        except ConfigError as error:
            problems += [f"--{key}={name}, --recommender_config: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)


def try_recommenders(config: LLMConfig, protocol: Protocol) -> None:
    """Build what will judge pairs and let it score one history, untrained: some models need more than a history.

    Raises:
        UserError: it cannot, or there are too few users to judge across.
    """
    for key in (k for k in needed_recommenders(config) if k != "rerank_model"):
        own = recommender_config(config, config[key])
        try:
            found = prepare_data(own)
            model = own.model_class(own, found.train_data._dataset).to(own["device"])
            Recommender(model.eval(), own, found).scores([[1]])
        except (
            AttributeError,
            IndexError,
            KeyError,
            NotImplementedError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            raise UserError(
                f"--{key}={config[key]}: it cannot score items after a history of items alone ({type(error).__name__}: "
                f"{error}). Name another sequential model, such as SASRec or GRU4Rec."
            ) from error
        users = len(protocol.training_sequences())
        if key == "oracle_model" and users < 2:
            raise UserError(
                f"--few_shot={config['few_shot']}: the oracle of RosePO judges users by others, and there is {users} "
                "training user. Train on more, or set --smoothing to a number."
            )


def recommender_config(config: LLMConfig, name: str) -> LLMConfig:
    """The configuration of a model that serves a run: data and protocol of the run, training of its own, no W&B.

    Raises:
        ConfigError: what is wrong with ``recommender_config`` for this model.
    """
    shared = {k: v for k, v in shared_settings(config).items() if k not in ("log_wandb", "look_alikes", "encoder")}
    metric, _, top = config["valid_metric"].partition("@")
    shared |= {"metrics": [metric], "topk": [int(top)] if top else config["topk"]}
    own = config["recommender_config"] or {}
    return LLMConfig(name, config["dataset"], None, {**shared, **never_tested(config), **own})


def never_tested(config: LLMConfig) -> dict[str, Any]:
    """Settings of what is validated alone: how the test asks must not name it, so that runs that differ in that share
    it.
    """
    found: dict[str, Any] = {}
    if not _test_draws_users(config):
        asked = config["eval_args"]["mode"]["valid"]
        found["eval_args"] = {**config["eval_args"], "mode": {"valid": asked, "test": asked}}
    if config["valid_users"] and not config["disjoint_users"]:  # where who is tested says who is not validated
        found["eval_users"] = config["valid_users"]
    return found


def _test_draws_users(config: LLMConfig) -> bool:
    """Whether how the test asks says who trains: who has rows of N disliked items is tested, and so trains nothing."""
    modes = [config["eval_args"]["mode"][split] for split in ("valid", "test")]
    low = {max(config["min_disliked"], int(m[3:]) if m.startswith("low") else 0) for m in modes}
    return config["disjoint_users"] and len(low) > 1


def shared_settings(config: LLMConfig) -> dict[str, Any]:
    """What the user set of data and protocol, for another model of the same run."""
    own = set(keys.LLM_KEYS) | set(keys.DPO4REC_KEYS) | keys.TRAINING_KEYS | {"model", "dataset"}
    return {k: v for k, v in config.external_config_dict.items() if k not in own}


def train_recommender(config: LLMConfig, name: str, users: np.ndarray | None = None) -> Recommender:
    """A RecBole model on the training data of a run, under its protocol; trained once, then found on disk.

    Args:
        config: of the run it serves.
        users: train on these of the training users alone (internal ids); None = all of them.
    """
    own = recommender_config(config, name)
    protocol = prepare_data(own, users)
    init_seed(own["seed"], own["reproducibility"])
    model = own.model_class(own, protocol.train_data._dataset).to(own["device"])
    folder = _folder(own, protocol, users)
    trainer = trainer_class(own["MODEL_TYPE"], own["model"])(own, model)
    trainer.start(protocol, folder)
    with closing(trainer.tensorboard):  # RecBole leaves its thread and file open
        record, found = from_first(partial(found_or_made, folder, partial(_fit, trainer, protocol)))
    trainer._load_checkpoint(None)
    logging.getLogger().info(f"{name} in {folder}: validation {record['best_valid_score']:.4f}")
    init_seed(config["seed"], config["reproducibility"])
    spent = {key: record[key] for key in ("seconds", "cpu_seconds")}
    return Recommender(model.eval(), own, protocol, {"what": name, "where": folder.name, **spent, "made": not found})


def _fit(trainer: Any, protocol: Protocol) -> dict[str, Any]:
    """Train the model, whose checkpoint lies in its folder then; the record of that."""
    clock = Clock()
    score, _ = trainer.fit(protocol.train_data, protocol.valid, show_progress=trainer.config["show_progress"])
    seconds, cpu_seconds = clock.spent()
    return {
        "model": trainer.config["model"],
        "best_valid_score": float(score),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }


def _folder(config: LLMConfig, protocol: Protocol, users: np.ndarray | None) -> Path:
    """``<checkpoint_dir>/stages/<Model>-<hash of everything that determines it>``."""
    tokens = protocol.dataset.field2id_token[protocol.dataset.uid_field]
    kept = None if users is None else sorted(map(str, tokens[users]))
    told = content_hash([run_hash(config), kept])
    return Path(config["checkpoint_dir"]) / "stages" / f"{config['model']}-{told[:12]}"
