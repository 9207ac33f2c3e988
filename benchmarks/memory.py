"""Resident memory: the peak of a piece of work, and an estimate of what a training step of full sequences takes."""

from __future__ import annotations

import threading
from typing import Any

import psutil

GIGABYTE = 1e9


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
    """What a float32 LoRA step over so many tokens keeps for its backward pass, roughly.

    A layer keeps some 16 vectors of the model's width and 5 of the feed-forward's a token (measured: SmolLM2 and an
    8-layer Llama, within a fifth), logits of all positions three times the vocabulary.
    """
    layer = 16 * config.hidden_size + 5 * config.intermediate_size
    logits = 3 * config.vocab_size if all_logits else 0
    return 4.0 * tokens * (config.num_hidden_layers * layer + logits)
