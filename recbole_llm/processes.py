"""How many processes share a run, as torchrun tells each of them. No torch here: the commands shall not wait for it."""

from __future__ import annotations

import os


def world_size() -> int:
    """How many processes share this run."""
    told = os.environ.get("WORLD_SIZE", "1")
    return int(told) if "RANK" in os.environ and told.isdecimal() else 1  # a scheduler may mean another thing


def rank() -> int:
    """Which of them this one is, from 0."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0
