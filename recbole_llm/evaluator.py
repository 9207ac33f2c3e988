"""From scores to per-user rows to RecBole's means: a tied target at its expected rank, NaN an error."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.config import Config
from recbole.evaluator import Evaluator
from recbole.evaluator.base_metric import TopkMetric
from recbole.evaluator.collector import DataStruct
from scipy.stats import rankdata

from recbole_llm.data.candidates import EvalRows
from recbole_llm.errors import UserError
from recbole_llm.pair_metrics import pair_metrics, paired_accuracy


def accuracy_names(config: Config) -> list[str]:
    """What ``metrics`` and ``topk`` ask for, as results name it: ``ndcg@10``."""
    names = map(str.lower, config["metrics"])
    return [name for m in names for name in ([m] if m == "gauc" else [f"{m}@{k}" for k in config["topk"]])]


def lacks_metrics(config: Config, result: Mapping[str, float] | None) -> bool:
    """Whether a validation, of a run that trained the stage before, did not measure all that is asked here."""
    return result is not None and not set(accuracy_names(config)) <= set(result)


@dataclass
class Ranking:
    """Where each row's targets came, and what stood at the top.

    Attributes:
        batches: of some rows each, by name:

        above: answers scored strictly higher than the target, or the best of several ``[R]``.
        tied: answers scored equal to it, itself included ``[R]``.
        answers: how many answers were ranked ``[R]``.
        top: item ids of the best K, ties in an order that says nothing ``[R, K]``; 0 where there are fewer.
        hits: whether these are targets ``[R, K]``, where a row has several; so the next three.
        distinct: how many targets ``[R]``.
        best: how many of them have the best score of them ``[R]``.
        rank_sum: sum of their ranks, each at the mean of what it ties with ``[R]``.
        pairs: scores of the target and of the other ``[R, 2]``, where there are two columns.
        rows: which rows these are, batch by batch.
    """

    batches: list[dict[str, np.ndarray]] = field(default_factory=list)

    def whole(self, name: str) -> np.ndarray:
        """One of these over all rows, in their order."""
        found, rows = (np.concatenate([batch[n] for batch in self.batches]) for n in (name, "rows"))
        return found[np.argsort(rows)]

    @classmethod
    def joined(cls, parts: Sequence[Ranking]) -> Ranking:
        """The ranking of all rows, from parts that ranked some each."""
        return cls([batch for part in parts for batch in part.batches])

    def add(
        self,
        rows: np.ndarray,
        scores: torch.Tensor,
        target_columns: torch.Tensor,
        item_ids: torch.Tensor,
        topk: int,
    ) -> None:
        """Rank a batch.

        Where rows have several targets, ties stand in the order of the columns: that of the frozen candidates, or in
        full mode one seeded order of the catalogue. Neither knows what is a target.

        Args:
            rows: numbers of the rows ``[B]``.
            scores: ``[B, C]``; -inf marks what is no answer.
            target_columns: columns of the targets, repeats allowed ``[B, P]``.
            item_ids: item of each column ``[B, C]``.

        Raises:
            UserError: a score is NaN or +inf, or a target's is -inf: such a ranking means nothing.
        """
        targets = scores.gather(1, target_columns)
        if not torch.isfinite(targets).all() or torch.isnan(scores).any() or torch.isposinf(scores).any():
            raise UserError(
                "The model returned a score that is not a number (NaN or infinite), so there is no ranking. Often it "
                "means that training diverged: lower --learning_rate, or set --clip_grad_norm=\"{'max_norm': 1.0}\"."
            )
        target, several = targets.amax(1, keepdim=True), targets.shape[1] > 1
        width = min(topk, scores.shape[1])
        # topk leaves open which of tied answers it takes; a single target's metrics do not hang on it.
        columns = scores.sort(dim=1, descending=True, stable=True)[1] if several else scores.topk(width, dim=1)[1]
        columns, fill = columns[:, :width], ((0, 0), (0, topk - width))
        no_answer = scores.gather(1, columns) == -torch.inf
        batch = {
            "rows": rows,
            "above": (scores > target).sum(1).cpu().numpy(),
            "tied": (scores == target).sum(1).cpu().numpy(),
            "answers": (scores != -torch.inf).sum(1).cpu().numpy(),
            "top": np.pad(torch.where(no_answer, 0, item_ids.gather(1, columns)).cpu().numpy(), fill),
        }
        if several:
            is_target = torch.zeros_like(scores, dtype=torch.bool).scatter(1, target_columns, True)
            batch["hits"] = np.pad(is_target.gather(1, columns).cpu().numpy(), fill)
            batch["distinct"] = is_target.sum(1).cpu().numpy()
            batch["best"] = (is_target & (scores == target)).sum(1).cpu().numpy()
            batch["rank_sum"] = (rankdata(-scores.cpu().numpy(), axis=1) * is_target.cpu().numpy()).sum(1)
        elif scores.shape[1] == 2:
            other = scores.gather(1, 1 - target_columns)
            batch["pairs"] = torch.cat([target, other], dim=1).double().cpu().numpy()
        self.batches.append(batch)


def expected_rank(above: Any, tied: Any, best: Any = 1) -> Any:
    """Rank of the first of ``best`` targets that tie with each other and others, all in random order.

    Args:
        above: answers scored higher.
        tied: answers scored equal, the targets included.
        best: how many of these are targets.
    """
    return above + (tied + 1) / (best + 1)


class PerUserEvaluator(Evaluator):
    """RecBole's metrics, kept for each row before RecBole averages them.

    A target tied with others stands, with equal chance, at each of the tied places: its metric is the mean over them.
    Several targets of a row (``next_items``) stand in one order instead, in which ties are broken by a seeded draw that
    knows no target; only ``rank`` (of the best of them) and GAUC are expectations then.
    """

    def evaluate_ranking(
        self, ranking: Ranking, rows: EvalRows, num_items: int, item_counter: Counter[int]
    ) -> tuple[OrderedDict[str, float], pd.DataFrame]:
        """RecBole's result and one line for each row.

        Args:
            num_items: of the catalogue, as RecBole counts them (padding included).
            item_counter: training interactions of each item, for the popularity metrics.

        Returns:
            Metric name -> mean, rounded as RecBole does, and a table with user, targets (separated by spaces), expected
            rank of the best one, ties, and every top-K metric of each row. With two candidates the pair metrics come
            first.
        """
        above, tied, answers = (ranking.whole(name) for name in ("above", "tied", "answers"))
        several = rows.relevant.shape[1] > 1
        hits: Any
        distinct: Any
        hits, distinct, best = (ranking.whole(n) if several else 1 for n in ("hits", "distinct", "best"))
        table = pd.DataFrame(
            {
                "user": rows.user_tokens[rows.users],
                "target": [" ".join(rows.target_tokens(row)) for row in range(len(rows))],
                "rank": expected_rank(above, tied, best),
                "tied": tied,
                "answers": answers,
            }
        )
        struct = DataStruct()
        struct.set("rec.items", torch.as_tensor(ranking.whole("top")))
        rank_sum = ranking.whole("rank_sum") if several else table["rank"]
        mean_rank = np.stack([rank_sum, answers, distinct * np.ones(len(table))], axis=1)
        struct.set("rec.meanrank", torch.as_tensor(mean_rank))
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
                values = self._by_row(metric, hits, distinct) if several else self._expected(metric, above, tied)
                ((name, value),) = values.items()
                for k in metric.topk:
                    table[f"{name}@{k}"] = value[:, k - 1]
                result.update(metric.topk_result(name, value))
            else:
                result.update(metric.calculate_metric(struct))
        return OrderedDict((name, float(value)) for name, value in result.items()), table

    @staticmethod
    def _by_row(metric: TopkMetric, hits: np.ndarray, distinct: np.ndarray) -> dict[str, np.ndarray]:
        """A metric's name -> its value for each row and every k, by RecBole's own formula ``[R, K]``.

        Args:
            hits: whether the answer at each place is a target ``[R, K]``.
            distinct: targets of each row ``[R]``.
        """
        struct, kept = DataStruct(), {}
        struct.set("rec.topk", torch.as_tensor(np.column_stack([hits, distinct]).astype(np.int64)))
        metric.topk_result = partial(lambda name, value: kept.update({name: value}) or {})
        try:
            metric.calculate_metric(struct)
        finally:
            del metric.topk_result  # the class's own again
        return kept

    @classmethod
    def _expected(cls, metric: TopkMetric, above: np.ndarray, tied: np.ndarray) -> dict[str, np.ndarray]:
        """As ``_by_row`` for rows of one target: its mean over the places that the target ties for ``[R, K]``."""
        deepest = max(metric.topk)
        # Row p has its one target at place p; the last row has none among the top K.
        hits = np.eye(deepest + 1, deepest)
        ((name, by_place),) = cls._by_row(metric, hits, np.ones(deepest + 1)).items()
        total = np.concatenate([np.zeros((1, deepest)), np.cumsum(by_place[:deepest], axis=0)])
        first, last = np.minimum(above, deepest), np.minimum(above + tied, deepest)
        return {name: (total[last] - total[first]) / tied[:, None]}


def top_table(rows: EvalRows, top: np.ndarray) -> pd.DataFrame:
    """What was recommended: columns ``row`` (its number, from 0), ``user``, ``place`` (1 is the best) and ``item``.

    Args:
        top: of ``Ranking`` ``[R, K]``.
    """
    row, place = np.nonzero(top)
    user, item = rows.user_tokens[rows.users[row]], rows.item_tokens[top[row, place]]
    return pd.DataFrame({"row": row, "user": user, "place": place + 1, "item": item})
