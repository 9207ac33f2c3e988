"""A run in several processes as torchrun starts them, forked from one that has imported everything: 2 s, not 20."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from recbole_llm.errors import UserError
from recbole_llm.quick_start import run_recbole_llm


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_together(processes: int, settings: dict[str, Any], before: Callable[[int], None] | None = None) -> list[Any]:
    """What ``run_recbole_llm`` returns in each process, its ``UserError`` as text, or None where the process died.

    Args:
        before: called with the rank first; changes what the process shall do otherwise. Of a module, to be pickled.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.processes"])
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(map(os.path.abspath, sys.path))):  # it knows no other way
        forkserver.ensure_running()
    results = Path(settings["checkpoint_dir"]).parent / "returned"
    results.mkdir(exist_ok=True)
    for stale in results.iterdir():
        stale.unlink()
    port = free_port()
    started = [
        context.Process(target=_work, args=(rank, processes, port, settings, before, results))
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        process.kill()
    files = [results / str(rank) for rank in range(processes)]
    return [pickle.loads(file.read_bytes()) if file.is_file() else None for file in files]


def _work(
    rank: int,
    processes: int,
    port: int,
    settings: dict[str, Any],
    before: Callable[[int], None] | None,
    results: Path,
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.chdir(results.parent)
    torch.set_num_threads(1)
    if before is not None:
        before(rank)
    try:
        told: Any = run_recbole_llm(config_dict=settings)
    except UserError as error:
        told = str(error)
    except BaseException:
        traceback.print_exc(file=sys.stderr)
        raise
    (results / str(rank)).write_bytes(pickle.dumps(told))
