"""RecBole's ``log_wandb``: one W&B run for each of ours, begun before any work; off by default."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from recbole.config import Config
from recbole.utils import WandbLogger

from recbole_llm.errors import UserError


class RunLogger(WandbLogger):
    """RecBole's logger, whose epochs go on from one ``fit`` to the next: our trainers fit once a stage.

    Attributes:
        steps: how often each head (``train``, ``valid``, a stage's loss) was logged in the W&B run that is open.
    """

    steps: Counter[str] = Counter()

    def log_metrics(self, metrics: dict[str, Any], head: str = "train", commit: bool = True) -> None:
        """As RecBole's, with ``<head>_step`` counted here."""
        if not self.log_wandb:
            return
        step = f"{head}_step"
        if not self.steps[head]:
            self._wandb.define_metric(f"{head}/*", step_metric=step)
        super().log_metrics({**metrics, step: self.steps[head]}, head, commit)
        self.steps[head] += 1


def wandb_is_installed() -> bool:
    """Whether there is a package to log with; the folder ``wandb`` that it leaves where runs are started is none."""
    found = importlib.util.find_spec("wandb")
    return found is not None and found.origin is not None


@contextmanager
def wandb_run(config: Config) -> Iterator[None]:
    """Around one run: its W&B run is open inside, where ``log_wandb`` asks for one.

    A W&B run that is open already (a sweep's) is used, and left open.

    Raises:
        UserError: W&B cannot start, for lack of an account or a network for example.
    """
    if not config["log_wandb"]:
        yield
        return
    import wandb

    ours = wandb.run is None
    RunLogger.steps.clear()
    try:
        RunLogger(config)
    except Exception as error:  # W&B's errors are of its own kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
        raise UserError(
            f"--log_wandb=True: W&B could not start ({reason}). Run `wandb login` once, set WANDB_MODE=offline, or "
            "leave --log_wandb out."
        ) from error
    failed = 1
    try:
        yield
        failed = 0
    finally:
        if ours:
            wandb.finish(exit_code=failed)
