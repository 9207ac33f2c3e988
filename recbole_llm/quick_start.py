"""Config -> data -> model -> trainer -> evaluation -> run folder, for our models and RecBole's alike."""

from __future__ import annotations

import errno
import logging
import time
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from recbole.utils import init_logger, init_seed

from recbole_llm.config import LLMConfig
from recbole_llm.data.protocol import Protocol, prepare_data
from recbole_llm.errors import UserError
from recbole_llm.model import model_class
from recbole_llm.run_folder import (
    data_hash,
    environment,
    make_run_folder,
    versions,
    write_json,
    write_table,
    write_text,
)
from recbole_llm.trainer import trainer_class

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
# Settings that a re-ranked base model takes over: data, protocol and place; its own training keeps its defaults.
SHARED_WITH_BASE = (
    "data_path",
    "checkpoint_dir",
    "gpu_id",
    "seed",
    "show_progress",
    "state",
    "eval_args",
    "few_shot",
    "few_shot_seed",
    "candidate_seed",
    "eval_users",
    "mask_history",
    "MAX_ITEM_LIST_LENGTH",
    "metrics",
    "topk",
    "valid_metric",
    "load_col",
    "user_inter_num_interval",
    "item_inter_num_interval",
    "USER_ID_FIELD",
    "ITEM_ID_FIELD",
    "TIME_FIELD",
    "RATING_FIELD",
    "field_separator",
)


def run_recbole_llm(
    model: str | None = None,
    dataset: str | None = None,
    config_file_list: list[str] | None = None,
    config_dict: dict[str, Any] | None = None,
    saved: bool = True,
) -> dict[str, Any]:
    """Train and evaluate one model under the protocol; the counterpart of RecBole's ``run_recbole``.

    Args:
        model, dataset, config_file_list, config_dict: as in RecBole.
        saved: keep the best epoch's checkpoint and evaluate that; otherwise the last epoch is evaluated.

    Returns:
        RecBole's ``best_valid_score``, ``valid_score_bigger``, ``best_valid_result`` and ``test_result``, and
        ``run_folder`` and ``candidate_hash``.

    Raises:
        UserError: bad input; the message says what to do.
    """
    config = LLMConfig(model=model, dataset=dataset, config_file_list=config_file_list, config_dict=config_dict)
    try:
        return _run(config, saved)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise UserError(
            f"--checkpoint_dir={config['checkpoint_dir']}: could not write {error.filename or 'a file'} "
            f"({error.strerror}). Free some space, or run in a folder that can be written."
        ) from error


def _run(config: LLMConfig, saved: bool) -> dict[str, Any]:
    folder = make_run_folder(config)
    logger = start_log(config, folder)
    clock = {"start": time.perf_counter()}
    init_seed(config["seed"], config["reproducibility"])
    with explained(config, folder, "reading the data"):
        protocol = prepare_data(config)
    _tell(logger, config, protocol, folder)
    init_seed(config["seed"] + config["local_rank"], config["reproducibility"])
    with explained(config, folder, "building the model"):
        recommender = config.model_class(config, protocol.train_data._dataset).to(config["device"])
        trainer = trainer_for(config, recommender)
    logger.info(recommender)
    trainer.start(protocol, folder)
    if hasattr(recommender, "rerank_with") and "full" in (protocol.valid.mode, protocol.test.mode):
        recommender.rerank_with(_train_base(config, protocol, folder))
    clock["train"] = time.perf_counter()
    with closing(trainer.tensorboard):  # RecBole leaves its thread and file open
        best_score, best_valid = trainer.fit(
            protocol.train_data, protocol.valid, saved=saved, show_progress=config["show_progress"]
        )
    clock["test"] = time.perf_counter()
    test_result = trainer.evaluate(protocol.test, load_best_model=saved, show_progress=config["show_progress"])
    clock["end"] = time.perf_counter()
    result = {
        "best_valid_score": best_score,
        "valid_score_bigger": config["valid_metric_bigger"],
        "best_valid_result": best_valid,
        "test_result": test_result,
        "run_folder": str(folder),
        "candidate_hash": protocol.candidate_hash,
    }
    logger.info(f"best valid : {best_valid}")
    logger.info(f"test result: {test_result}")
    save_run(folder, config, protocol, trainer, result, clock)
    return result


@contextmanager
def explained(config: LLMConfig, folder: Path | None, step: str) -> Iterator[None]:
    """RecBole checks many settings by failing in some way where it first uses them; that is told, not raised.

    Args:
        folder: where the traceback goes; None = nowhere.
        step: what is done inside, as in "reading the data".
    """
    try:
        yield
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        where = ""
        if folder is not None:
            write_text(folder / "traceback.txt", traceback.format_exc())
            where = f" ({folder / 'traceback.txt'} says where)"
        reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
        raise UserError(
            f"--model={config['model']} --dataset={config['dataset']}: {step} failed: {reason}. Check the "
            f"settings that are not the defaults{where}."
        ) from error


def _train_base(config: LLMConfig, protocol: Protocol, folder: Path) -> torch.nn.Module:
    """The recommender whose top items our model reorders: trained on the same data, under the same protocol.

    Raises:
        UserError: `rerank_model` is our own model, or scores single pairs only.
    """
    name = config["rerank_model"]
    if hasattr(model_class(name), "rerank_with"):
        raise UserError(f"--rerank_model={name}: name a RecBole model that ranks all items, for example Pop or SASRec.")
    shared = {k: v for k, v in config.external_config_dict.items() if k in SHARED_WITH_BASE}
    base_config = LLMConfig(name, config["dataset"], None, shared)
    base_protocol = prepare_data(base_config)
    init_seed(base_config["seed"], base_config["reproducibility"])
    base = base_config.model_class(base_config, base_protocol.train_data._dataset).to(base_config["device"])
    trainer = trainer_for(base_config, base)
    trainer.start(base_protocol, folder)
    trainer.fit(base_protocol.train_data, base_protocol.valid, show_progress=base_config["show_progress"])
    result = trainer.evaluate(base_protocol.test)
    logging.getLogger().info(f"base of the re-ranking: {name}, test {result}")
    init_seed(config["seed"], config["reproducibility"])
    return base


def trainer_for(config: LLMConfig, recommender: torch.nn.Module) -> Any:
    """Our model's own trainer class where it names one, else RecBole's with our evaluation."""
    own = getattr(recommender, "trainer_class", None)
    return (own or trainer_class(config["MODEL_TYPE"], config["model"]))(config, recommender)


def start_log(config: LLMConfig, folder: Path) -> logging.Logger:
    """RecBole's logger, with the run folder's ``train.log`` added.

    RecBole calls ``basicConfig`` without force: a second run in one process would go on writing the first one's file.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, logging.FileHandler) or type(handler) is logging.StreamHandler:
            root.removeHandler(handler)
            handler.close()
    init_logger(config)
    ours = logging.FileHandler(folder / "train.log", mode="w", encoding="utf-8")
    ours.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    ours.setLevel(logging.INFO)
    root.addHandler(ours)
    # RecBole leaves the level as it was where the program that runs us has handlers of its own (a notebook, pytest).
    root.setLevel(min(root.level, logging.INFO))
    return logging.getLogger()


def _tell(logger: logging.Logger, config: LLMConfig, protocol: Protocol, folder: Path) -> None:
    logger.info(config)
    logger.info(protocol.dataset)
    users = "all" if protocol.train_users is None else f"{len(protocol.train_users)} (few-shot)"
    logger.info(
        f"Protocol: training users {users}, training interactions {sum(protocol.item_counter.values())}, "
        f"valid {len(protocol.valid)} rows {protocol.valid.mode}, test {len(protocol.test)} rows {protocol.test.mode}, "
        f"candidate hash {protocol.candidate_hash[:12]}, run folder {folder}"
    )


def save_run(
    folder: Path, config: LLMConfig, protocol: Protocol, trainer: Any, result: dict[str, Any], clock: dict[str, float]
) -> None:
    """Write everything but the checkpoint; ``result.json`` last, because it says that the run is whole.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    record = {
        "model": config["model"],
        "dataset": config["dataset"],
        "metrics": result["test_result"],
        "valid_metrics": result["best_valid_result"],
        "candidate_hash": protocol.candidate_hash,
        "valid_candidate_hash": protocol.valid.digest,
        "data_hash": data_hash(config),
        "seed": config["seed"],
        "candidate_seed": config["candidate_seed"],
        "few_shot": config["few_shot"],
        "few_shot_seed": config["few_shot_seed"],
        "mode": protocol.test.mode,
        "rows": len(protocol.test),
        "training_users": None if protocol.train_users is None else len(protocol.train_users),
        "training_interactions": sum(protocol.item_counter.values()),
        "trainable_parameters": trainable,
        "device": str(config["device"]),
        "timings": {
            "data_and_model_s": clock["train"] - clock["start"],
            "train_s": clock["test"] - clock["train"],
            "test_s": clock["end"] - clock["test"],
            "total_s": clock["end"] - clock["start"],
        },
        "versions": versions(),
        **getattr(trainer, "facts", {}),
    }
    try:
        write_json(folder / "env.json", environment())
        write_table(folder / "per_user.csv.gz", trainer.per_user)
        protocol.valid.save(folder / "candidates-valid.jsonl.gz")
        protocol.test.save(folder / "candidates-test.jsonl.gz")
        write_json(folder / "result.json", record)
    except OSError as error:
        raise UserError(
            f"--checkpoint_dir={config['checkpoint_dir']}: could not write {folder} ({error}). "
            "Free some space and run again."
        ) from error
