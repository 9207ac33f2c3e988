"""A run folder answers every question: configuration, environment, log, result, per-user rows, candidates."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from recbole.config import Config

from recbole_llm.data.atomic import atomic_file, dataset_folder
from recbole_llm.data.template import FAMILIES, load_template
from recbole_llm.environment import versions
from recbole_llm.errors import UserError
from recbole_llm.files import content_hash, plain, stamp, write_text
from recbole_llm.llm.identity import local_weights
from recbole_llm.llm.model_cache import file_sha256
from recbole_llm.read_keys import unread

# What does not change a result, and so does not name a run.
NOT_IN_HASH = {
    "fsdp",
    "save_every",
    "resume",
    "checkpoint_dir",
    "show_progress",
    "state",
    "device",
    "gpu_id",
    "data_path",
    "log_wandb",
    "wandb_project",
    "save_dataset",
    "save_dataloaders",
    "dataset_save_path",
    "dataloaders_save_path",
}
ATOMIC = ("inter", "item", "user", "kg", "link")  # files of a data set that count whether or not they are loaded


def data_hash(config: Config) -> str:
    """SHA-256 of the data set's atomic files, and of those that ``load_col`` or ``additional_feat_suffix`` name."""
    return _files_hash(config.final_config_dict, config["dataset"])


def _files_hash(settings: Mapping[str, Any], dataset: str) -> str:
    columns, more = settings.get("load_col"), settings.get("additional_feat_suffix") or []
    loaded = {*(columns if isinstance(columns, dict) else {}), *([more] if isinstance(more, str) else more)}
    files = ((s, atomic_file(settings, dataset, s)) for s in (*ATOMIC, *sorted(loaded.difference(ATOMIC))))
    return _hash_of(tuple((suffix, file.absolute(), stamp(file)) for suffix, file in files if file.is_file()))


@lru_cache  # asked for each run of a comparison
def _hash_of(files: tuple[tuple[str, Path, tuple[int, int]], ...]) -> str:
    told = hashlib.sha256()
    for suffix, file, _ in files:
        told.update(suffix.encode() + file.read_bytes())
    return told.hexdigest()


def run_hash(config: Config) -> str:
    """What determines a run's result: the configuration that it reads, prompt, data, versions and our code."""
    left_out = NOT_IN_HASH | unread(config.final_config_dict)
    what = [{k: v for k, v in config.final_config_dict.items() if k not in left_out}, data_hash(config), versions()]
    what.append(config["device"].type)  # which of several GPUs says nothing, a CPU computes in another type
    for key in FAMILIES:  # a file of that name may change
        if key in config:
            what.append(load_template(config[key], config.properties, key))
    asked = (config["eval_config"] or {}).get("encoder")
    for model in [*(config[key] for key in ("llm", "encoder", "text_encoder") if key in config), asked]:
        if model and (weights := local_weights(model)):  # what lies there may change too
            what.append(weights)
    for key, value in config.final_config_dict.items():  # of weights that a model begins with (NeuMF, NAIS, ...)
        if key.endswith("_path") and key not in left_out and isinstance(value, str) and Path(value).is_file():
            what.append([key, file_sha256(Path(value))])
    if other := config["eval_dataset"]:
        own = config["eval_config"] or {}  # as it was typed: it is checked later
        path = {**config.external_config_dict, **own}.get("data_path", config.internal_config_dict["data_path"])
        reads = {"data_path": str(dataset_folder(path, other)), "load_col": own.get("load_col")}
        what.append(_files_hash(reads, other))
    return content_hash(what)


def run_folder_of(config: Config) -> Path:
    """``<checkpoint_dir>/<Model>-<dataset>-<hash>``."""
    return Path(config["checkpoint_dir"]) / f"{config['model']}-{config['dataset']}-{run_hash(config)[:10]}"


def trial_folder_of(config: Config) -> Path:
    """Where a trial of this configuration works: the run's name in ``<checkpoint_dir>/trials``."""
    run = run_folder_of(config)
    return run.parent / "trials" / run.name


def _told(config: Config) -> dict[str, Any]:
    """The settings as they are kept. Of two data sets RecBole has the folder of one: the other's goes to its own."""
    if not config["eval_dataset"]:
        return config.final_config_dict
    path = config.external_config_dict.get("data_path", config.internal_config_dict["data_path"])
    return config.final_config_dict | {"eval_config": {"data_path": path, **(config["eval_config"] or {})}}


def make_run_folder(config: Config, folder: Path) -> Path:
    """The folder of a run or trial, made and tried for writing before any work.

    Raises:
        UserError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in ("result.json", "README.md", "traceback.txt"):  # a result stands only for a finished run
            (folder / stale).unlink(missing_ok=True)
        write_text(folder / "config.yaml", yaml.safe_dump(plain(_told(config)), allow_unicode=True))
    except OSError as error:
        raise UserError(
            f"--checkpoint_dir={config['checkpoint_dir']}: cannot write {folder} ({error}). "
            "Name a folder that can be written."
        ) from error
    return folder
