"""Reference log-probs of a preference stage's pairs, each computed once and kept on disk as they come.

A part of the windows has a file of its own, named by the SHA-256 of all that its numbers depend on. So a run that was
killed goes on where it was, losses over the same policy and pairs (DMPO and S-DPO, trials of a search) share them, and
what was computed for another adapter, prompt or pair is never read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from recbole_llm.data.prompt import Window
from recbole_llm.distributed import from_first
from recbole_llm.errors import UserError
from recbole_llm.files import content_hash, whole
from recbole_llm.llm.adapter import digest
from recbole_llm.progress import bar

WINDOWS_AT_ONCE = 64  # of a file, so at most lost by a kill

Logps = Callable[[Sequence[Window]], list[list[list[float]]]]  # windows -> log-probs of each target, chosen first


def fill_reference(
    windows: list[Window], logps: Logps, *, folder: Path, policy: str, show_progress: bool
) -> dict[str, int]:
    """Give each window, in place, the log-probs of its pairs by the policy as it is now.

    Args:
        windows: what the stage trains on.
        logps: log-probs by the policy, nats.
        folder: where they are kept.
        policy: hash of all that they depend on but the windows: weights, prompts, item texts, code.

    Returns:
        Positions that were ``read`` and ``computed``.

    Raises:
        UserError: the folder cannot be written.
    """
    positions = {"read": 0, "computed": 0}
    starts = range(0, len(windows), WINDOWS_AT_ONCE)
    for first in bar(iterable=starts, desc="Reference log-probs", disable=not show_progress):
        part = windows[first : first + WINDOWS_AT_ONCE]
        pairs = [[w.user, w.items, w.targets, w.also, w.rejected] for w in part]
        file = folder / f"{content_hash([policy, pairs])[:32]}.safetensors"
        reference = from_first(partial(_read, file, part))
        positions["computed" if reference is None else "read"] += sum(len(w.targets) for w in part)
        if reference is None:
            reference = logps(part)
            from_first(partial(_write, file, reference))
        windows[first : first + WINDOWS_AT_ONCE] = [
            replace(w, reference=r) for w, r in zip(part, reference, strict=True)
        ]
    return positions


def _write(file: Path, reference: list[list[list[float]]]) -> None:
    # One tensor a window: their numbers of chosen and rejected items need not agree.
    tensors = {str(number): torch.tensor(logps) for number, logps in enumerate(reference)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole(file) as beside:
            save_file(tensors, beside, metadata={"sha256": digest(tensors)})
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"--checkpoint_dir: reference log-probs could not be kept in {file.parent} ({error}). Free some space, or "
            "name another folder."
        ) from error


def _read(file: Path, windows: Sequence[Window]) -> list[list[list[float]]] | None:
    """What ``_write`` wrote for these windows; None if it is not there or damaged."""
    try:
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
            expected = (stored.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    if digest(tensors) != expected or len(tensors) != len(windows):
        return None
    return [tensors[str(number)].tolist() for number in range(len(windows))]
