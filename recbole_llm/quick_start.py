"""Config -> data -> model -> trainer -> evaluation -> run folder, for our models and RecBole's alike."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from recbole.utils import init_seed

from recbole_llm import distributed, keys
from recbole_llm.config import LLMConfig
from recbole_llm.costs import Clock, Peak, of_all
from recbole_llm.data.protocol import Protocol, prepare_data
from recbole_llm.distributed import from_first, gathered, is_first, process_group, same_everywhere
from recbole_llm.errors import ConfigError, UserError
from recbole_llm.files import only_here
from recbole_llm.generation import generated_answers
from recbole_llm.harm import title_embeddings, title_vectors
from recbole_llm.llm.sharded import even_passes
from recbole_llm.processes import world_size
from recbole_llm.read_keys import reranks
from recbole_llm.recommender import check_recommenders, train_recommender, try_recommenders
from recbole_llm.run_folder import make_run_folder, run_folder_of, trial_folder_of
from recbole_llm.run_log import explained, start_log, tell_run
from recbole_llm.run_record import at_start, save_run
from recbole_llm.stages import check_pairs
from recbole_llm.trainer import trainer_class
from recbole_llm.transfer import eval_config_of
from recbole_llm.wandb_log import wandb_run

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)


def run_recbole_llm(
    model: str | None = None,
    dataset: str | None = None,
    config_file_list: list[str] | None = None,
    config_dict: dict[str, Any] | None = None,
    saved: bool = True,
) -> dict[str, Any]:
    """Train and evaluate one model under the protocol; the counterpart of RecBole's ``run_recbole``.

    A second process that is asked for the same run says so and waits until the first has ended.

    Args:
        model, dataset, config_file_list, config_dict: as in RecBole.
        saved: keep the best epoch's checkpoint and evaluate that; otherwise the last epoch of RecBole's models is
            evaluated, and no result is kept. LLMRanker and DPO4Rec, whose stages are kept for other runs, take the
            best all the same.

    Returns:
        RecBole's ``best_valid_score``, ``valid_score_bigger``, ``best_valid_result`` and ``test_result``, and
        ``run_folder`` and ``candidate_hash``.

    Raises:
        UserError: bad input; the message says what to do.
    """
    config = LLMConfig(model=model, dataset=dataset, config_file_list=config_file_list, config_dict=config_dict)
    check_processes(config)
    for needed in (config, eval_config_of(config)):
        check_recommenders(needed)
    folder = run_folder_of(config) if saved else trial_folder_of(config)  # a finished run stays
    with process_group(config["device"]), writing(config, folder), wandb_run(config), only_here(folder):
        return _run(config, folder, saved)


def check_processes(config: LLMConfig) -> None:
    """Whether the run can be shared by as many processes as there are.

    Raises:
        ConfigError: a model that trains in one process, or ``fsdp`` in a single one.
    """
    alone = world_size() == 1
    if not alone and not keys.ranks_titles(config):
        name = config["model"]
        raise ConfigError([f"--model={name}: it trains in one process; leave torchrun out: recbole-llm run -m {name}"])
    if alone and keys.ranks_titles(config) and config["fsdp"]:
        raise ConfigError([f"--fsdp=True: it spreads the LLM over processes; start several: {distributed.TORCHRUN}"])


@contextmanager
def writing(config: LLMConfig, folder: Path) -> Iterator[None]:
    """Around all work in a folder: a full disk, or a folder that cannot be written or is gone, is told as one."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR) and not folder.is_dir():
            raise UserError(
                f"--checkpoint_dir={config['checkpoint_dir']}: {folder} was removed while the run worked in it. Leave "
                "it there and give the same command again; finished stages are kept in stages/."
            ) from error
        if error.errno not in UNWRITABLE:
            raise
        raise UserError(
            f"--checkpoint_dir={config['checkpoint_dir']}: could not write {error.filename or 'a file'} "
            f"({error.strerror}). Free some space, or run in a folder that can be written."
        ) from error


def _run(config: LLMConfig, folder: Path, saved: bool) -> dict[str, Any]:
    test_config = eval_config_of(config)
    same_everywhere("configuration, data and code", lambda: folder.name)
    from_first(partial(make_run_folder, config, folder))
    told = folder if is_first() else None  # where a traceback goes
    logger = start_log(config, folder)
    began = from_first(partial(at_start, config)) if saved else {}
    clock, peak = Clock(), Peak(config["device"])
    asked = protocol = read_data(config, told)
    if test_config is not config:
        with explained(test_config, told, "reading the data to be ranked"):
            asked = prepare_data(test_config)
    same_everywhere("evaluation rows", lambda: f"{protocol.candidate_hash} {asked.candidate_hash}")
    tell_run(logger, config, protocol, asked, folder)
    trainer = build_trainer(config, protocol, folder, told)
    recommender = trainer.model
    title_embeddings(asked.dataset)  # kept for the evaluation
    try_ahead(config, protocol, recommender)
    catalogue = None if asked is protocol else recommender.read_items(test_config, asked.dataset)
    train_base(config, trainer, told, protocol.valid.mode, *([protocol.test.mode] if asked is protocol else []))
    clock.lap("data_and_model")
    with explained(config, told, "training"):
        best_score, best_valid = fit(config, trainer, protocol, saved)
    clock.lap("train", *trainer.earlier)
    if catalogue is not None:
        recommender.rank_items_of(catalogue)
        trainer.protocol = asked
        train_base(test_config, trainer, told, asked.test.mode)
    with explained(config, told, "ranking the test rows"):
        test_result = trainer.evaluate(asked.test, load_best_model=saved, show_progress=config["show_progress"])
    samples = _generate(config, trainer, asked, test_result)
    clock.lap("test")
    result = {
        "best_valid_score": best_score,
        "valid_score_bigger": config["valid_metric_bigger"],
        "best_valid_result": best_valid,
        "test_result": test_result,
        "run_folder": str(folder),
        "candidate_hash": asked.candidate_hash,
    }
    logger.info(f"best valid : {best_valid}")
    logger.info(f"test result: {test_result}")
    costs = of_all(gathered(lambda: {"timings": clock.timings(), "peak_memory_bytes": peak.bytes()}))
    if saved:  # what was not to be kept is no finished run that a comparison takes
        from_first(lambda: save_run(folder, config, protocol, asked, trainer, result, costs, samples, began))
    return result


def read_data(config: LLMConfig, told: Path | None) -> Protocol:
    """Everything that models share.

    Args:
        told: the folder that a traceback goes to; None = nowhere.

    Raises:
        UserError: the data do not suffice for the settings.
    """
    init_seed(config["seed"], config["reproducibility"])
    with explained(config, told, "reading the data"):
        return prepare_data(config)


def build_trainer(config: LLMConfig, protocol: Protocol, folder: Path, told: Path | None) -> Any:
    """A trainer of a new model.

    Args:
        folder: where it writes its checkpoint and records.
        told: as for ``read_data``.

    Raises:
        UserError: a model that cannot be built with these settings.
    """
    init_seed(config["seed"] + config["local_rank"], config["reproducibility"])
    with explained(config, told, "building the model"):
        recommender = config.model_class(config, protocol.train_data._dataset).to(config["device"])
        trainer = trainer_for(config, recommender)
    logging.getLogger().info(recommender)
    trainer.start(protocol, folder)
    return trainer


def train_base(config: LLMConfig, trainer: Any, told: Path | None, *modes: str) -> None:
    """For a model that reorders the top of another one where it is asked in one of these modes: that other one.

    Args:
        told: as for ``read_data``.

    Raises:
        UserError: it cannot be built or trained with these settings.
    """
    if hasattr(trainer.model, "rerank_with") and any(reranks(config, mode) for mode in modes):
        with explained(config, told, f"training --rerank_model={config['rerank_model']}"):
            base = train_recommender(config, config["rerank_model"])
        trainer.model.rerank_with(base.model)
        trainer.facts["recommenders"].append(base.told)


def fit(config: LLMConfig, trainer: Any, protocol: Protocol, saved: bool) -> tuple[float, dict[str, float] | None]:
    """Train; best validation score and result."""
    with closing(trainer.tensorboard):  # RecBole leaves its thread and file open
        return trainer.fit(protocol.train_data, protocol.valid, saved=saved, show_progress=config["show_progress"])


def try_ahead(config: LLMConfig, protocol: Protocol, model: Any) -> None:
    """What would fail only after SFT: models that cannot judge, titles and encoders that cannot be had, pairs that
    cannot be made.

    Raises:
        UserError: names it.
    """
    if keys.ranks_titles(config):
        check_pairs(config, protocol, model.prompt, model.llm.context)
    try_recommenders(config, protocol)
    if keys.ranks_titles(config) and config["loss"] != "SFT" and "semantic" in config["rejected"].split("+"):
        title_vectors(config, protocol.dataset)


def _generate(config: LLMConfig, trainer: Any, asked: Protocol, test_result: dict[str, Any]) -> list[dict[str, Any]]:
    """Free answers of some test users, counted into the result; none where ``generate_users`` is 0."""
    if not config["generate_users"]:
        return []
    with torch.no_grad(), even_passes(trainer.model.policy):
        count, seed = config["generate_users"], config["candidate_seed"]
        counted, samples = generated_answers(trainer.model, asked.test, count, seed)
    test_result.update(counted)
    return samples


def trainer_for(config: LLMConfig, recommender: Any) -> Any:
    """Our model's own trainer class where it names one, else RecBole's with our evaluation."""
    own = getattr(recommender, "trainer_class", None)
    return (own or trainer_class(config["MODEL_TYPE"], config["model"]))(config, recommender)
