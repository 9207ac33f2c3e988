"""A run folder answers every question: configuration, environment, log, result, per-user rows, candidates."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from filelock import FileLock, Timeout
from recbole.config import Config

from recbole_llm import __version__
from recbole_llm.data.atomic import atomic_file, dataset_folder
from recbole_llm.data.prompt import FAMILIES, load_template
from recbole_llm.distributed import is_first
from recbole_llm.errors import UserError
from recbole_llm.llm.identity import local_weights
from recbole_llm.machine import gpu_driver, gpus, machine_bytes, processor, variables
from recbole_llm.read_keys import unread

PACKAGES = (
    "recbole",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "numpy",
    "pandas",
    "scipy",
    "safetensors",
    "tokenizers",
)
# What a bug report names beside them; no result depends on these, and so no run's name does.
ALSO = ("huggingface_hub", "scikit-learn", "gguf", "tensorboard", "tabulate", "tqdm", "psutil", "pyyaml", "wandb")
# What does not change a result, and so does not name a run.
NOT_IN_HASH = {
    "fsdp",
    "save_every",
    "resume",
    "checkpoint_dir",
    "show_progress",
    "state",
    "device",
    "data_path",
    "log_wandb",
    "wandb_project",
    "worker",
    "save_dataset",
    "save_dataloaders",
    "dataset_save_path",
    "dataloaders_save_path",
    "config_files",
}
ONLY_SHOWS = ("report/", "cli.py", "explain/", "plan", "preview.py", "progress.py", "__main__.py")


def content_hash(value: Any) -> str:
    """SHA-256 of anything JSON-able, keys sorted; other objects by their text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def data_hash(config: Config) -> str:
    """SHA-256 of the data set's atomic files."""
    return _files_hash(config.final_config_dict, config["dataset"])


def _files_hash(settings: Mapping[str, Any], dataset: str) -> str:
    told = hashlib.sha256()
    for suffix in ("inter", "item", "user", "kg", "link"):
        file = atomic_file(settings, dataset, suffix)
        if file.is_file():
            told.update(suffix.encode() + file.read_bytes())
    return told.hexdigest()


def run_hash(config: Config) -> str:
    """What determines a run's result: the configuration that it reads, prompt, data, versions and our code."""
    left_out = NOT_IN_HASH | unread(config.final_config_dict)
    what = [{k: v for k, v in config.final_config_dict.items() if k not in left_out}, data_hash(config), versions()]
    for key in FAMILIES:  # a file of that name may change
        if key in config:
            what.append(load_template(config[key], config.properties, key))
    if "llm" in config and (weights := local_weights(config["llm"])):  # what lies there may change too
        what.append(weights)
    if other := config["eval_dataset"]:
        given = {**config.external_config_dict, **(config["eval_config"] or {})}
        path = given.get("data_path", config.internal_config_dict["data_path"])
        what.append(_files_hash({"data_path": str(dataset_folder(path, other))}, other))
    return content_hash(what)


def run_folder_of(config: Config) -> Path:
    """``<checkpoint_dir>/<Model>-<dataset>-<hash>``."""
    return Path(config["checkpoint_dir"]) / f"{config['model']}-{config['dataset']}-{run_hash(config)[:10]}"


def trial_folder_of(config: Config) -> Path:
    """Where a trial of this configuration works: the run's name in ``<checkpoint_dir>/trials``."""
    run = run_folder_of(config)
    return run.parent / "trials" / run.name


def make_run_folder(config: Config, folder: Path) -> Path:
    """The folder of a run or trial, made and tried for writing before any work.

    Raises:
        UserError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in ("result.json", "README.md", "traceback.txt"):  # a result stands only for a finished run
            (folder / stale).unlink(missing_ok=True)
        write_text(folder / "config.yaml", yaml.safe_dump(plain(config.final_config_dict), allow_unicode=True))
    except OSError as error:
        raise UserError(
            f"--checkpoint_dir={config['checkpoint_dir']}: cannot write {folder} ({error}). "
            "Name a folder that can be written."
        ) from error
    return folder


def make_stage_folder(folder: Path) -> Path:
    """The folder, made where it is not there.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--checkpoint_dir: cannot make {folder} ({error}). Name a folder that can be written."
        ) from error
    return folder


@contextmanager
def only_here(folder: Path) -> Iterator[None]:
    """Hold a folder that other processes may want to fill too; where one does, say so and wait until it is done.

    Who holds it may hold it again. The lock goes with its process, so a killed one holds nothing.
    Of the processes of one run the first holds it for all.

    Raises:
        UserError: the folder cannot be made.
    """
    if not is_first():
        yield
        return
    # One lock object for each file in a process: it counts how often its thread holds it.
    lock = FileLock(make_stage_folder(folder).resolve() / ".lock", is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Waiting for {folder}: another process works there.", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """A path beside ``file`` to write to; it takes the file's place when all went well, and is removed else."""
    beside = file.with_name(file.name + ".tmp")
    try:
        yield beside
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write a whole file or none: beside, to disk, then renamed."""
    with whole(file) as beside, open(beside, "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())


def write_json(file: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(file, json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")


def write_table(file: Path, table: pd.DataFrame) -> None:
    """Write a gzipped CSV, whole or not at all; the same table gives the same bytes."""
    with whole(file) as beside:
        table.to_csv(beside, index=False, compression={"method": "gzip", "mtime": 0}, float_format="%.10g")


def plain(value: Any) -> Any:
    """Numbers, texts, lists and dicts of them; everything else as text."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(v) for v in value]
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        return value.item()
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    own = {"recbole_llm": __version__, "recbole_llm_code": code_hash()[:12], "python": platform.python_version()}
    return own | _installed(PACKAGES)


def _installed(packages: Sequence[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def code_hash() -> str:
    """SHA-256 of our source files: a result of other code is not taken for one of this code.

    What only shows results or foretells costs is left out: finished runs outlive a change of a table.
    """
    here = Path(__file__).resolve().parent
    told = hashlib.sha256()
    for file in sorted(here.rglob("*.py")):
        name = file.relative_to(here).as_posix()
        if not name.startswith(ONLY_SHOWS):
            told.update(name.encode() + file.read_bytes())
    return told.hexdigest()


def environment() -> dict[str, Any]:
    """Machine, versions, git commit and the environment variables that matter; no path, no name, no key."""
    return {
        "versions": versions(),
        "other_versions": _installed(ALSO),
        "git_commit": git_commit(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_bytes": machine_bytes(torch.device("cpu")),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "gpus": gpus(),
        "gpu_driver": gpu_driver(),
        "cuda_toolkit": torch.version.cuda,
        "variables": variables(),
    }


def git_commit() -> str | None:
    """Commit of the source tree we run from, with ``-dirty`` where it was changed; None outside a checkout."""
    here = Path(__file__).resolve().parents[1]
    if not (here / ".git").exists():  # installed below someone's repository, whose commit is not ours
        return None
    try:
        told = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.strip()
