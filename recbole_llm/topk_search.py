"""Best-first search for the K best titles of several users at once.

A prefix's log-prob bounds those of all titles that begin so. Each user expands the open prefixes with the highest
bounds until none reaches the K-th best title found; what is left out can then not be among the best K.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from recbole_llm.llm.prompt_cache import BelowPrompts, NodeCache, PromptCache, Slots, hidden_states
from recbole_llm.llm.title_trie import TitleTrie
from recbole_llm.title_scores import TitleScores, edge_logps

LEAST_ROWS = 32  # a pass over fewer nodes takes about as long: it reads the weights


@dataclass(frozen=True)
class Found:
    """Items and their scores ``[F]``: all that score no less than the K-th best, in no order."""

    items: np.ndarray
    scores: np.ndarray


@dataclass
class SearchStats:
    """What searches cost.

    Attributes:
        expansions: trie nodes that went through the LLM, of each user.
        head_rows: rows of the LM head.
        kept_nodes: the most trie nodes whose keys and values were held at once.
        given_up: users whose search was given up.
    """

    expansions: list[int]
    head_rows: int = 0
    kept_nodes: int = 0
    given_up: int = 0

    def __add__(self, other: SearchStats) -> SearchStats:
        """Of the searches of both."""
        return SearchStats(
            self.expansions + other.expansions,
            self.head_rows + other.head_rows,
            max(self.kept_nodes, other.kept_nodes),
            self.given_up + other.given_up,
        )


class _UserSearch:
    """One user's open prefixes and what was found; parallel arrays, nodes that were expanded are dropped."""

    def __init__(self, trie: TitleTrie, scores: TitleScores, k: int, hidden: np.ndarray) -> None:
        self.trie, self.scores, self.k = trie, scores, k
        self.visible = np.ones(trie.n_items, dtype=bool)
        self.visible[np.asarray(hidden, dtype=np.int64)] = False
        self.node, self.above = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)  # above: slot of the parent
        self.logp, self.bound = np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.float32)
        self.found = Found(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32))
        self.least = -np.inf  # score of the K-th best found
        self.slots: list[int] = []  # of the nodes expanded so far

    def reach(self, nodes: np.ndarray, logps: np.ndarray, above: np.ndarray) -> None:
        """Children of expanded nodes: titles that end there are found, the others are open."""
        place, items = self.trie.items_at(nodes)
        shown = self.visible[items]
        place, items = place[shown], items[shown]
        items = np.concatenate([self.found.items, items])
        values = np.concatenate([self.found.scores, self.scores.of_items(logps[place], items[len(self.found.items) :])])
        if np.isnan(logps).any():  # an LLM that diverged: nothing compares, and the search ends without a find
            self.least = np.nan
        elif len(values) >= self.k:
            self.least = np.partition(values, -self.k)[-self.k]
        kept = values >= self.least
        self.found = Found(items[kept], values[kept])
        inner = self.trie.is_inner[nodes]
        nodes, logps, above = nodes[inner], logps[inner], above[inner]
        self._keep(
            np.concatenate([self.node, nodes]),
            np.concatenate([self.logp, logps]),
            np.concatenate([self.bound, self.scores.bounds(logps, nodes)]),
            np.concatenate([self.above, above]),
        )

    def _keep(self, node: np.ndarray, logp: np.ndarray, bound: np.ndarray, above: np.ndarray) -> None:
        kept = bound >= self.least
        self.node, self.logp, self.bound, self.above = node[kept], logp[kept], bound[kept], above[kept]

    def pop(self, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The open nodes of highest bound, their log-probs, and their parents' slots, each ``[<= most]``."""
        order = np.argpartition(-self.bound, most) if len(self.bound) > most else np.arange(len(self.bound))
        best, rest = order[:most], order[most:]
        popped = self.node[best], self.logp[best], self.above[best]
        self._keep(self.node[rest], self.logp[rest], self.bound[rest], self.above[rest])
        return popped


class BestFirst:
    """The search of several users, whose nodes share forward passes; a user that ends makes room for the next.

    Args:
        model: a causal LM in evaluation mode, loaded with ``attention`` blocks or flex.
        prompts: tokens before the answer, for each user.
        hidden: for each user, items that are no answers.
        k: how many titles.
        users_at_once: users that share a forward pass.
        nodes_at_once: nodes that a user expands between two looks at what was found; more where few users are left.
        most_nodes: a user that needs more is given up.
        most_kept: nodes of all users whose keys and values are held at once, no fewer than ``most_nodes``.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        prompts: Sequence[list[int]],
        hidden: Sequence[np.ndarray],
        trie: TitleTrie,
        scores: TitleScores,
        *,
        k: int,
        users_at_once: int,
        nodes_at_once: int,
        most_nodes: int,
        most_kept: int,
    ) -> None:
        self.model, self.prompts, self.hidden, self.trie = model, prompts, hidden, trie
        self.scores, self.k = scores, k
        self.nodes_at_once, self.most_nodes, self.most_kept = nodes_at_once, most_nodes, most_kept
        self.cache = PromptCache(min(users_at_once, len(prompts)), max(map(len, prompts), default=0))
        self.nodes, self.slots = NodeCache(most_kept), Slots(int(trie.depth.max()))
        self.waiting = deque(range(len(prompts)))
        self.open: dict[int, tuple[int, _UserSearch]] = {}  # prompt's slot -> user and search, first to enter first
        self.found: list[Found | None] = [None] * len(prompts)
        self.stats = SearchStats(expansions=[0] * len(prompts))

    def run(self) -> list[Found | None]:
        """For each user all items that score no less than the K-th best; None for a user that was given up."""
        while self.waiting or self.open:
            self._admit()
            self._end()
            if self.open:
                self._round()
                self._end()
        return self.found

    def _admit(self) -> None:
        """Read the next users' prompts into free slots, and reach the first tokens of all titles."""
        entered, states = [], []
        for slot in range(len(self.cache.length)):
            if slot not in self.open and self.waiting:
                user = self.waiting.popleft()
                states.append(self.cache.read(self.model, self.prompts[user], slot))
                entered.append(_UserSearch(self.trie, self.scores, self.k, self.hidden[user]))
                self.open[slot] = (user, entered[-1])
        if entered:
            root, ones = np.zeros(len(entered), dtype=np.int64), np.ones(len(entered), dtype=np.int64)
            self._receive(torch.stack(states), entered, ones, root, root.astype(np.float32), root - 1)

    def _round(self) -> None:
        """Expand the best open nodes of the users whose turn it is in one forward pass."""
        allowed = self._allowed()
        users = sorted(allowed)
        searches = [self.open[slot][1] for slot in users]
        popped = [search.pop(allowed[slot]) for slot, search in zip(users, searches, strict=True)]
        counts = np.array([len(nodes) for nodes, _, _ in popped])
        nodes, logps, above = (np.concatenate(parts) for parts in zip(*popped, strict=True))
        taken = self.slots.take(above, self.trie.depth[nodes])
        for search, own in zip(searches, np.split(taken, np.cumsum(counts)[:-1]), strict=True):
            search.slots += own.tolist()
        hidden = self._forward(np.array(users), counts, nodes, taken)
        self._receive(hidden, searches, counts, nodes, logps, taken)
        self.stats.kept_nodes = max(self.stats.kept_nodes, self.slots.in_use)

    def _allowed(self) -> dict[int, int]:
        """Nodes that users may expand now, by slot in the prompt cache.

        The others leave room for all that the first to enter may need. So it always goes on, and when it ends the
        same holds for the next: none waits for ever, and no more than ``most_kept`` nodes are held.
        """
        held = {slot: len(search.slots) for slot, (_, search) in self.open.items()}
        first, *others = held
        room = self.most_kept - self.most_nodes - sum(held[slot] for slot in others)
        each = max(self.nodes_at_once, LEAST_ROWS // (len(held) if room else 1))
        allowed = {first: min(each, self.most_nodes - held[first])}
        for slot in others:
            mine = min(each, self.most_nodes - held[slot], room)
            room -= mine
            if mine:
                allowed[slot] = mine
        return allowed

    def _forward(self, users: np.ndarray, counts: np.ndarray, nodes: np.ndarray, taken: np.ndarray) -> torch.Tensor:
        """Hidden states ``[N, d]`` of nodes, ``counts [U]`` of them below the prompts in slots ``users [U]``."""
        owner = np.repeat(np.arange(len(users)), counts)
        path = self.slots.path[taken][:, : self.trie.depth[nodes].max()]
        attend = BelowPrompts(
            self.cache,
            self.nodes,
            users=torch.as_tensor(users),
            counts=torch.as_tensor(counts),
            slots=torch.as_tensor(taken),
            seen=torch.as_tensor(np.where(path >= 0, path, taken[:, None])),
            sees=torch.as_tensor(path >= 0)[:, None],
        )
        positions = self.cache.length[users[owner]] - 1 + torch.as_tensor(self.trie.depth[nodes])
        return hidden_states(self.model, torch.as_tensor(self.trie.token[nodes]), positions, attend)

    def _receive(
        self,
        hidden: torch.Tensor,
        searches: Sequence[_UserSearch],
        counts: np.ndarray,
        nodes: np.ndarray,
        logps: np.ndarray,
        taken: np.ndarray,
    ) -> None:
        """Hand the children of expanded nodes ``[N]`` to the searches, whose nodes stand one after the other."""
        place, child, edges = edge_logps(self.model, hidden, nodes, self.trie)
        self.stats.head_rows += len(nodes)
        borders = np.searchsorted(place, np.cumsum(counts)[:-1])
        parts = (np.split(x, borders) for x in (child, logps[place] + edges, taken[place]))
        for search, children, reached, above in zip(searches, *parts, strict=True):
            search.reach(children, reached, above)

    def _end(self) -> None:
        """Users with nothing open are done; those with too many nodes are given up."""
        for slot, (user, search) in list(self.open.items()):
            done = not len(search.node)
            if done or len(search.slots) >= self.most_nodes:
                self.found[user] = search.found if done else None
                self.stats.expansions[user] = len(search.slots)
                self.stats.given_up += not done
                self.slots.free += search.slots
                del self.open[slot]
