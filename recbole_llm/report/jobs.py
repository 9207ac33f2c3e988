"""Does the runs of a comparison: one by one here, in several processes, or on the workers of a Dask cluster."""

from __future__ import annotations

import json
import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from recbole_llm.config import LLMConfig
from recbole_llm.errors import ConfigError, UserError
from recbole_llm.files import make_stage_folder, only_here
from recbole_llm.progress import WholeRun
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.report.apart import Children, Outcome, apart, in_processes, threads_each
from recbole_llm.report.grid import Cell
from recbole_llm.run_folder import run_folder_of

CONNECT_SECONDS = 20
RETRIES = 3  # of a run whose worker died


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
    what = (model, dataset, settings)
    try:
        with only_here(folder):
            return None if _finished(folder) else _changed(folder, *what) or run_or_error(*what)
    except (UserError, OSError) as error:  # no folder, or none that can be written
        return in_a_line(error)


def _changed(folder: Path, model: str, dataset: str | None, settings: dict[str, Any]) -> str | None:
    """Why the run would land in another folder than the one that is waited for; None where it would not."""
    try:
        config = LLMConfig(model, settings.get("dataset", dataset), None, settings)
    except UserError:
        return None  # told by the run
    if run_folder_of(config).name == folder.name:
        return None
    return (
        "the code, the data or a package changed since the comparison began (give the same command again), or this "
        "worker computes on another kind of device"
    )


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


def run_apart(asked: dict[str, Any], children: Children | None = None) -> str | None:
    """Do one run in a process of its own: what it holds in memory, and its folder, it holds no longer than it lives.

    Its output goes to ``console.log``.

    Args:
        asked: as ``_asked`` gives it.
        children: which it is stopped with.

    Returns:
        What went wrong in one line, or None.
    """
    folder = Path(asked["folder"])
    if _finished(folder):
        return None
    try:
        return apart(asked, make_stage_folder(folder) / "console.log", children or Children())
    except (UserError, OSError, TypeError, ValueError) as error:  # the last two: settings that JSON does not hold
        return in_a_line(error)


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
