"""A run's log: what it reads and is asked, what may not be meant so, and RecBole's failures told in words."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

from recbole.utils import init_logger

from recbole_llm.config import LLMConfig
from recbole_llm.data.protocol import Protocol
from recbole_llm.distributed import is_first
from recbole_llm.errors import UserError
from recbole_llm.files import write_text
from recbole_llm.harm import title_texts
from recbole_llm.read_keys import reranks, unread


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
        EOFError,
        ImportError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
        UnpicklingError,
    ) as error:
        where = ""
        if folder is not None:
            write_text(folder / "traceback.txt", traceback.format_exc())
            where = f" ({folder / 'traceback.txt'} says where)"
        elif not is_first():  # of several processes the first has the folder
            traceback.print_exc()
        reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
        raise UserError(
            f"--model={config['model']} --dataset={config['dataset']}: {step} failed: {reason}. Check the "
            f"settings that are not the defaults{where}."
        ) from error


def start_log(config: LLMConfig, folder: Path | None) -> logging.Logger:
    """RecBole's logger, with the run folder's ``train.log`` added where there is one.

    RecBole calls ``basicConfig`` without force: a second run in one process would go on writing the first one's file.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, logging.FileHandler) or type(handler) is logging.StreamHandler:
            root.removeHandler(handler)
            handler.close()
    if not is_first():  # of several processes the first tells what happens
        root.setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
        return root
    init_logger(config)
    again = folder is not None and (folder / "train.log").is_file()
    if folder is not None:
        ours = logging.FileHandler(folder / "train.log", encoding="utf-8")
        ours.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        ours.setLevel(logging.INFO)
        root.addHandler(ours)
    for handler in root.handlers:
        if isinstance(handler, logging.FileHandler):
            _end_at_failure(handler)
    # RecBole leaves the level as it was where the program that runs us has handlers of its own (a notebook, pytest).
    root.setLevel(min(root.level, logging.INFO))
    if again:
        root.info("The run is started again: train.log goes on below what was written before.")
    return logging.getLogger()


def _end_at_failure(handler: logging.Handler) -> None:
    """A line that cannot be written raises, once; Python's logging would print a traceback for every line."""

    def fail(record: logging.LogRecord) -> None:
        logging.getLogger().removeHandler(handler)
        raise  # what was raised while the line was written

    handler.handleError = fail  # type: ignore[method-assign]  # of this handler alone


def tell_run(logger: logging.Logger, config: LLMConfig, protocol: Protocol, asked: Protocol, folder: Path) -> None:
    """What the run reads and is asked, and what in it may not be meant so."""
    logger.info(config)
    logger.info(protocol.dataset)
    if idle := sorted(unread(config.final_config_dict) & set(config.external_config_dict)):
        logger.warning(f"Given, but read by nothing under the other settings: {', '.join(idle)}")
    if (again := asked.test.repeated()) and (asked.test.mode != "full" or config["mask_history"]):
        logger.info(
            f"Protocol: in {again} of {len(asked.test)} test rows the target is among the user's earlier items, where "
            "no other answer is: that favours models that repeat the history."
        )
    if asked.test.mode == "full" and "full_ranking" not in config.external_config_dict and reranks(config, "full"):
        logger.warning(
            f"--full_ranking=rerank, which was not typed: in mode full the LLM reorders {config['rerank_model']}'s top "
            f"{config['rerank_topk']} and finds nothing else; --full_ranking=exact_topk ranks the whole catalogue."
        )
    near, items = config["look_alikes"], len(asked.events.catalogue)
    if config["encoder"] != "none" and near * 10 > items and _has_titles(asked):
        logger.warning(
            f"--look_alikes={near}: that many of {items} items look like any history, so hallucination tells little; a "
            "tenth of them is the most that makes sense."
        )
    users = "all" if protocol.train_users is None else f"{len(protocol.train_users)} (few-shot)"
    logger.info(
        f"Protocol: training users {users}, training interactions {sum(protocol.item_counter.values())}, "
        f"valid {len(protocol.valid)} rows {protocol.valid.mode}, test {len(asked.test)} rows {asked.test.mode}"
        f"{'' if asked is protocol else ' of ' + config['eval_dataset']}, "
        f"candidate hash {asked.candidate_hash[:12]}, run folder {folder}"
    )


def _has_titles(protocol: Protocol) -> bool:
    """Whether look-alikes can be measured."""
    try:
        title_texts(protocol.dataset)
    except UserError:
        return False
    return True
