"""The optimizer steps of a training stage: which windows a step covers, its gradients in passes, what is logged."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recbole_llm.data.prompt import Window
from recbole_llm.distributed import anywhere, from_first, gathered, is_first, own_share, sum_gradients
from recbole_llm.files import write_text
from recbole_llm.guards import refuse_loss
from recbole_llm.llm.sharded import even_passes
from recbole_llm.llm.token_tree import batches_by_budget
from recbole_llm.preference import Displacement
from recbole_llm.resume import stopping
from recbole_llm.stages import Stage

_Trainer: Any = object  # to a type checker a mixin has whatever the class has that it is mixed into


class WindowSteps(_Trainer):
    """Mixed into a RecBole trainer whose model is a ``WindowPolicy``: an epoch over the windows of ``stage``.

    An optimizer step covers at least ``train_batch_size`` supervised positions (a window is not cut), split into passes
    of ``token_budget`` tokens; the loss does not depend on the split.
    """

    stage: Stage
    resumed: dict[str, Any] | None
    # Keys that a user would change, told where a stage goes wrong.
    rate_keys = {"SFT": "learning_rate", "preference": "preference_learning_rate"}
    against_collapse = "raise --beta, lower --preference_learning_rate, or set --sft_weight=1"

    def rate_key(self) -> str:
        """The learning rate of the stage, as the user types it."""
        return self.rate_keys["SFT" if self.stage.loss == "SFT" else "preference"]

    def _steps(self, epoch: int) -> Iterator[list[Window]]:
        return optimizer_steps(self.stage.windows, self.config["train_batch_size"], self.config["seed"], epoch)

    def _train_epoch(
        self, train_data: Any, epoch_idx: int, loss_func: Any = None, show_progress: bool = False
    ) -> float:
        """One pass over the stage's windows; returns the mean loss (nats a token for SFT, a pair for the others)."""
        self.model.train()
        done, self.resumed = self.resumed or {"steps": 0, "total": 0.0, "count": 0.0}, None
        total, count = done["total"], done["count"]
        with stopping() as stop:
            for number, windows in enumerate(self._steps(epoch_idx)):
                if number >= done["steps"]:
                    loss_sum, step_count, logged = self._step(windows, epoch_idx, number)
                    total, count = total + loss_sum, count + step_count
                    logged = {name: value / step_count for name, value in logged.items()}
                    self._log_step(epoch_idx, loss_sum / step_count, logged)
                    self._watch(logged)
                    asked, due = anywhere(stop.asked, self.progress.due())
                    if asked or due:
                        self.progress.save(epoch_idx, number + 1, total, count)
                    if asked:
                        raise KeyboardInterrupt
                self.bar.update(sum(len(w.targets) for w in windows))
                self.bar.set_postfix_str(f"epoch {epoch_idx} loss {total / count:.4f}")
        return total / count

    def _watch(self, logged: dict[str, float]) -> None:
        """Warn once a stage when the chosen titles' log-prob collapses."""
        if self.stage.loss == "SFT" or not self.displacement.add(logged["logps/chosen_shift"]):
            return
        self.logger.warning(
            f"Stage {self.stage.loss}: the chosen titles have become e^{-Displacement.LEAST:.0f} times less likely "
            "than under the reference, on average over the last steps. The margin may grow all the same, and the "
            f"ranking suffer: {self.against_collapse}."
        )

    def _tell_standstill(self, stage: Stage, still: dict[str, Any]) -> None:
        if still["stood_still"]:
            self.logger.warning(
                f"Stage {stage.loss}: at its end the loss is still what it is before any training, to "
                f"{still['loss_from_start']:.1g} nats a pair: the preference stage changed next to nothing. Raise "
                f"--{self.rate_key()} ({stage.learning_rate:g}), or train more steps."
            )

    def _step(self, windows: list[Window], epoch: int, number: int) -> tuple[float, int, dict[str, float]]:
        """One optimizer step; returns the loss summed, its count, and sums of what is logged."""
        mine, whole = own_share(windows, [self.model.prompt.window_size(w) for w in windows]), self._count(windows)
        parts = gathered(
            lambda: self.model.budget.run(lambda tokens: self._gradients(mine, whole, tokens, epoch, number))
        )
        total, logged = sum(loss for loss, _ in parts), _summed(values for _, values in parts)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        sum_gradients(trained)
        if self.clip_grad_norm:
            torch.nn.utils.clip_grad_norm_(trained, **self.clip_grad_norm)
        self.optimizer.step()
        self.rate = self.optimizer.param_groups[0]["lr"]
        self.scheduler.step()
        self.tokens += sum(map(self.model.prompt.window_size, windows))
        self.steps += 1
        return total, whole, logged

    def _gradients(
        self, windows: list[Window], whole: int, budget: int, epoch: int, number: int
    ) -> tuple[float, dict[str, float]]:
        """Gradients of this process's windows of a step in passes of ``budget`` tokens.

        Args:
            whole: what the loss of the whole step is averaged over.

        Returns:
            The windows' loss and what is logged, summed.
        """
        self.optimizer.zero_grad(set_to_none=True)
        groups = batches_by_budget([self.model.prompt.window_size(w) for w in windows], budget)
        totals: list[torch.Tensor] = []
        logged: dict[str, Any] = {}
        with even_passes(self.model.policy):
            for group in groups:
                part = self.model.window_loss([windows[i] for i in group], self.stage.loss)
                (part.total / whole).backward()
                totals.append(part.total.detach())
                logged = {name: logged.get(name, 0.0) + value for name, value in part.logged.items()}
        # Read once a step: a GPU would stand still after each pass until the next trees are made.
        found = torch.stack([*totals, *logged.values()]).tolist() if groups else []
        for group, total in zip(groups, found, strict=False):
            if not math.isfinite(total):
                refuse_loss(
                    total, [windows[i] for i in group], self.stage, self.rate_key(), self.protocol, epoch, number
                )
        return sum(found[: len(groups)]), dict(zip(logged, found[len(groups) :], strict=True))

    def _count(self, windows: Sequence[Window]) -> int:
        """What a step's loss is averaged over: title tokens (SFT) or pairs."""
        if self.stage.loss != "SFT":
            return sum(len(w.targets) for w in windows)
        return sum(sum(self.model.prompt.chosen_lengths(w)) for w in windows)

    def _log_step(self, epoch: int, loss: float, logged: dict[str, float]) -> None:
        values = {"loss": loss, "learning_rate": self.rate, **logged}
        if is_first():
            with open(self.metrics_file, "a", encoding="utf-8") as out:
                line = {"stage": self.stage.loss, "epoch": epoch, "step": self.global_step, **values}
                out.write(json.dumps(line) + "\n")
        for name, value in values.items():
            self.tensorboard.add_scalar(f"{self.stage.loss}/{name}", value, self.global_step)
        self.wandblogger.log_metrics(values, head=self.stage.loss)
        self.global_step += 1

    def _take_steps(self, file: Path) -> None:
        """The steps of a stage that was trained before, as if it had been now."""
        self.global_step = from_first(partial(self._copy_steps, file))

    def _copy_steps(self, file: Path) -> int:
        if not file.is_file():
            return self.global_step
        told = file.read_text(encoding="utf-8")
        write_text(self.metrics_file, told)
        return len(told.splitlines())


def _summed(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    """Sum by name; a process without windows has none."""
    found: dict[str, float] = {}
    for part in parts:
        found |= {name: found.get(name, 0.0) + value for name, value in part.items()}
    return found


def optimizer_steps(windows: Sequence[Window], positions: int, seed: int, epoch: int) -> Iterator[list[Window]]:
    """Windows in a seeded order, grouped into optimizer steps of at least so many supervised positions."""
    order = np.random.default_rng([seed, epoch]).permutation(len(windows))
    step, found = [], 0
    for index in order:
        step.append(windows[index])
        found += len(windows[index].targets)
        if found >= positions:
            yield step
            step, found = [], 0
    if step:
        yield step
