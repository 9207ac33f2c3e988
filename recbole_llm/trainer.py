"""RecBole's trainers with our evaluation: every model ranks the same frozen rows."""

from __future__ import annotations

import logging
import os
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.trainer import Trainer
from recbole.utils import get_trainer
from scipy.sparse import csc_matrix, csr_matrix, lil_matrix
from torch.nn import Module

from recbole_llm.allocator import freed_memory_kept
from recbole_llm.data.candidates import EvalRows
from recbole_llm.data.protocol import Protocol
from recbole_llm.distributed import is_first
from recbole_llm.errors import MachineError, UserError
from recbole_llm.evaluator import PerUserEvaluator, Ranking, top_table
from recbole_llm.harm import harm_metrics, title_embeddings
from recbole_llm.llm.budget import in_halves
from recbole_llm.progress import bar
from recbole_llm.wandb_log import RunLogger

SCORES_AT_ONCE = 2**25  # float32 scores held in memory: 128 MiB
# What checkpoints of ItemKNN, SLIMElastic and EASE hold beside tensors. torch makes nothing else from a file.
MATRICES = [csc_matrix, csr_matrix, lil_matrix, np.matrix, np.ndarray, np.dtype, np.empty(0).__reduce__()[0]]
MATRICES += [type(np.dtype(kind)) for kind in ("float32", "float64", "int32", "int64", "object")]


_Trainer: Any = object  # to a type checker a mixin has whatever the class has that it is mixed into


class ProtocolEvaluation(_Trainer):
    """Mixed in before a RecBole trainer: ``evaluate`` takes frozen rows, checkpoints hold no pickled objects.

    Set ``protocol`` and ``run_folder`` before ``fit``.
    """

    protocol: Protocol
    per_user: pd.DataFrame | None = None
    top: pd.DataFrame | None = None
    keeps_freed_memory = True  # while it trains

    def __init__(self, config: Config, model: torch.nn.Module) -> None:
        # RecBole opens a TensorBoard file in every process; only the first one writes.
        with nullcontext() if is_first() else patch("recbole.trainer.trainer.get_tensorboard", NoTensorboard):
            super().__init__(config, model)

    def start(self, protocol: Protocol, run_folder: Path) -> None:
        """Where the data come from and where the checkpoint goes."""
        self.protocol = protocol
        self.saved_model_file = str(run_folder / f"{self.config['model']}.pth")
        self.run_name = os.path.relpath(run_folder, self.config["checkpoint_dir"])  # a trial of the run has another
        self.earlier = (0.0, 0.0)  # wall and processor seconds of stages that processes of this run before this one did
        self.per_user_evaluator = PerUserEvaluator(self.config)
        self.wandblogger = RunLogger(self.config)

    def count_earlier(self, seconds: float, cpu_seconds: float) -> None:
        """Seconds of an earlier process of this run go to the run's training."""
        self.earlier = (self.earlier[0] + seconds, self.earlier[1] + cpu_seconds)

    def fit(self, *args: Any, **kwargs: Any) -> tuple[float, dict[str, float] | None]:
        """As RecBole's; what a batch frees is kept for the next one."""
        with freed_memory_kept() if self.keeps_freed_memory else nullcontext():
            return super().fit(*args, **kwargs)

    @torch.no_grad()
    def evaluate(
        self,
        eval_data: EvalRows,
        load_best_model: bool = True,
        model_file: str | None = None,
        show_progress: bool = False,
    ) -> dict[str, float]:
        """Rank every row.

        Args:
            eval_data: frozen rows.
            load_best_model: load the checkpoint of the best epoch first (or ``model_file``).

        Returns:
            Metric name -> mean, with harm metrics after those of RecBole for the test rows. ``self.per_user`` holds
            the rows, ``self.top`` the best items of the test rows.
        """
        if load_best_model:
            self._load_checkpoint(model_file)
        self.model.eval()
        with random_state_kept(self.device):  # evaluation must not move training
            ranking = self._rank(eval_data, list(self._batches(eval_data)), show_progress)
        counter, catalogue = self.protocol.item_counter, self.protocol.events.catalogue
        num_items = len(catalogue) + 1  # with RecBole's padding item
        result, self.per_user = self.per_user_evaluator.evaluate_ranking(ranking, eval_data, num_items, counter)
        if eval_data.split == "test":  # validation selects by accuracy, and pays for nothing else
            top, embeddings = ranking.whole("top"), title_embeddings(self.protocol.dataset)
            popularity = self.protocol.popularity
            harm, by_row = harm_metrics(self.config, eval_data, top, popularity, embeddings, catalogue)
            result.update(harm)
            self.per_user = self.per_user.join(by_row).assign(**_traits(eval_data, popularity))
            self.top = top_table(eval_data, top)
            self.wandblogger.log_eval_metrics(result, head="eval")
        return result

    def _rank(self, data: EvalRows, batches: Sequence[np.ndarray], show_progress: bool) -> Ranking:
        """The ranking of these rows."""
        ranking, topk, count = Ranking(), max(self.config["topk"]), sum(map(len, batches))
        with bar(total=count, desc=f"Evaluate {data.split}", unit="user", disable=not show_progress) as shown:
            scored = (in_halves(rows, partial(self.score_rows, data)) for rows in batches)
            for rows, (scores, items) in chain.from_iterable(scored):
                relevant = torch.as_tensor(data.relevant[rows], device=scores.device)
                columns = [(items == one[:, None]).int().argmax(1) for one in relevant.T]
                ranking.add(rows, scores, torch.stack(columns, dim=1), items, topk)
                shown.update(len(rows))
                shown.set_postfix_str()
        return ranking

    def score_rows(self, data: EvalRows, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and item ids of some rows, both ``[B, C]``; -inf marks what is no answer."""
        visible = data.visible[torch.as_tensor(rows)].to(self.device)
        if data.candidates is not None:
            items = torch.as_tensor(data.candidates[rows], device=self.device)
            return self._of_candidates(visible, items), items
        items = torch.arange(self.protocol.dataset.item_num, device=self.device).expand(len(rows), -1)
        hidden = [data.hidden_of(r) for r in rows]
        scores = self._of_all(visible, items, hidden).clone()
        scores[:, 0] = -torch.inf  # RecBole's padding item
        for row, answers_not in enumerate(hidden):
            scores[row, torch.as_tensor(answers_not, device=self.device)] = -torch.inf
        # Columns in an order that says nothing: RecBole's ids go by first appearance, so by popularity.
        order = torch.randperm(items.shape[1], generator=torch.Generator().manual_seed(self.config["candidate_seed"]))
        return scores[:, order], items[:, order.to(self.device)]

    def _of_candidates(self, visible: Interaction, items: torch.Tensor) -> torch.Tensor:
        """Scores of each row's candidates ``[B, C]``."""
        # One pass over all items costs id models less than a pass for each candidate, and gives the same scores.
        every = self._full_sort(visible)
        return self._predict(visible, items) if every is None else every.gather(1, items)

    def _of_all(self, visible: Interaction, items: torch.Tensor, hidden: Sequence[np.ndarray]) -> torch.Tensor:
        """Scores of the whole vocabulary ``[B, n_items]``; those of each row's ``hidden`` items count for nothing."""
        every = self._full_sort(visible)
        return self._predict(visible, items) if every is None else every

    def _full_sort(self, visible: Interaction) -> torch.Tensor | None:
        """Scores of all items ``[B, n_items]``, or None where the model scores pairs alone."""
        try:
            scores = self.model.full_sort_predict(visible)
        except NotImplementedError:
            return None
        return scores.view(len(visible), -1).to(self.device)  # EASE and Random score on the CPU, whatever the device

    def _predict(self, visible: Interaction, items: torch.Tensor) -> torch.Tensor:
        """Scores ``[B, C]`` through RecBole's ``predict``, all candidates of a user in consecutive rows."""
        size = self.config["eval_batch_size"]  # a pair holds the whole history: never all of them at once
        parts = (slice(first, min(first + size, items.numel())) for first in range(0, items.numel(), size))
        chunks = [self.model.predict(self._pairs(visible, items, part)) for part in parts]
        return torch.cat([c.reshape(-1) for c in chunks]).view(items.shape)

    def _pairs(self, visible: Interaction, items: torch.Tensor, part: slice) -> Interaction:
        """A part of the pairs of user and candidate, users' candidates one after another, with the items' features."""
        rows = torch.arange(part.start or 0, part.stop, device=self.device) // items.shape[1]
        pairs = visible[rows]
        pairs.update(Interaction({self.config["ITEM_ID_FIELD"]: items.reshape(-1)[part]}))
        return self.protocol.dataset.join(pairs.to("cpu")).to(self.device)

    def _batches(self, data: EvalRows) -> Iterator[np.ndarray]:
        at_once = min(self.config["eval_batch_size"], SCORES_AT_ONCE // self.protocol.dataset.item_num)
        return data.batches(max(1, at_once))

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: object) -> None:
        """RecBole's checkpoint without the pickled Config; written beside and renamed: a kill leaves the old one."""
        state = {
            "model": self.config["model"],
            "epoch": epoch,
            "cur_step": self.cur_step,
            "best_valid_score": self.best_valid_score,
            "state_dict": self.model.state_dict(),
            "other_parameter": _plain_parts(self.model.other_parameter()),
            "optimizer": self.optimizer.state_dict(),
        }
        beside = f"{self.saved_model_file}.tmp"
        try:
            torch.save(state, beside)
            os.replace(beside, self.saved_model_file)
        except (OSError, RuntimeError) as error:
            Path(beside).unlink(missing_ok=True)
            raise MachineError(
                f"--checkpoint_dir={self.config['checkpoint_dir']}: could not save {self.saved_model_file} ({error}). "
                "Free some space, or name another folder; the last good checkpoint is untouched."
            ) from error
        if verbose:
            self.logger.info(f"Saving current: {self.saved_model_file}")

    def _load_checkpoint(self, model_file: str | None) -> None:
        file = model_file or self.saved_model_file
        try:
            with torch.serialization.safe_globals(MATRICES):
                state = torch.load(file, map_location=self.device, weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged or foreign file
            raise MachineError(
                f"{file} is no checkpoint of plain tensors, or it is damaged: {error}. Remove {Path(file).parent}, and "
                "what lies there is trained anew."
            ) from error
        self.model.load_state_dict(state["state_dict"])
        self.model.load_other_parameter(state["other_parameter"])


def _plain_parts(parts: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint can hold of a model's own parts.

    Layers among them (DIN, FDSA, ...) hold the data set, and their weights stand in the model's state.
    """
    kept = {name: value for name, value in parts.items() if not isinstance(value, Module)}
    return {name: dict(value) if isinstance(value, defaultdict) else value for name, value in kept.items()}


class NoTensorboard:
    """In TensorBoard's place where nothing is written."""

    def __init__(self, logger: logging.Logger) -> None:
        pass

    def add_scalar(self, *args: object) -> None:
        pass

    def add_hparams(self, *args: object) -> None:
        pass

    def close(self) -> None:
        pass


def _traits(rows: EvalRows, popularity: np.ndarray) -> dict[str, np.ndarray]:
    """What a row is like, whoever ranks it: items of the whole history, training interactions of the target ``[R]``.

    Several targets of a row (``next_items``) count by their mean.
    """
    return {
        "history": np.array([len(history) for history in rows.history]),
        "target_popularity": popularity[rows.relevant].mean(1),
    }


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """What runs inside leaves Python's, numpy's and torch's random states as they were."""
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


def trainer_class(model_type: object, model: str) -> type[Trainer]:
    """RecBole's trainer of a model, with our evaluation.

    Raises:
        UserError: RecBole's decision-tree trainer, which trains outside torch.
    """
    base = get_trainer(model_type, model)
    if not issubclass(base, Trainer):
        raise UserError(
            f"--model={model}: {base.__name__} is not a torch trainer, so it cannot rank under our protocol."
        )
    return type(base.__name__, (ProtocolEvaluation, base), {})
