"""Whether a row ranked again has the rank that the run's own table says, but for the rounding of its scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recbole_llm.explain.finished_run import FinishedRun
from recbole_llm.explain.ranked import Ranked
from recbole_llm.read_keys import reranks

# How far the score of a title may be off, nats or nats a token: in a row alone and among others of a batch, and
# (docs/determinism.md) where a GPU ranked in half precision what a CPU explains.
ROUNDING, HALF_ROUNDING, TWO_DTYPES = 1e-3, 0.1, 0.5


def agrees(run: FinishedRun, row: int, ranked: Ranked, relevant: Sequence[int], stored: float) -> bool:
    """Whether a row's targets may have the rank ``stored``, were the LLM's scores a little different.

    Re-ranking, and a search behind its top K, tell an order and no scores: there the LLM's own are compared. A mixture
    with another model's scores has no tolerance.

    Args:
        ranked: the row, ranked again.
        relevant: the row's targets.
    """
    if reranks(run.config, run.rows.mode):
        return _may_be_reordered(run, row, ranked, relevant, stored)
    if (found := ordered(run, ranked)) < len(ranked.items):
        return _may_be_found(run, row, ranked.scores[:found], relevant, stored, len(ranked.items))
    return ranked.may_be(relevant, stored, _rounding(run))


def ordered(run: FinishedRun, ranked: Ranked) -> int:
    """How many of a row's answers have a place of their own: those behind the top K of exact_topk all tie."""
    most = max(run.config["topk"])
    if run.rows.mode != "full" or run.config["full_ranking"] != "exact_topk" or len(ranked.items) <= most:
        return len(ranked.items)
    return int((ranked.scores > ranked.scores[-1]).sum())


def _may_be_reordered(run: FinishedRun, row: int, ranked: Ranked, relevant: Sequence[int], stored: float) -> bool:
    top = ranked.items[: run.config["rerank_topk"]]
    mine = [item for item in relevant if item in top]
    if not mine or run.model.rerank_weight != 1:
        return ranked.may_be(relevant, stored, 0)
    return Ranked.of(run.scores(run.history(row), top.tolist()), top).may_be(mine, stored, _rounding(run))


def _may_be_found(
    run: FinishedRun, row: int, top: np.ndarray, relevant: Sequence[int], stored: float, answers: int
) -> bool:
    rounding, own = _rounding(run), run.scores(run.history(row), relevant).max()
    last = answers if own - rounding <= top[-1] else (top >= own - rounding).sum()
    return bool(1 + (top > own + rounding).sum() <= stored <= last)


def _rounding(run: FinishedRun) -> float:
    dtypes = {run.record["dtype"], run.model.llm.dtype}
    return ROUNDING if dtypes == {"float32"} else HALF_ROUNDING if len(dtypes) == 1 else TWO_DTYPES
