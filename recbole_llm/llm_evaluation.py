"""How an LLM ranks the frozen rows: a user's candidates together, equal histories once, rows shared by processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction

from recbole_llm.costs import TokenCount
from recbole_llm.data.candidates import EvalRows
from recbole_llm.distributed import gathered, own_share
from recbole_llm.evaluator import Ranking
from recbole_llm.llm.logps import decoder_and_head
from recbole_llm.llm.sharded import even_passes
from recbole_llm.processes import world_size
from recbole_llm.trainer import ProtocolEvaluation

ANSWERS = 10  # titles of a history that a row's candidates are taken to cost, to divide rows among processes


class LLMEvaluation(ProtocolEvaluation):
    """``ProtocolEvaluation`` where the model is an ``LLMRanker``."""

    keeps_freed_memory = False  # nothing to gain: a tenth of the time is the kernel's with it and without

    def evaluate(self, eval_data: EvalRows, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As ``ProtocolEvaluation``; the test's tokens go to the record."""
        with TokenCount(decoder_and_head(self.model.policy)[0]) as count:
            result = super().evaluate(eval_data, *args, **kwargs)
        if eval_data.split == "test":
            self.facts["test_tokens"] = sum(gathered(lambda: count.tokens))
        return result

    def _batches(self, data: EvalRows) -> Iterator[np.ndarray]:
        # Something for every process; with many rows the same batches as in a single one.
        at_once = min(self.model.users_at_once, math.ceil(max(1, len(data)) / world_size()))
        return data.batches_by_history(at_once, self.config["MAX_ITEM_LIST_LENGTH"])

    def _rank(self, data: EvalRows, batches: Sequence[np.ndarray], show_progress: bool) -> Ranking:
        """The ranking of all rows, of which each process ranks some batches."""
        most = self.config["MAX_ITEM_LIST_LENGTH"]
        mine = own_share(batches, [sum(min(len(data.history[r]), most) + ANSWERS for r in rows) for rows in batches])

        def ranked() -> Ranking:
            with even_passes(self.model.policy):
                return ProtocolEvaluation._rank(self, data, mine, show_progress)

        return Ranking.joined(gathered(ranked))

    def _of_candidates(self, visible: Interaction, items: torch.Tensor) -> torch.Tensor:
        pairs = self._pairs(visible, items, slice(items.numel()))
        return self.model.predict(pairs, items.shape[1]).view(items.shape)

    def _of_all(self, visible: Interaction, items: torch.Tensor, hidden: Sequence[np.ndarray]) -> torch.Tensor:
        return self.model.full_sort_predict(visible, hidden).view(items.shape)
