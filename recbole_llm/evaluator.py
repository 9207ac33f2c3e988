"""From scores to per-user rows to RecBole's means: ties at their expected rank, NaN an error."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.evaluator import Evaluator
from recbole.evaluator.base_metric import TopkMetric
from recbole.evaluator.collector import DataStruct

from recbole_llm.data.candidates import EvalRows
from recbole_llm.errors import UserError
from recbole_llm.pair_metrics import pair_metrics, paired_accuracy


@dataclass
class Ranking:
    """Where each row's target came, and what stood at the top.

    Attributes:
        above: answers scored strictly higher than the target ``[R]``.
        tied: answers scored equal to it, itself included ``[R]``.
        answers: how many answers were ranked ``[R]``.
        top: item ids of the best K, ties in an order that says nothing ``[R, K]``; 0 where there are fewer.
        pairs: scores of the target and of the other ``[R, 2]``, where there are two columns.
        rows: which rows these are, batch by batch.
    """

    above: list[np.ndarray] = field(default_factory=list)
    tied: list[np.ndarray] = field(default_factory=list)
    answers: list[np.ndarray] = field(default_factory=list)
    top: list[np.ndarray] = field(default_factory=list)
    pairs: list[np.ndarray] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)

    def whole(self, name: str) -> np.ndarray:
        """One of the attributes over all rows, in their order."""
        return np.concatenate(getattr(self, name))[np.argsort(np.concatenate(self.rows))]

    def add(
        self,
        rows: np.ndarray,
        scores: torch.Tensor,
        target_column: torch.Tensor,
        item_ids: torch.Tensor,
        topk: int,
    ) -> None:
        """Rank a batch.

        Args:
            rows: numbers of the rows ``[B]``.
            scores: ``[B, C]``; -inf marks what is no answer.
            target_column: column of the target ``[B]``.
            item_ids: item of each column ``[B, C]``.

        Raises:
            UserError: a score is NaN or +inf, or the target's is -inf: such a ranking means nothing.
        """
        target = scores.gather(1, target_column[:, None])
        if not torch.isfinite(target).all() or torch.isnan(scores).any() or torch.isposinf(scores).any():
            raise UserError(
                "The model returned a score that is not a number (NaN or infinite), so there is no ranking. Often it "
                "means that training diverged: lower --learning_rate, or set --clip_grad_norm=\"{'max_norm': 1.0}\"."
            )
        self.rows.append(rows)
        self.above.append((scores > target).sum(1).cpu().numpy())
        self.tied.append((scores == target).sum(1).cpu().numpy())
        self.answers.append((scores != -torch.inf).sum(1).cpu().numpy())
        width = min(topk, scores.shape[1])
        best, columns = scores.topk(width, dim=1)
        top = torch.where(best == -torch.inf, 0, item_ids.gather(1, columns)).cpu().numpy()
        self.top.append(np.pad(top, ((0, 0), (0, topk - width))))
        if scores.shape[1] == 2:
            other = scores.gather(1, 1 - target_column[:, None])
            self.pairs.append(torch.cat([target, other], dim=1).double().cpu().numpy())


class PerUserEvaluator(Evaluator):
    """RecBole's metrics, kept for each row before RecBole averages them.

    A target tied with others stands, with equal chance, at each of the tied places: its metric is the mean over them.
    """

    def evaluate_ranking(
        self, ranking: Ranking, rows: EvalRows, num_items: int, item_counter: Counter[int]
    ) -> tuple[OrderedDict[str, float], pd.DataFrame]:
        """RecBole's result and one line for each row.

        Args:
            num_items: size of the item vocabulary as RecBole counts it (padding included).
            item_counter: training interactions of each item, for the popularity metrics.

        Returns:
            Metric name -> mean, rounded as RecBole does, and a table with user, target, expected rank, ties, and
            every top-K metric of each row. With two candidates the pair metrics come first.
        """
        above, tied, answers = (ranking.whole(name) for name in ("above", "tied", "answers"))
        table = pd.DataFrame(
            {
                "user": rows.user_tokens[rows.users],
                "target": rows.item_tokens[rows.targets],
                "rank": above + (tied + 1) / 2,
                "tied": tied,
                "answers": answers,
            }
        )
        struct = DataStruct()
        struct.set("rec.items", torch.as_tensor(ranking.whole("top")))
        struct.set("rec.meanrank", torch.as_tensor(np.stack([table["rank"], answers, np.ones(len(table))], axis=1)))
        struct.set("data.num_items", num_items)
        struct.set("data.num_users", len(rows.user_tokens))
        struct.set("data.count_items", item_counter)
        result: OrderedDict[str, float] = OrderedDict()
        if rows.candidates is not None and rows.candidates.shape[1] == 2:
            target, other = ranking.whole("pairs").T
            table["paired_accuracy"] = paired_accuracy(target, other)
            result.update(pair_metrics(target, other, self.config["metric_decimal_place"]))
        for metric in self.metric_class.values():
            if isinstance(metric, TopkMetric):
                result.update(self._expected(metric, above, tied, table))
            else:
                result.update(metric.calculate_metric(struct))
        return OrderedDict((name, float(value)) for name, value in result.items()), table

    @staticmethod
    def _expected(metric: TopkMetric, above: np.ndarray, tied: np.ndarray, table: pd.DataFrame) -> dict[str, Any]:
        """A top-K metric of each row by RecBole's own formula, added to ``table``; returns RecBole's means."""
        deepest = max(metric.topk)
        struct, kept = DataStruct(), {}
        # Row p of this table has its one relevant item at place p; the last row has none among the top K.
        hits = torch.cat([torch.eye(deepest, dtype=torch.int), torch.zeros(1, deepest, dtype=torch.int)])
        struct.set("rec.topk", torch.cat([hits, torch.ones(deepest + 1, 1, dtype=torch.int)], dim=1))
        metric.topk_result = partial(lambda name, value: kept.update({name: value}) or {})
        try:
            metric.calculate_metric(struct)
        finally:
            del metric.topk_result  # the class's own again
        ((name, by_place),) = kept.items()
        total = np.concatenate([np.zeros((1, deepest)), np.cumsum(by_place[:deepest], axis=0)])
        first, last = np.minimum(above, deepest), np.minimum(above + tied, deepest)
        value = (total[last] - total[first]) / tied[:, None]
        for k in metric.topk:
            table[f"{name}@{k}"] = value[:, k - 1]
        return metric.topk_result(name, value)
