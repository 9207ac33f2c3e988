"""Trains an LLM recommender in stages: SFT, then a preference loss whose reference is the SFT policy, frozen."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.trainer import Trainer
from recbole.utils import init_seed
from transformers import get_scheduler

from recbole_llm.costs import TokenCount
from recbole_llm.data.candidates import EvalRows
from recbole_llm.data.prompt import Window, load_template
from recbole_llm.data.protocol import Protocol
from recbole_llm.errors import UserError
from recbole_llm.llm.adapter import adapter_state, digest, load_adapter, save_adapter
from recbole_llm.llm.logps import decoder_and_head
from recbole_llm.llm.token_tree import batches_by_budget
from recbole_llm.preference import Displacement
from recbole_llm.progress import bar
from recbole_llm.reference import fill_reference
from recbole_llm.rerank import choose_weight
from recbole_llm.resume import StageProgress, stopping
from recbole_llm.run_folder import content_hash, only_here, versions, write_json, write_text
from recbole_llm.stages import Stage, base_hash, stages
from recbole_llm.trainer import ProtocolEvaluation


class LLMTrainer(ProtocolEvaluation, Trainer):
    """RecBole's trainer (epochs, early stopping on validation, TensorBoard) over stages of token-tree windows.

    An optimizer step covers ``train_batch_size`` supervised positions, split into passes of ``token_budget`` tokens;
    the loss does not depend on the split.
    """

    # Keys that a user would change, told where a stage goes wrong.
    rate_keys = {"SFT": "learning_rate", "preference": "preference_learning_rate"}
    against_collapse = "raise --beta, lower --preference_learning_rate, or set --sft_weight=1"

    def _build_optimizer(self, **kwargs: Any) -> torch.optim.Optimizer:
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        return super()._build_optimizer(params=trainable or [torch.nn.Parameter(torch.zeros(1))], **kwargs)

    def start(self, protocol: Protocol, run_folder: Path) -> None:
        """Where the data come from and where adapters and step metrics go."""
        super().start(protocol, run_folder)
        self.run_folder = run_folder
        self.stage: Stage  # the one that is being trained
        self.global_step = 0  # over all stages
        self.metrics_file = run_folder / "metrics.jsonl"
        self.metrics_file.unlink(missing_ok=True)
        llm = self.model.llm
        self.facts = {
            "llm": llm.name,
            "llm_revision": llm.revision,
            "dtype": llm.dtype,
            "kernels": llm.kernels,
            "loss": self.config["loss"],
            "prompt": self.config["prompt"],
            "score_norm": self.config["score_norm"],
            "effective_batch": self.config["train_batch_size"],
            "stages": [],
        }

    # ---- stages

    def fit(
        self,
        train_data: Any,
        valid_data: EvalRows | None = None,
        verbose: bool = True,
        saved: bool = True,
        show_progress: bool = False,
        callback_fn: Any = None,
    ) -> tuple[float, dict[str, float] | None]:
        """Run the stages; one that was finished before, with the same everything, is loaded instead.

        Returns:
            Best validation score and result of the last stage.
        """
        best: tuple[float, dict[str, float] | None] = (-np.inf, None)
        for stage in self.stages():
            with only_here(stage.folder):
                done = stage.folder / "stage.json"
                if done.is_file():
                    record = json.loads(done.read_text()) | {"reused": True}
                    self.logger.info(f"Stage {stage.loss}: reusing {stage.folder} (same data, model and settings).")
                    load_adapter(self.model.llm, stage.folder)
                    self._take_steps(stage.folder / self.metrics_file.name)
                    best = (record["best_valid_score"], record["best_valid_result"])
                else:
                    best, record = self._run_stage(stage, train_data, valid_data, verbose, show_progress, callback_fn)
            self.facts["stages"].append(record)
        self.facts["train_tokens"] = sum(stage["tokens"] for stage in self.facts["stages"])
        if not self.facts["stages"] and valid_data:  # nothing was trained: zero-shot
            best = self._valid_epoch(valid_data, show_progress)
        if self.config["rerank_weight"] == "auto" and self.model.base is not None and valid_data:
            best = self._choose_weight(valid_data)
        if self.config["finetune"] != "none":
            save_adapter(self.model.llm, self.run_folder)
        return best

    def _choose_weight(self, valid_data: EvalRows) -> tuple[float, dict[str, float]]:
        """Validation score and result of the mixture at the LLM's best share, which goes to the record."""
        score, result, scores = choose_weight(self, valid_data)
        weight = self.model.rerank_weight
        self.logger.info(f"Share of the LLM in the mixture with {self.config['rerank_model']}: {weight}.")
        self.facts |= {"rerank_weight": weight, "rerank_weights": {str(w): s for w, s in scores.items()}}
        return score, result

    def stages(self) -> Iterator[Stage]:
        """This run's stages, in order."""
        model = self.model
        return stages(
            self.config,
            self.protocol,
            model.prompt,
            context=model.llm.context,
            base=base_hash(model.llm, model.texts),
            policy=model.reference_logps,
        )

    def _run_stage(
        self,
        stage: Stage,
        train_data: Any,
        valid_data: EvalRows | None,
        verbose: bool,
        show_progress: bool,
        callback_fn: Any,
    ) -> tuple[tuple[float, dict[str, float] | None], dict[str, Any]]:
        init_seed(self.config["seed"], self.config["reproducibility"])  # whether or not SFT was trained just now
        self.stage, self.epochs, self.start_epoch, self.cur_step = stage, stage.epochs, 0, 0
        self.eval_step = min(self.config["eval_step"], stage.epochs)
        self.best_valid_score, self.best_valid_result = (-np.inf if self.valid_metric_bigger else np.inf), None
        self.train_loss_dict: dict[int, float] = {}  # RecBole keeps it by epoch, and each stage counts its own
        self.optimizer = self._build_optimizer(learning_rate=stage.learning_rate)
        steps = stage.epochs * sum(1 for _ in self._steps(0))
        warmup = int(steps * self.config["warmup_ratio"])
        self.scheduler = get_scheduler(self.config["lr_scheduler"], self.optimizer, warmup, steps)
        positions, clock, cpu = sum(len(w.targets) for w in stage.windows), time.perf_counter(), time.process_time()
        self.logger.info(
            f"Stage {stage.loss}: {positions} positions in {len(stage.windows)} windows, {stage.epochs} epochs, "
            f"{steps} steps."
        )
        reference = None if stage.loss == "SFT" else self._fill_reference(stage, show_progress)
        self.tokens, self.displacement = 0, Displacement()
        self.progress = StageProgress(self, stage.folder, self.config["save_every"])
        self.resumed = self.progress.restore() if self.config["resume"] else None
        self.start_epoch = self.resumed["epoch"] if self.resumed else 0
        with bar(
            total=positions * stage.epochs, desc=f"Train {stage.loss}", unit="title", disable=not show_progress
        ) as self.bar:
            self.bar.update(positions * self.start_epoch)
            best = super().fit(train_data, valid_data, verbose, True, show_progress, callback_fn)
        load_adapter(self.model.llm, stage.folder)  # the best epoch, as it lies on the disk
        record = {
            "loss": stage.loss,
            "positions": positions,
            "steps": steps,
            "tokens": self.tokens,
            "best_valid_score": None if best[1] is None else best[0],
            "best_valid_result": best[1],
            "train_loss": self.train_loss_dict,
            "seconds": time.perf_counter() - clock,
            "cpu_seconds": time.process_time() - cpu,
            **stage.facts,
        }
        if stage.loss != "SFT":
            record |= {"reference": reference, "displacement": self.displacement.facts()}
        # Runs that share the stage share its curve, and that of the stages before it.
        write_text(stage.folder / self.metrics_file.name, self.metrics_file.read_text(encoding="utf-8"))
        write_json(stage.folder / "stage.json", record)
        self.progress.drop()
        return best, record

    def _take_steps(self, file: Path) -> None:
        """The steps of a stage that was trained before, as if it had been now."""
        if file.is_file():
            told = file.read_text(encoding="utf-8")
            write_text(self.metrics_file, told)
            self.global_step = len(told.splitlines())

    def _fill_reference(self, stage: Stage, show_progress: bool) -> dict[str, int]:
        """Reference log-probs of every pair, before the first update: the policy is the reference, once."""
        model = self.model
        template = load_template(self.config["prompt"], self.config.properties)
        weights = [digest(adapter_state(model.llm)), model.llm.revision, model.llm.dtype]
        settings = [self.config["quantization"], self.config["lora_alpha"]]
        counts = fill_reference(
            stage.windows,
            model.reference_logps,
            folder=stage.folder / "reference",
            policy=content_hash([weights, settings, template, model.texts, versions()]),
            show_progress=show_progress,
        )
        if counts["read"]:
            self.logger.info(f"Reference log-probs: {counts['read']} positions read, {counts['computed']} computed.")
        return counts

    # ---- steps

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
                    if stop.asked or self.progress.due():
                        self.progress.save(epoch_idx, number + 1, total, count)
                    if stop.asked:
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

    def _step(self, windows: list[Window], epoch: int, number: int) -> tuple[float, int, dict[str, float]]:
        """One optimizer step; returns the loss summed, its count, and sums of what is logged."""
        total, logged = self.model.budget.run(lambda tokens: self._gradients(windows, tokens, epoch, number))
        if self.clip_grad_norm:
            torch.nn.utils.clip_grad_norm_(
                [p for p in self.model.parameters() if p.requires_grad], **self.clip_grad_norm
            )
        self.optimizer.step()
        self.scheduler.step()
        self.tokens += sum(map(self.model.prompt.window_size, windows))
        return total, self._count(windows), logged

    def _gradients(self, windows: list[Window], budget: int, epoch: int, number: int) -> tuple[float, dict[str, float]]:
        """Gradients of a step in passes of ``budget`` tokens; returns the loss and what is logged, summed."""
        loss_name, whole = self.stage.loss, self._count(windows)
        self.optimizer.zero_grad(set_to_none=True)
        groups = batches_by_budget([self.model.prompt.window_size(w) for w in windows], budget)
        totals: list[torch.Tensor] = []
        logged: dict[str, Any] = {}
        for group in groups:
            part = self.model.window_loss([windows[i] for i in group], loss_name)
            (part.total / whole).backward()
            totals.append(part.total.detach())
            logged = {name: logged.get(name, 0.0) + value for name, value in part.logged.items()}
        # Read once a step: a GPU would stand still after each pass until the next trees are made.
        found = torch.stack([*totals, *logged.values()]).tolist()
        for group, total in zip(groups, found, strict=False):
            if not math.isfinite(total):
                self._refuse(total, [windows[i] for i in group], epoch, number)
        return sum(found[: len(groups)]), dict(zip(logged, found[len(groups) :], strict=True))

    def _refuse(self, total: float, windows: Sequence[Window], epoch: int, number: int) -> None:
        """Raises ``UserError`` for a loss that is no number; the adapters are still those of the step before."""
        dataset = self.protocol.dataset
        users = sorted({str(dataset.id2token(dataset.uid_field, window.user)) for window in windows})
        key = self.rate_keys["SFT" if self.stage.loss == "SFT" else "preference"]
        raise UserError(
            f"--{key}: the {self.stage.loss} loss became {total} in epoch {epoch}, step {number} "
            f"(users {', '.join(users[:5])}). Lower it; the last good epoch is in {self.stage.folder}."
        )

    def _count(self, windows: Sequence[Window]) -> int:
        """What a step's loss is averaged over: title tokens (SFT) or pairs."""
        if self.stage.loss != "SFT":
            return sum(len(w.targets) for w in windows)
        return sum(sum(self.model.prompt.chosen_lengths(w)) for w in windows)

    def _log_step(self, epoch: int, loss: float, logged: dict[str, float]) -> None:
        values = {"loss": loss, "learning_rate": self.scheduler.get_last_lr()[0], **logged}
        with open(self.metrics_file, "a", encoding="utf-8") as out:
            line = {"stage": self.stage.loss, "epoch": epoch, "step": self.global_step, **values}
            out.write(json.dumps(line) + "\n")
        for name, value in values.items():
            self.tensorboard.add_scalar(f"{self.stage.loss}/{name}", value, self.global_step)
        self.wandblogger.log_metrics(values, head=self.stage.loss)
        self.global_step += 1

    # ---- evaluation

    def evaluate(self, eval_data: EvalRows, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As ``ProtocolEvaluation``; the test's tokens go to the record."""
        with TokenCount(decoder_and_head(self.model.policy)[0]) as count:
            result = super().evaluate(eval_data, *args, **kwargs)
        if eval_data.split == "test":
            self.facts["test_tokens"] = count.tokens
        return result

    # ---- checkpoints: adapters alone

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        save_adapter(self.model.llm, self.stage.folder)
        if verbose:
            self.logger.info(f"Saving current: {self.stage.folder}")

    def _load_checkpoint(self, model_file: str | None) -> None:
        if self.config["finetune"] != "none":
            load_adapter(self.model.llm, Path(model_file) if model_file else self.run_folder)


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
