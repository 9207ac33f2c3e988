"""Where a training stage is, kept on disk every so often: a run that was killed goes on there, to the last bit.

One file holds weights, optimizer, random generators and position. It is written beside and renamed; the one before it
stays, and is used where the newer one is damaged.
"""

from __future__ import annotations

import json
import logging
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from recbole_llm.distributed import from_first, is_first
from recbole_llm.errors import MachineError
from recbole_llm.files import content_hash, write_tensors
from recbole_llm.llm.adapter import adapter_state, digest, set_adapter_state
from recbole_llm.llm.identity import check_identity, identity

FILES = ("progress-0.safetensors", "progress-1.safetensors")  # written in turn
# What RecBole's loop and ours remember between steps.
REMEMBERED = (
    "cur_step",
    "best_valid_score",
    "best_valid_result",
    "tokens",
    "steps",
    "global_step",
    "found",
    "recommenders",
)

logger = logging.getLogger()


class StageProgress:
    """Saves where an ``LLMTrainer`` is in its stage, and puts it back.

    Args:
        trainer: with its stage, optimizer and scheduler made.
        folder: of the stage, whose name already says all that determines the stage.
        every: seconds between saves; 0 = only when stopped.
    """

    def __init__(self, trainer: Any, folder: Path, every: float) -> None:
        self.trainer, self.folder, self.every = trainer, folder, every
        self.saved, self.at = 0, time.monotonic()

    def due(self) -> bool:
        """Whether it is time to save."""
        return bool(self.every) and time.monotonic() - self.at >= self.every

    def save(self, epoch: int, steps: int, total: float, count: float) -> None:
        """Keep the state after ``steps`` steps of an epoch, whose summed loss and count are ``total`` and ``count``.

        Of several processes the first keeps the state, which is the same in all of them but for the random generators.

        Raises:
            UserError: the disk is full; the save before this one is untouched.
        """
        spent = self.trainer.clock.spent_by_all()
        from_first(lambda: self._write(*self._state(epoch, steps, total, count, spent)))
        self.saved, self.at = self.saved + 1, time.monotonic()

    def _state(
        self, epoch: int, steps: int, total: float, count: float, spent: tuple[float, float]
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        trainer, device = self.trainer, self.trainer.device
        tensors = {f"adapter.{name}": tensor for name, tensor in adapter_state(trainer.model.llm).items()}
        for index, values in trainer.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in values.items()}
        tensors |= random_tensors(device)
        # Not among the facts: safetensors takes 100 MB of those, and a long stage has more lines.
        lines = trainer.metrics_file.read_bytes() if trainer.metrics_file.is_file() else b""
        tensors["metrics"] = torch.from_numpy(np.frombuffer(lines, np.uint8).copy())
        schedule = trainer.scheduler.state_dict()
        facts = {
            "base": identity(trainer.model.llm),
            "epoch": epoch,
            "steps": steps,
            "total": total,
            "count": count,
            "saved": self.saved,
            "spent": spent,
            "schedule": {key: schedule[key] for key in ("last_epoch", "_step_count", "_last_lr")},
            "rates": [group["lr"] for group in trainer.optimizer.param_groups],
            "remembered": {name: getattr(trainer, name) for name in REMEMBERED},
            "train_loss": list(trainer.train_loss_dict.items()),
            "displacement": vars(trainer.displacement),
            "random": random_facts(),
        }
        return {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, facts

    def _write(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        told = json.dumps(facts)
        metadata = {"facts": told, "sha256": content_hash([digest(tensors), told])}
        file = self.folder / FILES[self.saved % 2]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_tensors(file, tensors, metadata)
        except (OSError, SafetensorError) as error:
            raise MachineError(
                f"--checkpoint_dir: where the stage is could not be saved in {file} ({error}). Free some space and "
                "give the same command again: it goes on at the save before."
            ) from error

    def restore(self) -> dict[str, Any] | None:
        """Put the newest whole save into the trainer; its facts, or None where there is none.

        Raises:
            UserError: it was made over other base weights, another tokenizer or chat template.
        """
        newest = from_first(self._newest)
        if newest is None:
            return None
        tensors, facts = newest
        trainer = self.trainer
        check_identity(
            facts["base"],
            trainer.model.llm,
            f"the stage that is to go on in {self.folder}",
            "Give the model that it began with, unchanged, or begin the stage anew with --resume=False.",
        )
        adapter = {n.removeprefix("adapter."): t for n, t in tensors.items() if n.startswith("adapter.")}
        set_adapter_state(trainer.model.llm, {n: t.to(trainer.device) for n, t in adapter.items()})
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                state.setdefault(int(index), {})[key] = tensor
        groups = trainer.optimizer.state_dict()["param_groups"]
        trainer.optimizer.load_state_dict({"state": state, "param_groups": groups})
        trainer.scheduler.__dict__.update(facts["schedule"])
        for group, rate in zip(trainer.optimizer.param_groups, facts["rates"], strict=True):
            group["lr"] = rate
        vars(trainer).update(facts["remembered"])
        if is_first():  # whose seconds they are
            trainer.clock.earlier = tuple(facts["spent"])
        trainer.train_loss_dict = {int(epoch): loss for epoch, loss in facts["train_loss"]}
        vars(trainer.displacement).update(facts["displacement"])
        if is_first():
            trainer.metrics_file.write_bytes(tensors["metrics"].numpy().tobytes())
            set_random(tensors, facts["random"], trainer.device)  # the others go on with their own
        self.saved = facts["saved"] + 1
        logger.info(f"Stage {trainer.stage.loss}: going on in epoch {facts['epoch']} after step {facts['steps']}.")
        return facts

    def _newest(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        found = [save for name in FILES if (save := read_save(self.folder / name))]
        return max(found, key=lambda save: save[1]["saved"], default=None)

    def drop(self) -> None:
        """The stage has ended: nothing is left to go on with."""
        for name in FILES:
            (self.folder / name).unlink(missing_ok=True)


def read_save(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """A save's tensors and facts; None, with a warning, where it is damaged."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            tensors, told = {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata() or {}
        if told["sha256"] != content_hash([digest(tensors), told["facts"]]):
            raise ValueError("its SHA-256 is not the one that it names")
        return tensors, json.loads(told["facts"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        logger.warning(f"{file} is damaged ({error}); the save before it is used, or the stage begins anew.")
        return None


# Random generators


def random_tensors(device: torch.device) -> dict[str, torch.Tensor]:
    """States of torch's generators and numpy's."""
    numpys: Any = np.random.get_state()
    table = numpys[1].view(np.int32).copy()  # torch cannot send tensors of uint32 to other processes
    found = {"random.torch": torch.get_rng_state(), "random.numpy": torch.from_numpy(table)}
    return found | ({"random.cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def random_facts() -> dict[str, Any]:
    """States of Python's generator, and what numpy's has beside its table."""
    version, state, gauss = random.getstate()
    numpys: Any = np.random.get_state()
    return {"python": [version, list(state), gauss], "numpy": list(numpys[2:])}


def set_random(tensors: dict[str, torch.Tensor], facts: dict[str, Any], device: torch.device) -> None:
    """Put back what ``random_tensors`` and ``random_facts`` gave."""
    version, state, gauss = facts["python"]
    random.setstate((version, tuple(state), gauss))
    np.random.set_state(("MT19937", tensors["random.numpy"].numpy().view(np.uint32), *facts["numpy"]))
    torch.set_rng_state(tensors["random.torch"])
    if device.type == "cuda" and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"], device)


# Ctrl-C


class Stop:
    """Whether the user has asked to stop."""

    asked = False


@contextmanager
def stopping() -> Iterator[Stop]:
    """Inside, the first Ctrl-C (or SIGTERM, as a batch system sends it) is only noted; the second is as always."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread alone
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: Any) -> None:
        stop.asked = True
        print("\nStopping after this step; press Ctrl-C again to stop at once.", flush=True)
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
