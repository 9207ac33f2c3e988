"""Does the runs of a comparison: one by one here, in several processes, or on the workers of a Dask cluster."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from recbole_llm.errors import ConfigError, UserError
from recbole_llm.files import make_stage_folder, only_here
from recbole_llm.progress import WholeRun
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.report.grid import Cell

CONNECT_SECONDS = 20
RETRIES = 3  # of a run whose worker died
Outcome = tuple[int, "str | None"]  # which cell, and what went wrong
_children: set[subprocess.Popen[bytes]] = set()  # runs and trials of this process that are on


def run_cells(cells: Sequence[Cell], jobs: int = 1, cluster: str | None = None) -> list[dict[str, Any]]:
    """Do what is not finished yet, and read all results. A run that fails stops no other.

    Args:
        jobs: processes on this machine; 1 = this process.
        cluster: address of a Dask scheduler whose workers see this folder, such as tcp://10.0.0.1:8786.

    Returns:
        Of each cell its ``result.json`` with ``label``, ``run_hash`` and ``run_folder``, or ``label`` and ``error``.

    Raises:
        UserError: no such cluster.
    """
    runs = [(cell.label, cell.config, cell.folder) for cell in cells]
    last_first = reversed(list(enumerate(cells)))
    todo = list({cell.folder: i for i, cell in last_first if not _finished(cell.folder)}.values())[::-1]
    errors: dict[int, str | None] = {}
    if cluster:
        with _on_cluster(cluster, cells, todo) as (ended, threads):
            errors.update(_told(ended, WholeRun(runs, threads)))
    elif jobs == 1:
        whole = WholeRun(runs)
        for i in todo:
            with whole.running(i):
                cell = cells[i]
                errors[i] = run_once(cell.folder, cell.entry.model, cell.setting.dataset, cell.settings)
                if errors[i] is None:
                    whole.learn(i)
    else:
        asked = {i: _asked(cells[i], threads_each(jobs)) for i in todo}
        errors.update(_told(in_processes(run_apart, asked, jobs), WholeRun(runs, jobs)))
    by_folder = {cells[i].folder: error for i, error in errors.items()}  # two labels may be one run
    return [_record(cell, by_folder.get(cell.folder)) for cell in cells]


def _finished(folder: Path) -> bool:
    return (folder / "result.json").is_file()


def _record(cell: Cell, error: str | None) -> dict[str, Any]:
    base = {"label": cell.entry.label, "run_hash": cell.folder.name, "asked_seed": cell.seed}
    if error is None and not _finished(cell.folder):
        error = f"the run left no {cell.folder / 'result.json'}; do the workers see this folder?"
    if error is None:
        try:
            record = json.loads((cell.folder / "result.json").read_text(encoding="utf-8"))
            record["metrics"], record["versions"]
            return record | base | {"run_folder": str(cell.folder)}
        except (OSError, ValueError, TypeError, KeyError) as wrong:
            error = f"{cell.folder / 'result.json'} cannot be read ({wrong!r}); remove it, and the run is done anew"
    logging.getLogger().error(f"{cell.label} failed: {error}")
    return base | {"error": error}


def run_or_error(model: str, dataset: str | None, settings: dict[str, Any]) -> str | None:
    """Do one run; what went wrong in one line, or None."""
    try:
        run_recbole_llm(model, settings.get("dataset", dataset), None, settings)
    except UserError as error:
        return in_a_line(error)
    except Exception as error:  # RecBole's models fail in any way; the others still belong in the table
        logging.getLogger().exception(f"{model} failed")
        return in_a_line(error)
    return None


def in_a_line(error: Exception) -> str:
    """What went wrong, short enough for a table; errors that are not ours go by the name of their type."""
    if isinstance(error, ConfigError):
        return "; ".join(error.problems)
    if isinstance(error, UserError):
        return str(error).splitlines()[0]
    return " ".join(f"{type(error).__name__}: {error}".split())


def run_once(folder: Path, model: str, dataset: str | None, settings: dict[str, Any]) -> str | None:
    """Do a run unless another process does it meanwhile, which is waited for; what went wrong in one line, or None."""
    try:
        with only_here(folder):
            return None if _finished(folder) else run_or_error(model, dataset, settings)
    except (UserError, OSError) as error:  # no folder, or none that can be written
        return in_a_line(error)


def _asked(cell: Cell, threads: int | None) -> dict[str, Any]:
    """A run as plain data, to be done from another process or machine that sees the same files."""
    return {
        "model": cell.entry.model,
        "dataset": cell.setting.dataset,
        "settings": cell.settings,
        "folder": str(cell.folder.absolute()),
        "cwd": str(Path.cwd()),
        "threads": threads,
    }


def run_apart(asked: dict[str, Any]) -> str | None:
    """Do one run in a process of its own: what it holds in memory, and its folder, it holds no longer than it lives.

    Its output goes to ``console.log``.

    Args:
        asked: as ``_asked`` gives it.

    Returns:
        What went wrong in one line, or None.
    """
    folder = Path(asked["folder"])
    if _finished(folder):
        return None
    try:
        return apart(asked, make_stage_folder(folder) / "console.log")
    except (UserError, OSError, TypeError, ValueError) as error:  # the last two: settings that JSON does not hold
        return in_a_line(error)


def apart(asked: dict[str, Any], console: Path) -> str | None:
    """Do a run or a trial, as ``one_run`` reads it, in a process of its own that ends with this one.

    Args:
        asked: with ``threads`` and ``cwd`` of the process.
        console: what it prints is added there.

    Returns:
        What went wrong in one line, or None.

    Raises:
        OSError: ``console`` cannot be written.
    """
    environment = dict(os.environ)
    if asked["threads"]:
        environment.setdefault("OMP_NUM_THREADS", str(asked["threads"]))
    with open(console, "ab") as log, tempfile.TemporaryDirectory() as between:
        question, outcome = Path(between) / "asked.json", Path(between) / "outcome.json"
        question.write_text(json.dumps(asked), encoding="utf-8")
        words = [sys.executable, "-m", "recbole_llm.report.one_run", str(question), str(outcome)]
        # The pipe is never written to: the run ends when it closes, so when this process is killed.
        with subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=asked["cwd"], env=environment
        ) as child:
            _children.add(child)
            try:
                child.wait()
            finally:
                _children.discard(child)
                child.kill()
        if not outcome.is_file():
            killed = f"by signal {-child.returncode}" if child.returncode < 0 else f"with status {child.returncode}"
            return f"its process ended {killed} ({console} may say why; out of memory is likely)"
        return json.loads(outcome.read_text(encoding="utf-8"))["error"]


def threads_each(jobs: int) -> int:
    """The cores are shared out between processes."""
    return max(1, (os.cpu_count() or 1) // jobs)


def in_processes(
    work: Callable[[Any], str | None], asked: Mapping[int, Any], jobs: int
) -> Generator[Outcome, None, None]:
    """``work``, which calls ``apart``, of each of ``asked``, ``jobs`` of them at a time, as they end.

    Whoever stops early, by Ctrl-C or an error, ends those that are on: nobody would read them, and the pool waits.
    """
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(work, one): i for i, one in asked.items()}
        try:
            while futures:
                for done in wait(futures, return_when=FIRST_COMPLETED).done:
                    yield futures.pop(done), done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(_children):
                child.kill()


@contextmanager
def _on_cluster(
    address: str, cells: Sequence[Cell], todo: Sequence[int]
) -> Iterator[tuple[Generator[Outcome, None, None], int]]:
    """Runs on the workers of a Dask cluster, as they end, and how many may run at a time.

    One whose worker dies is done again by another.
    """
    try:
        from distributed import Client, as_completed
    except ImportError:
        raise UserError(f"--cluster={address}: needs Dask; pip install 'recbole-llm[cluster]'.") from None
    try:
        client = Client(address, timeout=CONNECT_SECONDS)
    except (OSError, ValueError, TimeoutError) as error:
        raise UserError(
            f"--cluster={address}: no Dask scheduler answers there ({error}). Start one with `dask scheduler` and "
            "workers with `dask worker <address> --nthreads 1`, or leave --cluster out."
        ) from None

    def ended() -> Generator[Outcome, None, None]:
        futures = {}
        for i in todo:
            name = f"run-{cells[i].folder.name}"
            futures[client.submit(run_apart, _asked(cells[i], None), pure=False, retries=RETRIES, key=name)] = i
        for future in as_completed(futures, raise_errors=False):
            try:
                yield futures[future], future.result()
            except Exception as error:  # a worker that died too often, or a scheduler that went away
                yield futures[future], in_a_line(error)

    with client:
        yield ended(), max(1, sum(client.nthreads().values()))


def _told(ended: Generator[Outcome, None, None], whole: WholeRun) -> Iterator[Outcome]:
    """Passes outcomes on and says how far the whole is."""
    whole.side_by_side()
    with closing(ended):
        for i, error in ended:
            whole.ended(i, error)
            yield i, error
