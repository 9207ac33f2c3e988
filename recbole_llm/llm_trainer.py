"""Trains an LLM recommender in stages: SFT, then a preference loss whose reference is the SFT policy, frozen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.trainer import Trainer
from recbole.utils import init_seed
from transformers import get_scheduler

from recbole_llm.costs import Clock, found_done
from recbole_llm.data.candidates import EvalRows
from recbole_llm.data.prompt import Window
from recbole_llm.data.protocol import Protocol
from recbole_llm.distributed import from_first, is_first, same_everywhere
from recbole_llm.evaluator import lacks_metrics
from recbole_llm.files import content_hash, finished_stage, only_here, write_json, write_text
from recbole_llm.guards import Standing, check_moved, check_saved, standstill
from recbole_llm.llm.adapter import load_adapter, save_adapter
from recbole_llm.llm.identity import prompt_hash
from recbole_llm.llm_evaluation import LLMEvaluation
from recbole_llm.llm_steps import WindowSteps
from recbole_llm.preference import Displacement
from recbole_llm.processes import rank, world_size
from recbole_llm.progress import bar
from recbole_llm.reference import KeptLogps, fill_reference, policy_hash
from recbole_llm.rerank import choose_weight
from recbole_llm.resume import StageProgress
from recbole_llm.stages import Stage, base_hash, sft_windows, stages


class LLMTrainer(WindowSteps, LLMEvaluation, Trainer):
    """RecBole's trainer (epochs, early stopping on validation, TensorBoard) over stages of token-tree windows."""

    found: list[dict[str, Any]]  # of a stage: what another run had done for it

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
        if is_first():
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
            "prompt_hash": prompt_hash(self.model.prompt),
            "processes": world_size(),
            "stages": [],
            "found": [],
            "recommenders": [],
        }
        self.found = []

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
        windows: list[Window] = []
        self.clock = Clock()
        for stage in self.stages():
            with only_here(stage.folder):
                if (finished := from_first(partial(finished_stage, stage.folder))) is not None:
                    record = self._found(finished)
                    self.logger.info(f"Stage {stage.loss}: reusing {stage.folder} (same data, model and settings).")
                    load_adapter(self.model.llm, stage.folder)
                    self._take_steps(stage.folder / self.metrics_file.name)
                    score, result = record["best_valid_score"], record["best_valid_result"]
                    best = (-np.inf if score is None else score, result)
                else:
                    best, record = self._run_stage(stage, train_data, valid_data, verbose, show_progress, callback_fn)
                    windows = stage.windows
            self.facts["stages"].append(record)
            self.clock = Clock()
        self.facts["train_tokens"] = sum(stage["tokens"] for stage in self.facts["stages"])
        unvalidated = not self.facts["stages"] or lacks_metrics(self.config, best[1])  # zero-shot, or another's record
        if valid_data and unvalidated:
            best = self._valid_epoch(valid_data, show_progress)
        if self.config["rerank_weight"] == "auto" and self.model.base is not None and valid_data:
            best = self._choose_weight(valid_data)
        if self.config["finetune"] != "none":
            from_first(partial(save_adapter, self.model.llm, self.run_folder))
            if self.facts["stages"]:
                check_saved(self.model, windows or self._sft_windows(), self.run_folder)
        return best

    def _found(self, finished: dict[str, Any]) -> dict[str, Any]:
        """The record of a finished stage, with whose seconds they are: this run's, which was cut off or is given again,
        or those of another run.
        """
        if finished["run"] != self.run_name:
            return finished | {"reused": True}
        if is_first():  # whose seconds they are
            self.count_earlier(finished["seconds"], finished["cpu_seconds"])
        return finished

    def _sft_windows(self) -> list[Window]:
        """Something to score where no stage was trained just now."""
        return sft_windows(self.config, self.protocol, self.model.prompt, self.model.llm.context)

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
            base=self._base_hash,
            policy=self._kept_policy,
        )

    @contextmanager
    def _kept_policy(self) -> Iterator[KeptLogps]:
        """Log-probs by the policy as it is now, which are kept; one process at a time asks for them."""
        policy = self._policy_hash()
        folder = Path(self.config["checkpoint_dir"]) / "stages" / f"pools-{policy[:12]}"
        kept = KeptLogps(self.model.reference_logps, folder, policy)
        with only_here(folder):
            yield kept
        if kept.counts["read"]:
            self.found.append(found_done("pools", kept.counts["seconds"], kept.counts["cpu_seconds"]))

    def _run_stage(
        self,
        stage: Stage,
        train_data: Any,
        valid_data: EvalRows | None,
        verbose: bool,
        show_progress: bool,
        callback_fn: Any,
    ) -> tuple[tuple[float, dict[str, float] | None], dict[str, Any]]:
        self.found = []
        positions = sum(len(w.targets) for w in stage.windows)  # made here, before the draws: it may train models
        # Whether or not SFT was trained just now. Each process drops (lora_dropout) by draws of its own.
        init_seed(self.config["seed"] + rank(), self.config["reproducibility"])
        same_everywhere("training windows", lambda: content_hash([w.told() for w in stage.windows]))
        self.stage, self.epochs, self.start_epoch, self.cur_step = stage, stage.epochs, 0, 0
        self.eval_step = min(self.config["eval_step"], stage.epochs)
        if valid_data:
            self._tell_unvalidated(stage)
        self.best_valid_score, self.best_valid_result = (-np.inf if self.valid_metric_bigger else np.inf), None
        self.train_loss_dict: dict[int, float] = {}  # RecBole keeps it by epoch, and each stage counts its own
        self.optimizer = self._build_optimizer(learning_rate=stage.learning_rate)
        steps = sum(1 for epoch in range(stage.epochs) for _ in self._steps(epoch))
        self.scheduler = self._schedule(steps)
        self.logger.info(
            f"Stage {stage.loss}: {positions} positions in {len(stage.windows)} windows, {stage.epochs} epochs, "
            f"{steps} steps of {positions * stage.epochs / steps:.0f} positions on average."
        )
        self.recommenders = stage.facts.get("recommenders", [])
        reference = {} if stage.loss == "SFT" else self._fill_reference(stage, show_progress)
        before = Standing.of(self.model, stage.windows)
        self.tokens, self.steps, self.displacement = 0, 0, Displacement()
        self._go_on(stage)
        with bar(
            total=positions * stage.epochs, desc=f"Train {stage.loss}", unit="title", disable=not show_progress
        ) as self.bar:
            self.bar.update(positions * self.start_epoch)
            best = super().fit(train_data, valid_data, verbose, True, show_progress, callback_fn)
        load_adapter(self.model.llm, stage.folder)  # the best epoch, as it lies on the disk
        check_moved(self.model, before, stage, self.steps, self.rate_key())
        seconds, cpu_seconds = self.clock.spent_by_all()
        record = {
            "loss": stage.loss,
            "run": self.run_name,
            "positions": positions,
            "steps": self.steps,
            "tokens": self.tokens,
            "best_valid_score": None if best[1] is None else best[0],
            "best_valid_result": best[1],
            "train_loss": self.train_loss_dict,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            **stage.facts,
            "found": self.found,
            "recommenders": self.recommenders,
        }
        if stage.loss != "SFT":
            still = from_first(partial(standstill, self.metrics_file, stage.loss))
            counts = {key: reference[key] for key in ("read", "computed")}
            record |= {"reference": counts, "displacement": self.displacement.facts(), "standstill": still}
            self._tell_standstill(stage, still)
        from_first(partial(self._end_stage, stage, record))
        return best, record

    def _tell_unvalidated(self, stage: Stage) -> None:
        if self.eval_step and (unseen := stage.epochs % self.eval_step):
            self.logger.warning(
                f"--eval_step={self.eval_step}: of {stage.epochs} epochs the last {unseen} are never validated, so "
                "they are trained and not kept; make the epochs a multiple of it."
            )

    def _schedule(self, steps: int) -> Any:
        """The learning rate over so many steps."""
        warmup, schedule = int(steps * self.config["warmup_ratio"]), self.config["lr_scheduler"]
        schedule = "constant_with_warmup" if schedule == "constant" else schedule  # the other would not warm up
        return get_scheduler(schedule, self.optimizer, warmup, steps)

    def _go_on(self, stage: Stage) -> None:
        """Where the stage was cut off, if it was and shall go on there."""
        self.progress = StageProgress(self, stage.folder, self.config["save_every"])
        if not self.config["resume"]:
            from_first(self.progress.drop)
        self.resumed = self.progress.restore()
        self.count_earlier(*self.clock.earlier)
        self.start_epoch = self.resumed["epoch"] if self.resumed else 0

    def _end_stage(self, stage: Stage, record: dict[str, Any]) -> None:
        # Runs that share the stage share its curve, and that of the stages before it.
        write_text(stage.folder / self.metrics_file.name, self.metrics_file.read_text(encoding="utf-8"))
        write_json(stage.folder / "stage.json", record)
        self.progress.drop()

    def _fill_reference(self, stage: Stage, show_progress: bool) -> dict[str, Any]:
        """Reference log-probs of every pair, before the first update: the policy is the reference, once."""
        counts = fill_reference(
            stage.windows,
            self.model.reference_logps,
            stages=stage.folder.parent,
            policy=self._policy_hash(),
            show_progress=show_progress,
        )
        if counts["read"]:
            self.logger.info(f"Reference log-probs: {counts['read']} positions read, {counts['computed']} computed.")
            self.found.append(found_done("reference", counts["seconds"], counts["cpu_seconds"]))
        return counts

    def _policy_hash(self) -> str:
        return policy_hash(self.config, self.model.llm, self._base_hash)

    @cached_property  # over all titles' tokens, which training does not change
    def _base_hash(self) -> str:
        return base_hash(self.model.llm, self.model.texts, self.model.prompt)

    # ---- checkpoints: adapters alone

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        from_first(partial(save_adapter, self.model.llm, self.stage.folder))
        if verbose:
            self.logger.info(f"Saving current: {self.stage.folder}")

    def _load_checkpoint(self, model_file: str | None) -> None:
        if self.config["finetune"] != "none":
            load_adapter(self.model.llm, Path(model_file) if model_file else self.run_folder)
