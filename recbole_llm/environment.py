"""What a result depends on besides its settings: versions, our code, the machine."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from recbole_llm import __version__
from recbole_llm.machine import gpu_driver, gpus, machine_bytes, processor, variables

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
    "scikit-learn",
)
# What a bug report names beside them; no result depends on these, and so no run's name does.
ALSO = ("huggingface_hub", "gguf", "tensorboard", "tabulate", "tqdm", "psutil", "pyyaml", "wandb")
ONLY_SHOWS = ("report/", "cli.py", "explain/", "plan", "preview.py", "progress.py", "__main__.py")


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
