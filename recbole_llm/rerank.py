"""One list from two models: a recommender finds the top, the LLM reorders it, alone or in a mixture of both."""

from __future__ import annotations

from typing import Any

import torch
from recbole.utils import calculate_valid_score

from recbole_llm.data.candidates import EvalRows

WEIGHTS = tuple(step / 10 for step in range(11))  # the LLM's shares that rerank_weight=auto tries on validation


def rerank(base: torch.Tensor, llm: torch.Tensor, top: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
    """The base model's top-K in the order of a mixture, all others behind in the base's order.

    Args:
        base: ``[B, n]``, -inf marks what is no answer.
        llm: scores of the base's top-K ``[B, K]``.
        top: their columns ``[B, K]``.
        weight: share of the LLM in ``weight * z(llm) + (1 - weight) * z(base)``, z over the top-K; 1 = its order alone.

    Returns:
        ``[B, n]`` scores; ties of either model stay ties. A row in which a model has no score is NaN throughout, for
        an order would hide it.
    """
    behind = -_dense_rank(-base) - 1.0
    scores = torch.where(base == -torch.inf, -torch.inf, behind)
    found = base.gather(1, top)
    kept = found == -torch.inf  # a short list: its fill is no answer
    broken = (~torch.isfinite(llm) & ~kept).any(1) | (torch.isnan(base) | torch.isposinf(base)).any(1)
    if weight < 1:
        llm = weight * standardised(llm, ~kept) + (1 - weight) * standardised(found, ~kept)
    ahead = _dense_rank(llm).to(scores.dtype)
    scores = scores.scatter(1, top, torch.where(kept, -torch.inf, ahead))
    return torch.where(broken[:, None], torch.nan, scores)


def standardised(scores: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Scores less their row's mean over its answers, in standard deviations; 0 where all are alike ``[B, K]``."""
    count = answers.sum(1, keepdim=True).clamp(min=1)
    scores = torch.where(answers, scores.float(), 0.0)
    centred = torch.where(answers, scores - scores.sum(1, keepdim=True) / count, 0.0)
    deviation = (centred.square().sum(1, keepdim=True) / count).sqrt()
    return torch.where(deviation > 0, centred / deviation, 0.0)


def _dense_rank(values: torch.Tensor) -> torch.Tensor:
    """0 for the smallest value of each row, equal values alike ``[B, n]``, float32."""
    ordered, order = values.sort(dim=1)
    step = (ordered[:, 1:] != ordered[:, :-1]).float().cumsum(1)
    rank = torch.cat([torch.zeros_like(step[:, :1]) if step.shape[1] else ordered[:, :1] * 0, step], dim=1)
    return torch.zeros_like(rank).scatter(1, order, rank)


def choose_weight(trainer: Any, valid: EvalRows) -> tuple[float, dict[str, float], dict[float, float]]:
    """The LLM's share that ranks validation best, which the model keeps; of equals the smallest.

    Args:
        trainer: of a model with a base recommender; the LLM scores each list once, whatever the number of shares.

    Returns:
        Validation score and result at that share, and the score of every share.
    """
    model, found = trainer.model, {}
    with model.scores_remembered():
        for weight in WEIGHTS:
            model.rerank_weight = weight
            result = trainer.evaluate(valid, load_best_model=False)
            found[weight] = (calculate_valid_score(result, trainer.valid_metric), result)
    sign = 1 if trainer.valid_metric_bigger else -1
    model.rerank_weight = max(WEIGHTS, key=lambda weight: sign * found[weight][0])
    score, result = found[model.rerank_weight]
    return score, result, {weight: value for weight, (value, _) in found.items()}
