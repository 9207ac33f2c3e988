"""How long passes take on this machine: a few of them, run and timed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from recbole_llm.data.prompt import Window
from recbole_llm.memory import process_bytes
from recbole_llm.model.llmranker import LLMRanker
from recbole_llm.plan_counts import Work

SECONDS = 1.5  # of the larger of the two passes that are timed


@dataclass(frozen=True)
class Pace:
    """Seconds of a pass are ``fixed + per_token * tokens``; an optimizer step adds ``step``."""

    fixed: float
    per_token: float
    step: float = 0.0

    def seconds(self, work: Work) -> float:
        """Of all rounds of some work."""
        return work.rounds * (self.fixed * work.passes + self.per_token * work.tokens) + self.step * work.steps


def pace_of(model: LLMRanker, work: Work) -> tuple[Pace, int]:
    """Time a small and a larger pass of some work, after one that warms up.

    Returns:
        The pace, and the tokens of the larger pass.
    """
    sample = work.sample
    once = _training_pass(model, work.name) if work.trained else model.reference_logps
    small = sample[:1]
    timed(model.llm.device, lambda: once(small))
    least = min(timed(model.llm.device, lambda: once(small)) for _ in range(2))
    tokens = model.prompt.window_size(small[0])
    large, size = _within(model, sample, int(tokens * max(1.0, SECONDS / least)))
    step = _step_seconds(model) if work.trained else 0.0
    if len(large) == 1:
        return Pace(0.0, least / tokens, step), tokens
    most = min(timed(model.llm.device, lambda: once(large)) for _ in range(2))
    slope = max(0.0, (most - least) / (size - tokens))
    fixed = max(0.0, least - slope * tokens)
    model.zero_grad(set_to_none=True)
    return Pace(fixed, (most - fixed) / size, step), size


class PeakMemory(threading.Thread):
    """Watches this process's memory, or the GPU's, while something runs: ``with PeakMemory() as peak: ...``.

    Attributes:
        before, peak: bytes on entering, and at most until leaving.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__(daemon=True)
        self.device, self._done = device or torch.device("cpu"), threading.Event()

    def __enter__(self) -> PeakMemory:
        self.before = self.peak = self._held()
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self.join()
        self._look()

    def run(self) -> None:
        """Look every few milliseconds."""
        while not self._done.wait(0.002):
            self._look()

    def _look(self) -> None:
        self.peak = max(self.peak, self._held())

    def _held(self) -> int:
        return torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else process_bytes()


def _training_pass(model: LLMRanker, loss: str) -> Callable[[Sequence[Window]], None]:
    """Forward and backward pass of a stage's loss, any numbers standing for the reference."""

    def once(windows: Sequence[Window]) -> None:
        model.train()
        if loss != "SFT":
            branches = [[1 + len(items) for items in w.branches()] for w in windows]
            windows = [
                replace(w, reference=[[0.0] * n for n in counts]) for w, counts in zip(windows, branches, strict=True)
            ]
        part = model.window_loss(windows, loss)
        (part.total / part.count).backward()

    return once


def _step_seconds(model: LLMRanker) -> float:
    """Seconds of clipping and of an AdamW step that moves nothing."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.0, weight_decay=0.0)

    def once(_: Sequence[Window]) -> None:
        torch.nn.utils.clip_grad_norm_(weights, 1e9)
        optimizer.step()

    timed(model.llm.device, lambda: once([]))  # makes the state
    return timed(model.llm.device, lambda: once([]))


def timed(device: str, work: Callable[[], object]) -> float:
    """Seconds of one run of ``work`` on a device such as ``cuda:0``."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    clock = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - clock


def _within(model: LLMRanker, windows: Sequence[Window], most: int) -> tuple[Sequence[Window], int]:
    """The first windows that keep to so many tokens, one at least, and their tokens."""
    taken: list[Window] = []
    total = 0
    for window in windows:
        size = model.prompt.window_size(window)
        if taken and total + size > most:
            break
        taken.append(window)
        total += size
    return taken, total
