"""Stage 3: how much a text helps the recommender to rank what its user chose next; best and worst make a pair.

A list holds the next ``reward_positions`` items of a pair user and ``reward_others`` that the user has not met in
training. The recommender ranks it after the history that the text was written from, with each text in turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from typing import Protocol as Interface

import numpy as np
from recbole.config import Config
from scipy.special import log_softmax

from recbole_llm.data.protocol import Protocol
from recbole_llm.data.seeds import seeded
from recbole_llm.errors import UserError

DEPTH = 5  # K of NDCG and MAP, as in the paper


class ReadsTexts(Interface):
    """What judges: the recommender."""

    def scores_of_texts(self, histories: Sequence[Sequence[int]], texts: np.ndarray) -> np.ndarray:
        """Scores of all items ``[B, n_items]`` after each history with a text vector each."""
        ...


class Reward(NamedTuple):
    """What a text is worth; compared in this order."""

    ndcg: float  # @5
    map: float  # @5
    logp: float  # mean log-prob of the relevant items among all items of the list, nats


@dataclass(frozen=True)
class RewardList:
    """A list that texts about a user are judged by.

    Attributes:
        user: internal id.
        history: items that the texts were written from, oldest first.
        items: of the list ``[L]``, in an order that says nothing.
        relevant: which of them the user chose next ``[L]``.
    """

    user: int
    history: np.ndarray
    items: np.ndarray
    relevant: np.ndarray


def reward_lists(config: Config, protocol: Protocol, pairs: Mapping[int, int]) -> list[RewardList]:
    """The list of each pair user: the rest of training, and items not met in it, drawn by a generator of its own.

    Args:
        pairs: user -> items that the texts are written from.

    Raises:
        UserError: fewer items than ``reward_others`` that a user has not met.
    """
    tokens, events, found = protocol.dataset.field2id_token, protocol.events, []
    universe = events.catalogue
    universe = universe[np.argsort(tokens[protocol.dataset.iid_field][universe])]
    for user, known in pairs.items():
        mine = events.items_of(user)
        end = int(protocol.train_ends[user])
        following = np.unique(mine[known:end])
        rng = seeded(config["candidate_seed"], "reward", tokens[protocol.dataset.uid_field][user])
        # What the user meets after training is not known here: it may be drawn, as in every training loss.
        free = universe[~np.isin(universe, np.append(mine[:end], events.disliked(user, end)))]
        if len(free) < config["reward_others"]:
            raise UserError(
                f"--reward_others={config['reward_others']}: there are only {len(free)} items that user "
                f"{tokens[protocol.dataset.uid_field][user]} has not met in training. Ask for fewer."
            )
        others = rng.choice(free, config["reward_others"], replace=False)
        items = rng.permutation(np.concatenate([following, others]))
        found.append(RewardList(user, mine[:known], items, np.isin(items, following)))
    return found


def rewards_of(judge: ReadsTexts, lists: Sequence[RewardList], vectors: Sequence[np.ndarray]) -> list[list[Reward]]:
    """What each text of each list's user is worth.

    Args:
        vectors: of the texts about each user, ``[N, d]``.
    """
    found = []
    for one, texts in zip(lists, vectors, strict=True):
        scores = judge.scores_of_texts([one.history.tolist()] * len(texts), texts)[:, one.items]
        found.append([reward(row, one.relevant) for row in scores])
    return found


def reward(scores: np.ndarray, relevant: np.ndarray) -> Reward:
    """NDCG@5 and MAP@5 of a list by its scores, and the mean log-prob of its relevant items.

    Args:
        scores, relevant: of the list's items ``[L]``; at least one is relevant.
    """
    hits = relevant[np.argsort(-scores, kind="stable")][:DEPTH].astype(float)
    most = min(DEPTH, int(relevant.sum()))
    discount = 1 / np.log2(np.arange(2, DEPTH + 2))
    ndcg = float((hits * discount[: len(hits)]).sum() / discount[:most].sum())
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    return Reward(ndcg, float((precision * hits).sum() / most), float(log_softmax(scores)[relevant].mean()))


@dataclass(frozen=True)
class BestAndWorst:
    """A pair: numbers of the best and the worst text about the user in place ``row`` of the lists."""

    row: int
    best: int
    worst: int


def choose_pairs(
    rewards: Sequence[Sequence[Reward]], texts: Sequence[Sequence[str]], least_gap: float
) -> list[BestAndWorst]:
    """Best and worst text of each user; users whose two are the same text, or too close in NDCG@5, are left out.

    Args:
        rewards, texts: of each user's N texts.
        least_gap: NDCG@5 that best and worst must differ by.
    """
    pairs = []
    for row, (mine, words) in enumerate(zip(rewards, texts, strict=True)):
        order = sorted(range(len(mine)), key=lambda i: mine[i])
        worst, best = order[0], order[-1]
        differ = words[best].strip() != words[worst].strip() and mine[best] != mine[worst]
        if differ and mine[best].ndcg - mine[worst].ndcg >= least_gap and words[best].strip():
            pairs.append(BestAndWorst(row, best, worst))
    return pairs
