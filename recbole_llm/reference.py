"""Log-probs by a frozen policy, each computed once and kept on disk as they come: a preference stage's references, and
the pools of ``self_hard``.

A part of the windows has a file of its own, named by the SHA-256 of all that its numbers depend on. So a run that was
killed goes on where it was, losses over the same policy and pairs (DMPO and S-DPO, trials of a search) share them, and
what was computed for another adapter, prompt or pair is never read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from recbole.config import Config
from safetensors import SafetensorError, safe_open

from recbole_llm.costs import Clock
from recbole_llm.data.prompt import Window
from recbole_llm.data.template import load_template
from recbole_llm.distributed import from_first
from recbole_llm.environment import versions
from recbole_llm.errors import MachineError
from recbole_llm.files import content_hash, only_here, write_tensors
from recbole_llm.llm.adapter import adapter_state, digest
from recbole_llm.llm.types import LLM
from recbole_llm.progress import bar

WINDOWS_AT_ONCE = 64  # of a file, so at most lost by a kill

Logps = Callable[[Sequence[Window]], list[list[list[float]]]]  # windows -> log-probs of each target, chosen first


def policy_hash(config: Config, llm: LLM, base: str) -> str:
    """What identifies all that log-probs by a policy as it is now depend on, but the windows.

    Args:
        base: hash of the base weights and the item texts.
    """
    settings = [config["quantization"], config["lora_alpha"], load_template(config["prompt"], config.properties)]
    return content_hash([digest(adapter_state(llm)), base, settings, llm.device.partition(":")[0], versions()])


class KeptLogps:
    """Log-probs of windows by a policy, each part of them in a file of its own, computed where it is not there.

    Args:
        logps: log-probs by the policy, nats.
        folder: of the files.
        policy: hash of all that they depend on but the windows: weights, prompts, item texts, code.

    Attributes:
        counts: positions that were ``read`` and ``computed``, and what those read had taken (``seconds``,
            ``cpu_seconds``, of all processes).
    """

    def __init__(self, logps: Logps, folder: Path, policy: str) -> None:
        self.logps, self.folder, self.policy = logps, folder, policy
        self.counts = {"read": 0, "computed": 0, "seconds": 0.0, "cpu_seconds": 0.0}

    def __call__(self, windows: Sequence[Window]) -> list[list[list[float]]]:
        """Log-probs of each target, chosen first.

        Raises:
            UserError: the folder cannot be written.
        """
        file = self.folder / f"{_name(self.policy, windows)}.safetensors"
        known = from_first(partial(_read, file, windows))
        self.counts["computed" if known is None else "read"] += sum(len(w.targets) for w in windows)
        if known is None:
            clock = Clock()
            found = self.logps(windows)
            from_first(partial(_write, file, found, clock.spent_by_all()))
            return found
        found, seconds, cpu_seconds = known
        self.counts["seconds"] += seconds
        self.counts["cpu_seconds"] += cpu_seconds
        return found


def fill_reference(
    windows: list[Window], logps: Logps, *, stages: Path, policy: str, show_progress: bool
) -> dict[str, Any]:
    """Give each window, in place, the log-probs of its pairs by the policy as it is now.

    Args:
        windows: what the stage trains on.
        logps, policy: as for ``KeptLogps``.
        stages: folder of all stages. They are kept in ``reference-<hash of policy and pairs>`` there, on which one
            process works at a time.

    Returns:
        Its ``counts``.

    Raises:
        UserError: the folder cannot be written.
    """
    parts = [windows[first : first + WINDOWS_AT_ONCE] for first in range(0, len(windows), WINDOWS_AT_ONCE)]
    folder = stages / f"reference-{content_hash([_name(policy, part) for part in parts])[:12]}"
    kept = KeptLogps(logps, folder, policy)
    windows.clear()
    with only_here(folder):
        for part in bar(iterable=parts, desc="Reference log-probs", disable=not show_progress):
            windows += [replace(w, reference=r) for w, r in zip(part, kept(part), strict=True)]
    return kept.counts


def _name(policy: str, windows: Sequence[Window]) -> str:
    return content_hash([policy, [w.told() for w in windows]])[:32]


def _write(file: Path, reference: list[list[list[float]]], spent: tuple[float, float]) -> None:
    # One tensor a window: their numbers of chosen and rejected items need not agree.
    tensors = {str(number): torch.tensor(logps) for number, logps in enumerate(reference)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        seconds, cpu_seconds = map(str, spent)
        write_tensors(file, tensors, {"sha256": digest(tensors), "seconds": seconds, "cpu_seconds": cpu_seconds})
    except (OSError, SafetensorError) as error:
        raise MachineError(
            f"--checkpoint_dir: reference log-probs could not be kept in {file.parent} ({error}). Free some space, or "
            "name another folder."
        ) from error


def _read(file: Path, windows: Sequence[Window]) -> tuple[list[list[list[float]]], float, float] | None:
    """What ``_write`` wrote for these windows, and seconds by clock and processor; None if not there or damaged."""
    try:
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
            known = stored.metadata() or {}
            spent = float(known["seconds"]), float(known["cpu_seconds"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    if digest(tensors) != known.get("sha256") or len(tensors) != len(windows):
        return None
    return [tensors[str(number)].tolist() for number in range(len(windows))], *spent
