"""Resident memory: the peak of a piece of work, and an estimate of what a training step of full sequences takes."""

from __future__ import annotations

import threading
from typing import Any

import psutil

GIB = 2**30


class PeakMemory:
    """Bytes that this process holds at most while the block runs, sampled by a thread every 2 ms.

    Attributes:
        before: on entering.
        peak: at most, from entering to leaving.
    """

    def __enter__(self) -> PeakMemory:
        self._process, self._end = psutil.Process(), threading.Event()
        self.before = self.peak = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._end.wait(0.002):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()
        self.peak = max(self.peak, self._process.memory_info().rss)


def step_bytes(config: Any, tokens: int, *, all_logits: bool) -> float:
    """What a float32 LoRA step over so many tokens adds to a process, roughly.

    A layer takes some 28 vectors of the model's width and 5 of the feed-forward's a token, logits of all positions five
    times the vocabulary, holes that the allocator leaves included (fitted to SmolLM2: 3 and 3.8 MB a token).
    """
    layer = 28 * config.hidden_size + 5 * config.intermediate_size
    logits = 5 * config.vocab_size if all_logits else 0
    return 4.0 * tokens * (config.num_hidden_layers * layer + logits)
