"""What a run costs: seconds between laps, peak memory, and tokens that go through an LLM."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from recbole_llm.distributed import gathered

PROCESS = Path("/proc/self")
_waited = 0.0


@contextmanager
def waiting() -> Iterator[None]:
    """Around waiting for another process: such seconds are no cost of this one."""
    global _waited
    began = time.perf_counter()
    try:
        yield
    finally:
        _waited += time.perf_counter() - began


def _now() -> tuple[float, float]:
    return time.perf_counter() - _waited, time.process_time()


class Clock:
    """Wall and processor seconds, between laps and in all; without those of ``waiting``.

    Attributes:
        earlier: those of a process before this one, which was cut off.
    """

    def __init__(self) -> None:
        self._began = self._at = _now()
        self.earlier = (0.0, 0.0)
        self._wall: dict[str, float] = {}
        self._cpu: dict[str, float] = {}

    def lap(self, name: str, wall: float = 0.0, cpu: float = 0.0) -> None:
        """What ran since the last lap is called ``name``; so are seconds of a process before, which was cut off."""
        now = _now()
        self._wall[name], self._cpu[name] = now[0] - self._at[0] + wall, now[1] - self._at[1] + cpu
        self._at = now

    def spent(self) -> tuple[float, float]:
        """Seconds since this was made, and the earlier ones."""
        now = _now()
        return self.earlier[0] + now[0] - self._began[0], self.earlier[1] + now[1] - self._began[1]

    def spent_by_all(self) -> tuple[float, float]:
        """``spent`` of a run: this process's wall time, all processes' processor time; called by all of them."""
        wall, cpu = self.spent()
        return wall, sum(gathered(lambda: cpu))

    def timings(self) -> dict[str, float]:
        """``<lap>_s`` and ``<lap>_cpu_s`` of every lap and in total, seconds."""
        found = {f"{name}_s": value for name, value in self._wall.items()}
        found |= {f"{name}_cpu_s": value for name, value in self._cpu.items()}
        return found | {"total_s": sum(self._wall.values()), "total_cpu_s": sum(self._cpu.values())}


def found_done(what: str, seconds: float, cpu_seconds: float) -> dict[str, Any]:
    """What another run did for this one, or this one before it was cut off, and what it took there."""
    return {"what": what, "seconds": seconds, "cpu_seconds": cpu_seconds}


def of_all(costs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the processes of a run cost together: the first's wall time, all processor time, the largest peak of one.

    Args:
        costs: ``timings`` and ``peak_memory_bytes`` of each, the first's first.
    """
    timings = [one["timings"] for one in costs]
    total = {name: sum(t[name] for t in timings) if name.endswith("_cpu_s") else s for name, s in timings[0].items()}
    peaks = [one["peak_memory_bytes"] for one in costs]
    return {"timings": total, "peak_memory_bytes": None if None in peaks else max(peaks)}


class Peak:
    """The most memory since this was made: one run's, where a process does several.

    Args:
        device: a GPU's tensors are watched, as torch allocates them; else the process's resident set, which holds
            Python and its libraries too. Linux alone can forget an earlier peak (``clear_refs``).
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.known = device, True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            (PROCESS / "clear_refs").write_text("5")
        except OSError:
            self.known = False

    def bytes(self) -> int | None:
        """Bytes; None where the system does not tell."""
        if not self.known:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        found = re.search(r"VmHWM:\s+(\d+) kB", (PROCESS / "status").read_text())
        return int(found[1]) * 1024 if found else None


class TokenCount:
    """Counts the tokens that go through an LLM's transformer body: ``with TokenCount(body) as count: ...``.

    Args:
        body: ``decoder_and_head(model)[0]``.

    Attributes:
        tokens: so far; on a GPU with the few that fill up a block of attention.
    """

    def __init__(self, body: torch.nn.Module) -> None:
        self.tokens, self._body = 0, body

    def __enter__(self) -> TokenCount:
        self._hook = self._body.register_forward_pre_hook(self._count, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _count(self, body: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.tokens += kwargs["input_ids"].numel()
