"""What the machine is, as results and bug reports name it; nothing here tells who uses it or where files lie."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from functools import cache
from pathlib import Path

import psutil
import torch

# Variables that change speed, memory or what may be fetched, with their values.
TOLD = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "GOMP_SPINCOUNT",
    "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_THRESHOLD_",
    "TOKENIZERS_PARALLELISM",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING",
    "CUBLAS_WORKSPACE_CONFIG",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_HUB_DISABLE_TELEMETRY",
    "DO_NOT_TRACK",
    "WANDB_MODE",
)
# Paths and addresses, of which only is told that they are set: they may hold names and keys.
SET = ("RECBOLE_LLM_CACHE", "RECBOLE_LLM_WHEELS", "HF_HOME", "HF_ENDPOINT", "HTTPS_PROXY", "https_proxy", "TMPDIR")


def processor() -> str:
    """The CPU's name as the system gives it, such as ``AMD EPYC``."""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    found = re.search(r"model name\s*:\s*(.+)", told)
    return found.group(1) if found else platform.processor()


def machine_bytes(device: torch.device) -> int:
    """Memory of the device, or of the machine or the container that runs on its CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    found = psutil.virtual_memory().total
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        told = Path(file).read_text().strip() if Path(file).is_file() else ""
        found = min(found, int(told)) if told.isdigit() else found
    return found


def gpus() -> list[dict[str, str | int]]:
    """Name and memory (bytes) of each GPU that torch sees."""
    found = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in found]


@cache
def gpu_driver() -> str | None:
    """Version of NVIDIA's driver; None where there is no GPU, or nothing that tells."""
    if not torch.cuda.is_available():
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return told[0] if told else None


def variables() -> dict[str, str]:
    """Environment variables that matter, with their values; of paths and addresses only that they are set."""
    values = {name: os.environ[name] for name in TOLD if name in os.environ}
    return values | {name: "(set)" for name in SET if name in os.environ}
