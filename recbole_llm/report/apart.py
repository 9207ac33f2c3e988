"""Runs and trials in processes of their own, several at a time, which end with whoever began them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, CancelledError, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock, current_thread, main_thread
from typing import Any

Outcome = tuple[int, "str | None"]  # which run or trial, and what went wrong
SAVE_SECONDS = 60.0  # that a process has to save its training when it is to stop


class Children:
    """The processes of one comparison or search that are on."""

    def __init__(self) -> None:
        self._lock, self._stopped = Lock(), False
        self._on: set[subprocess.Popen[bytes]] = set()

    @contextmanager
    def running(self, words: list[str], **how: Any) -> Iterator[subprocess.Popen[bytes]]:
        """As ``with Popen``; left early, it is killed.

        Raises:
            CancelledError: all were stopped meanwhile.
        """
        with self._lock:
            if self._stopped:
                raise CancelledError
            # Ctrl-C in a terminal would reach them too, and the second signal, from here, stop them without a save.
            child = subprocess.Popen(words, start_new_session=True, **how)
            self._on.add(child)
        with child:
            try:
                yield child
            finally:
                child.kill()
                with self._lock:
                    self._on.discard(child)

    def stop(self) -> None:
        """End them as Ctrl-C does, so that training is saved; those that take longer are killed."""
        with self._lock:
            self._stopped, left = True, list(self._on)
        if left:
            with suppress(OSError):  # nobody may read it
                print("\nStopping after this step; press Ctrl-C again to stop at once.", flush=True)
        end = time.monotonic() + SAVE_SECONDS
        try:
            for child in left:
                if os.name == "posix":
                    child.send_signal(signal.SIGINT)
            for child in left:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(max(0.0, end - time.monotonic()))
        finally:  # also by a second Ctrl-C
            for child in left:
                child.kill()


def in_processes(
    work: Callable[[Any, Children], str | None], asked: Mapping[int, Any], jobs: int
) -> Generator[Outcome, None, None]:
    """``work``, which calls ``apart``, of each of ``asked``, ``jobs`` of them at a time, as they end.

    Whoever stops early, by Ctrl-C, SIGTERM or an error, stops those that are on: nobody would read them.
    """
    children = Children()
    with ThreadPoolExecutor(jobs) as pool, _sigterm_is_ctrl_c():
        futures = {pool.submit(work, one, children): i for i, one in asked.items()}
        try:
            while futures:
                for done in wait(futures, return_when=FIRST_COMPLETED).done:
                    yield futures.pop(done), done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            children.stop()


@contextmanager
def _sigterm_is_ctrl_c() -> Iterator[None]:
    """What a batch system sends stops as the user does."""
    if current_thread() is not main_thread():  # signals reach the main thread alone
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: not set from Python


def apart(asked: dict[str, Any], console: Path, children: Children) -> str | None:
    """Do a run or a trial, as ``one_run`` reads it, in a process of its own that ends with this one.

    Args:
        asked: with ``threads`` and ``cwd`` of the process.
        console: what it prints is added there.

    Returns:
        What went wrong in one line, or None.

    Raises:
        OSError: ``console`` cannot be written.
        CancelledError: ``children`` were stopped.
    """
    environment = dict(os.environ)
    if asked["threads"]:
        environment.setdefault("OMP_NUM_THREADS", str(asked["threads"]))
    with open(console, "ab") as log, tempfile.TemporaryDirectory() as between:
        question, outcome = Path(between) / "asked.json", Path(between) / "outcome.json"
        question.write_text(json.dumps(asked), encoding="utf-8")
        words = [sys.executable, "-m", "recbole_llm.report.one_run", str(question), str(outcome)]
        # The pipe is never written to: the run ends when it closes, so when this process is killed.
        with children.running(
            words, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=asked["cwd"], env=environment
        ) as child:
            child.wait()
        if not outcome.is_file():
            killed = f"by signal {-child.returncode}" if child.returncode < 0 else f"with status {child.returncode}"
            return f"its process ended {killed} ({console} may say why; out of memory is likely)"
        return json.loads(outcome.read_text(encoding="utf-8"))["error"]


def threads_each(jobs: int) -> int:
    """The cores are shared out between processes."""
    return max(1, (os.cpu_count() or 1) // jobs)
