"""Train a model and score it on validation alone: what a choice of hyper-parameters may know."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from recbole.utils import calculate_valid_score

from recbole_llm.config import LLMConfig
from recbole_llm.quick_start import build_trainer, fit, read_data, train_base, try_ahead, writing
from recbole_llm.recommender import check_recommenders
from recbole_llm.run_folder import make_run_folder, trial_folder_of
from recbole_llm.run_log import start_log


def validate(
    model: str | None = None,
    dataset: str | None = None,
    config_file_list: list[str] | None = None,
    config_dict: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """``run_recbole_llm`` without the test: no test row is scored, and nothing is kept but stages that runs share.

    Where training validates nothing on its way (``eval_step`` 0), its last state is scored.

    Args:
        model, dataset, config_file_list, config_dict: as in RecBole.

    Returns:
        RecBole's ``best_valid_score``, ``valid_score_bigger`` and ``best_valid_result``.

    Raises:
        UserError: bad input; the message says what to do.
    """
    config = LLMConfig(model=model, dataset=dataset, config_file_list=config_file_list, config_dict=config_dict)
    config["log_wandb"] = False  # a trial is no run of its own there
    folder = trial_folder_of(config)
    try:
        with writing(config, folder):
            score, result = _validate(config, folder)
    except Exception:  # not when stopped: the next try goes on with what lies there
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)  # what cannot be removed does not undo the score
    return {
        "best_valid_score": score,
        "valid_score_bigger": config["valid_metric_bigger"],
        "best_valid_result": result,
    }


def _validate(config: LLMConfig, folder: Path) -> tuple[float, dict[str, float]]:
    """Score and result; what training needs to write goes to ``folder``."""
    check_recommenders(config)
    make_run_folder(config, folder)
    start_log(config, None)
    protocol = read_data(config, None)
    trainer = build_trainer(config, protocol, folder, None)
    try_ahead(config, protocol, trainer.model)
    train_base(config, trainer, None, protocol.valid.mode)
    score, result = fit(config, trainer, protocol, saved=False)
    if result is None:
        result = trainer.evaluate(protocol.valid, load_best_model=False, show_progress=config["show_progress"])
        score = calculate_valid_score(result, trainer.valid_metric)
    return score, result
