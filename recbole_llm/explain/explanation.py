"""What an explanation of one user's ranking holds; ``explain.py`` computes it, ``report/explain_*.py`` show it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from recbole_llm.explain.faithfulness import Deletion
from recbole_llm.explain.other_ranks import OtherRank


@dataclass(frozen=True)
class Title:
    """An item as the LLM scores it after this history.

    Attributes:
        item, text: its token in the data, and what the LLM reads.
        rank: in the row, ties at their mean; None where it is no answer there.
        score: the LLM's own, by ``score_norm``, also where its order is mixed or cut; None where it is no answer.
        tokens, logps: of its answer, end included ``[T]``; nats.
        reference_logp: its answer's log-prob by the reference, nats; None without one.
        reference_rank: likewise.
        reward: beta (log-prob less that of the reference), the implicit reward of DPO (arXiv 2305.18290, Eq. 5, up to a
            term that all items of a user share); None without a preference stage.
        is_target: whether the user chose it.
    """

    item: str
    text: str
    rank: float | None
    score: float | None
    tokens: tuple[str, ...]
    logps: tuple[float, ...]
    is_target: bool
    reference_logp: float | None = None
    reference_rank: float | None = None
    reward: float | None = None

    @property
    def logp(self) -> float:
        """Log-prob of the whole answer, nats."""
        return float(np.sum(self.logps))

    @property
    def change(self) -> float | None:
        """Log-prob less that of the reference, nats."""
        return None if self.reference_logp is None else self.logp - self.reference_logp


@dataclass(frozen=True)
class Influence:
    """What history items do to one title.

    Attributes:
        title: the explained one, and ``role``: "top 1", "target", "top 1 and target" or "asked".
        by_item: fall of its log-prob without each history item ``[n]``, nats.
        tests: whether that is so (``faithfulness.py``).
    """

    title: Title
    role: str
    by_item: tuple[float, ...]
    tests: tuple[Deletion, ...]


@dataclass(frozen=True)
class Explanation:
    """Everything about one user's row.

    Attributes:
        user: token.
        run: what ran: model, loss, data, candidates.
        history: texts that the LLM reads, oldest first, and ``left_out``: older ones that it does not.
        prompt, prompt_tokens: as the LLM reads it, whole and token by token.
        answers: how many were ranked.
        titles: the top k, then the target and the asked item where they are not among these.
        stored_rank: the target's in the run's per-user table; ``agrees`` with what is found here.
        reference: what ``reference_*`` of the titles are by; None, and ``notes`` say why.
        others: the target's rank under other runs.
        influences: of the explained titles.
        notes: what could not be had, and what to keep in mind.
    """

    user: str
    run: dict[str, Any]
    history: tuple[str, ...]
    left_out: int
    prompt: str
    prompt_tokens: tuple[str, ...]
    answers: int
    titles: tuple[Title, ...]
    k: int
    stored_rank: float
    agrees: bool
    reference: str | None
    others: tuple[OtherRank, ...]
    influences: tuple[Influence, ...]
    notes: tuple[str, ...]

    @property
    def target(self) -> Title:
        """What the user chose; of several the best ranked."""
        return min((t for t in self.titles if t.is_target), key=lambda title: title.rank or math.inf)
