"""Runs in several processes, on a cluster, and killed: the same results, nothing lost, nothing done twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from recbole_llm.errors import UserError
from recbole_llm.report import apart, jobs
from recbole_llm.report.compare import compare
from recbole_llm.report.entries import parse_models, split_options
from recbole_llm.report.grid import Cell, cells

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.injects]
SMALL = "SASRec[hidden_size=8,inner_size=8,n_layers=1,n_heads=1,epochs=3]"
# What a clock measures is not compared.
COMPARED = ("table.md", "table.tex", "table.csv", "table.html", "table.json", "tests.csv")


@pytest.fixture(autouse=True)
def processes_with_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums in another order differ in the last digit, so all processes have as many threads as this one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]))


def grid_of(settings: dict[str, Any], models: str, **more: Any) -> list[Cell]:
    options, rest = split_options({**settings, **more})
    return cells(parse_models(models), replace(options, datasets=None), rest, settings["dataset"])


def tables(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in COMPARED}


def test_processes_give_the_same_tables(toy: dict[str, Any], tmp_path: Path) -> None:
    """Two at a time, in processes of their own, one of which fails: as one after the other here."""
    models = f"BPR,{SMALL},SASRec[n_heads=7]"
    here = {**toy, "out": "here"}
    there = {**here, "checkpoint_dir": str(tmp_path / "other"), "jobs": 2, "out": "there"}
    first, second = compare(models, None, here), compare(models, None, there)
    # The path of a traceback is told where a run fails.
    told = [
        done["markdown"].replace(settings["checkpoint_dir"], "") for done, settings in ((first, here), (second, there))
    ]
    assert told[0] == told[1] and "SASRec[n_heads=7]: failed: --model=SASRec" in told[0]
    assert tables(Path("here"))["tests.csv"] == tables(Path("there"))["tests.csv"]
    logs = [file.read_text() for file in (tmp_path / "other").glob("*/console.log")]
    assert len(logs) == 3 and first["failed"] == second["failed"]
    assert not any("Fatal Python error" in log for log in logs)  # the process ended in peace


def test_a_process_that_is_killed_is_a_failed_run(
    toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch, case: Callable[..., None]
) -> None:
    """As the kernel does when memory runs out."""
    case("kills survived")
    (cell,) = grid_of(toy, "Pop")
    command = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    real = subprocess.Popen
    monkeypatch.setattr(apart.subprocess, "Popen", lambda words, **how: real(command, **how))
    told = jobs.run_apart(jobs._asked(cell, 1))
    assert told is not None and "its process ended by signal 9" in told and "console.log" in told
    assert "error" in jobs._record(cell, told)


def test_settings_that_are_no_json_fail_one_run(toy: dict[str, Any]) -> None:
    """As Python may give them: the runs beside it go on."""
    (cell,) = grid_of(toy, "Pop")
    asked = jobs._asked(cell, 1)
    asked["settings"] = asked["settings"] | {"val_interval": {"timestamp": date(2001, 1, 1)}}
    told = jobs.run_apart(asked)
    assert told is not None and told.startswith("TypeError: Object of type date is not JSON serializable")


@pytest.mark.faults
def test_a_run_ends_with_who_began_it(toy: dict[str, Any], tmp_path: Path, case: Callable[..., None]) -> None:
    """The comparison is killed; its run does not go on alone, holding the processor and the folder."""
    case("kills survived")
    long = {**toy, "epochs": 100_000, "eval_step": 0, "out": "out", "jobs": 2}
    code = f"from recbole_llm.report.compare import compare; compare('BPR', None, {long!r})"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (cell,) = grid_of(long, "BPR")
    wait_for(lambda: (cell.folder / "train.log").is_file())
    with pytest.raises(TimeoutError):
        FileLock(cell.folder / ".lock").acquire(timeout=0.1)
    parent.kill()
    parent.wait()
    with FileLock(cell.folder / ".lock", timeout=10):
        size = (cell.folder / "train.log").stat().st_size
        time.sleep(1)
        assert (cell.folder / "train.log").stat().st_size == size


@pytest.mark.faults
def test_ctrl_c_ends_the_runs_that_are_on(toy: dict[str, Any], case: Callable[..., None]) -> None:
    """Where the signal reaches the comparison alone, as ``kill -INT`` sends it."""
    case("kills survived")
    long = {**toy, "epochs": 100_000, "eval_step": 0, "out": "out", "jobs": 2}
    code = f"""
import signal
from recbole_llm.report.compare import compare
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
compare("BPR", None, {long!r})
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (cell,) = grid_of(long, "BPR")
    wait_for(lambda: (cell.folder / "train.log").is_file())
    parent.send_signal(signal.SIGINT)
    assert parent.wait(90) != 0
    FileLock(cell.folder / ".lock").acquire(timeout=10)


# Notes the first signal, as training does, and takes a while to save; the second one would end it at once.
SAVES = """
import signal, time
from pathlib import Path
asked = []
def note(*_):
    asked.append(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.signal(signal.SIGINT, note)
Path("ready").touch()
while not asked:
    time.sleep(0.02)
time.sleep(1)
Path("saved").touch()
"""
COMPARES = f"""
import signal, sys
from recbole_llm.report.apart import in_processes
def work(code, children):
    with children.running([sys.executable, "-c", code]) as child:
        child.wait()
signal.signal(signal.SIGINT, signal.default_int_handler)
list(in_processes(work, {{0: {SAVES!r}, 1: {SAVES!r}}}, 1))
"""


@pytest.mark.parametrize(
    ("send", "what"), [(os.kill, signal.SIGINT), (os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM)]
)
def test_what_is_on_is_stopped_with_a_save(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: Callable[..., None],
    send: Callable[[int, int], None],
    what: int,
) -> None:
    """Whether one process is told or all are, as a terminal does; what has not begun does not begin."""
    case("kills survived")
    monkeypatch.chdir(tmp_path)
    parent = subprocess.Popen([sys.executable, "-c", COMPARES], stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for(Path("ready").is_file)
    send(parent.pid, what)
    assert parent.wait(30) != 0
    assert Path("saved").is_file()


def test_one_comparison_does_not_end_the_runs_of_another(tmp_path: Path) -> None:
    """Two at a time in one process."""

    def sleep(seconds: float, children: apart.Children) -> str:
        with children.running([sys.executable, "-c", f"import time; time.sleep({seconds})"]) as child:
            child.wait()
        return str(child.returncode)

    def all_of(asked: dict[int, float]) -> list[apart.Outcome]:
        return list(apart.in_processes(sleep, asked, 1))

    with ThreadPoolExecutor() as pool:
        short, long = pool.submit(all_of, {0: 0.1}), pool.submit(all_of, {0: 2.0})
        assert (short.result(), long.result()) == ([(0, "0")], [(0, "0")])


def wait_for(true: Any, seconds: float = 240) -> None:
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, "it did not come"
        time.sleep(0.05)


def test_a_run_that_another_process_does_is_waited_for(toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two comparisons share a run: who comes second takes the result of the first."""
    (cell,) = grid_of(toy, "Pop")
    assert jobs.run_or_error("Pop", "toy", cell.settings) is None
    result = (cell.folder / "result.json").read_bytes()
    (cell.folder / "result.json").unlink()
    held = FileLock(cell.folder / ".lock", thread_local=False)
    held.acquire()

    def acquire(self: FileLock, *args: Any, **how: Any) -> Any:
        (cell.folder / "result.json").write_bytes(result)  # the other one has finished
        held.release()
        return real(self, *args, **how)

    real = FileLock.acquire
    monkeypatch.setattr(FileLock, "acquire", acquire)
    monkeypatch.setattr(jobs, "run_or_error", lambda *_: pytest.fail("the run was done twice"))
    assert jobs.run_once(cell.folder, "Pop", "toy", cell.settings) is None


def test_two_labels_may_be_one_run(toy: dict[str, Any]) -> None:
    done = compare("Pop,Pop[]", None, toy)
    assert len({run["run_folder"] for run in done["runs"]}) == 1 and len(done["table"]) == 2


# Killed


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_killed_three_times(toy: dict[str, Any], tmp_path: Path, case: Callable[..., None]) -> None:
    """kill -9 at random moments, then the same command: byte-equal to a comparison that was left alone."""
    case("kills survived", 3)
    shared = [f"--{key}={value}" for key, value in toy.items() if key not in ("checkpoint_dir", "epochs")]
    tiny = "LLMRanker[loss=DMPO,llm=tiny,train_batch_size=32]"
    models = f"--models=Pop,BPR[epochs=3],{SMALL},{tiny}"
    words = [sys.executable, "-m", "recbole_llm", "compare", models, "--seeds=1,2", "--plots=False", *shared]

    def command(where: str) -> list[str]:
        return [*words, f"--checkpoint_dir={tmp_path / where / 'saved'}", f"--out={tmp_path / where / 'out'}"]

    subprocess.run(command("unbroken"), check=True, capture_output=True)
    finished, draw = [], random.Random(int.from_bytes(os.urandom(4)))
    for kill in range(3):
        victim = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # At least one more run than before, so that something is there to be kept.
        wait_for(lambda: len(list((tmp_path / "killed").glob("saved/*/result.json"))) > kill)  # noqa: B023
        time.sleep(draw.random())
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        finished.append({f: f.stat().st_mtime_ns for f in (tmp_path / "killed").glob("saved/*/result.json")})
    subprocess.run(command("killed"), check=True, capture_output=True)
    assert tables(tmp_path / "killed" / "out") == tables(tmp_path / "unbroken" / "out")
    for before in finished:
        assert all(file.stat().st_mtime_ns == when for file, when in before.items())  # nothing was done twice


# A cluster


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_cluster_loses_a_worker(toy: dict[str, Any], tmp_path: Path, case: Callable[..., None]) -> None:
    """A scheduler and two workers in processes of their own; one is killed in the middle of a run."""
    case("kills survived")
    pytest.importorskip("distributed")
    models, seeds = f"{SMALL.replace('epochs=3', 'epochs=25')},BPR[epochs=40]", {"seeds": "1,2"}
    compare(models, None, {**toy, **seeds, "checkpoint_dir": str(tmp_path / "alone"), "out": "alone"})
    file = tmp_path / "scheduler.json"
    log = open(tmp_path / "dask.log", "wb")  # noqa: SIM115 - as long as the processes
    quiet = {"stdout": log, "stderr": log}
    dask = [sys.executable, "-m", "distributed.cli.dask_"]
    words = [*dask[:2], f"{dask[2]}scheduler", "--port=0", "--no-dashboard", f"--scheduler-file={file}"]
    scheduler = subprocess.Popen(words, **quiet)
    workers = []
    try:
        wait_for(file.is_file)
        address = json.loads(file.read_text())["address"]
        for name in ("w0", "w1"):
            words = [*dask[:2], f"{dask[2]}worker", address, "--nthreads=1", "--no-nanny", "--no-dashboard"]
            workers.append(subprocess.Popen([*words, f"--name={name}", f"--local-directory={tmp_path}"], **quiet))
        far = {**toy, **seeds, "cluster": address, "out": "far"}
        code = f"from recbole_llm.report.compare import compare; compare({models!r}, None, {far!r})"
        client = subprocess.Popen([sys.executable, "-c", code], **quiet)
        saved = Path(toy["checkpoint_dir"])
        wait_for(lambda: len(list(saved.glob("*/train.log"))) >= 2)  # both workers are at it
        workers[0].kill()
        assert client.wait(timeout=300) == 0
    finally:
        for process in (*workers, scheduler):
            process.kill()
            process.wait()
    assert tables(Path("far")) == tables(Path("alone"))


def test_no_cluster_is_there(toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(jobs, "CONNECT_SECONDS", 1)
    with pytest.raises(UserError, match="--cluster=tcp://127.0.0.1:1: no Dask scheduler answers there"):
        compare("Pop", None, {**toy, "cluster": "tcp://127.0.0.1:1"})


def test_dask_is_not_there(toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match=r"pip install 'recbole-llm\[cluster\]'"):
        compare("Pop", None, {**toy, "cluster": "tcp://127.0.0.1:1"})


def test_code_that_changed_meanwhile_is_told(toy: dict[str, Any], tmp_path: Path) -> None:
    """The process would land in another folder than the one that is waited for: it says so, and trains nothing."""
    (cell,) = grid_of(toy, "Pop")
    asked = jobs._asked(cell, 1) | {"folder": str(cell.folder.with_name("Pop-toy-0123456789"))}
    error = jobs.run_apart(asked)
    assert error is not None and "changed since the comparison began" in error
    here = jobs.run_once(cell.folder.with_name("Pop-toy-0123456789"), "Pop", "toy", cell.settings)
    assert here == error
    assert not list(tmp_path.glob("saved/*/result.json"))
