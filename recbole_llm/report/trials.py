"""One trial of a search: trained and scored on validation, or read where that was done before."""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from recbole_llm.config import LLMConfig
from recbole_llm.costs import Clock
from recbole_llm.environment import versions
from recbole_llm.errors import ConfigError, MachineError, UserError
from recbole_llm.files import held, make_stage_folder, write_json
from recbole_llm.llm.budget import is_out_of_memory
from recbole_llm.report.jobs import in_a_line
from recbole_llm.run_folder import trial_folder_of
from recbole_llm.validation import validate


@dataclass(frozen=True)
class Trial:
    """One configuration, trained and scored on validation.

    Attributes:
        number: 0 is the configuration as given.
        values: of the searched keys.
        score: of ``valid_metric``; None where it failed.
        seconds: wall time when it was run, on whatever machine; without waiting for other processes.
        error: why it failed.
    """

    number: int
    values: dict[str, Any]
    score: float | None
    seconds: float
    error: str | None = None


def run_trial(
    number: int, model: str, dataset: str, settings: dict[str, Any], values: dict[str, Any], alone: bool = True
) -> Trial:
    """Run a trial, or read it where it was run before.

    Args:
        settings: as for a run; ``values``, of the searched keys, are laid over them.
        alone: whether no other trial shares the machine; one that lacks memory beside others is not kept as failed.

    Raises:
        UserError: what says nothing about these values: a full disk, a file that cannot be read, weights that cannot
            be had.
    """
    mine = {**settings, **values}
    try:
        config = LLMConfig(model, dataset, None, mine)
    except ConfigError as wrong:  # values that are fine alone and wrong together
        return Trial(number, values, None, 0.0, in_a_line(wrong))
    file = trial_file(config)
    if kept := _kept(file, number, values):
        return kept
    locks = make_stage_folder(file.parent / ".locks")  # the trial's own folder is removed in the end
    with held(locks.resolve() / f"{file.stem}.lock", file):
        # Another search may have done it while this one waited.
        return _kept(file, number, values) or _do(file, number, config, mine, values, alone)


def _do(
    file: Path, number: int, config: LLMConfig, settings: dict[str, Any], values: dict[str, Any], alone: bool
) -> Trial:
    """Train, score and keep the trial."""
    clock, found, score, where = Clock(), {}, None, None
    try:
        found = validate(config["model"], config["dataset"], None, settings)
        score = float(found["best_valid_score"])
        error = None if math.isfinite(score) else f"the validation score is {score}"
    except Exception as failure:  # RecBole's models fail in any way
        error, where, lacks = in_a_line(failure), traceback.format_exc(), _lacks_memory(failure)
        failed = Trial(number, values, None, clock.spent()[0], error)
        if lacks and not alone:
            return failed
        if _is_of_machine(failure) and not lacks:
            if "device-side assert" in error:  # the values' fault, but this process can do no more on its GPU
                _keep(file, config, failed, None, where)
            if isinstance(failure, UserError):
                raise
            raise MachineError(
                f"--model={config['model']}: a trial was stopped by {error}. Mend that and give the same command "
                "again; finished trials are kept."
            ) from failure
    done = Trial(number, values, None if error else score, clock.spent()[0], error)
    _keep(file, config, done, found.get("best_valid_result"), where)
    return done


def _is_of_machine(error: BaseException) -> bool:
    """Whether a failure says nothing about the values: no room, no weights, no network, a GPU that no longer works."""
    kinds = (OSError, SafetensorError, MachineError, torch.AcceleratorError)
    return any(isinstance(one, kinds) for one in _causes(error))


def _lacks_memory(error: BaseException) -> bool:
    """Whether there was too little, for a pass or, as cuBLAS tells it, to begin with."""
    return any(is_out_of_memory(one) or "ALLOC_FAILED" in str(one) for one in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """A failure and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__


def trial_once(model: str, dataset: str, settings: dict[str, Any], values: dict[str, Any]) -> str | None:
    """Do a trial beside others for whoever reads its file; what stopped it in one line, or None, which a failed trial
    is too.
    """
    try:
        run_trial(0, model, dataset, settings, values, alone=False)
    except UserError as error:
        return in_a_line(error)
    return None


def trial_file(config: LLMConfig) -> Path:
    """Where the trial of this configuration is kept."""
    folder = trial_folder_of(config)
    return folder.with_name(f"{folder.name}.json")


def _kept(file: Path, number: int, values: dict[str, Any]) -> Trial | None:
    """A trial done before; one that was damaged since is done again."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return Trial(number, values, record["score"], record["seconds"], record["error"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error}). Remove it: the trial is done again.") from error


def _keep(file: Path, config: LLMConfig, done: Trial, result: dict[str, float] | None, where: str | None) -> None:
    record = {
        "model": config["model"],
        "dataset": config["dataset"],
        "values": done.values,
        "valid_metric": config["valid_metric"],
        "score": done.score,
        "valid_metrics": result,
        "seconds": done.seconds,
        "error": done.error,
        "traceback": where,
        "seed": config["seed"],
        "device": str(config["device"]),
        "versions": versions(),
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, record)
    except OSError as error:
        raise UserError(
            f"--checkpoint_dir={config['checkpoint_dir']}: could not write {file} ({error}). Free some space and give "
            "the same command again; finished trials are kept."
        ) from error
