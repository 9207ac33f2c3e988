"""The catalogue as a trie: titles that begin alike share the tokens of what they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class TitleTrie:
    """Answers of all items, token by token; node 0 is the root, the end of any prompt.

    Nodes stand in depth-first preorder, so the descendants of node x are ``x + 1 .. subtree_end[x] - 1``.

    Attributes:
        token: of each node ``[n]``; the root's is 0 and means nothing.
        parent, depth, subtree_end: of each node ``[n]``; the root has parent -1 and depth 0.
        last_node: where each item's answer ends ``[n_items]``; 0 for items that are none (RecBole's padding item).
    """

    token: np.ndarray
    parent: np.ndarray
    depth: np.ndarray
    subtree_end: np.ndarray
    last_node: np.ndarray

    def __len__(self) -> int:
        return len(self.token)

    @property
    def n_items(self) -> int:
        """Size of the item vocabulary, the padding item included."""
        return len(self.last_node)

    @cached_property
    def first_child(self) -> np.ndarray:
        """Where each node's children begin in ``child`` ``[n + 1]``."""
        return _starts(self.parent[1:], len(self))

    @cached_property
    def child(self) -> np.ndarray:
        """Children of node 0, of node 1, ... ``[n - 1]``."""
        return np.argsort(self.parent[1:], kind="stable") + 1

    @cached_property
    def first_item(self) -> np.ndarray:
        """Where the items that end at each node begin in ``item`` ``[n + 1]``."""
        return _starts(self.last_node[1:], len(self))

    @cached_property
    def item(self) -> np.ndarray:
        """Items that end at node 0, at node 1, ... ``[n_items - 1]``; several may share a title."""
        return np.argsort(self.last_node[1:], kind="stable") + 1

    @cached_property
    def is_inner(self) -> np.ndarray:
        """Whether a node has children: only such nodes go through an LLM ``[n]``."""
        return self.subtree_end > np.arange(len(self)) + 1

    @cached_property
    def inner(self) -> InnerNodes:
        """The nodes below the root that go through an LLM."""
        node = np.flatnonzero(self.is_inner)[1:]
        before = np.concatenate([[0], np.cumsum(self.is_inner)]) - 1  # inner nodes before each node, the root aside
        parent = np.where(self.depth[node] > 1, before[self.parent[node]], -1)
        return InnerNodes(node, parent, self.depth[node], before[self.subtree_end[node]])

    @cached_property
    def levels(self) -> list[np.ndarray]:
        """Nodes of depth 1, of depth 2, ..."""
        order = np.argsort(self.depth, kind="stable")
        return np.split(order, np.cumsum(np.bincount(self.depth))[:-1])[1:]

    def least_below(self, values: np.ndarray) -> np.ndarray:
        """The least value among the items of each node's subtree ``[n]``, from values of items ``[n_items]``."""
        at_node = np.full(len(self) + 1, np.inf, dtype=values.dtype)
        np.minimum.at(at_node, self.last_node[1:], values[1:])
        borders = np.stack([np.arange(len(self)), self.subtree_end], axis=1)
        return np.minimum.reduceat(at_node, borders.ravel())[::2]

    def edges(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Children of some nodes: (place of the parent in ``nodes`` ``[E]``, child ``[E]``), in this order."""
        return _ranges(self.first_child, self.child, nodes)

    def items_at(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Items that end at some nodes: (place of the node in ``nodes`` ``[I]``, item ``[I]``)."""
        return _ranges(self.first_item, self.item, nodes)


@dataclass(frozen=True)
class InnerNodes:
    """The trie without its root and its leaves, numbered anew ``0 .. m - 1``, still in preorder.

    Attributes:
        node: in the whole trie ``[m]``.
        parent, depth, subtree_end: ``[m]``; parent -1 is the root.
    """

    node: np.ndarray
    parent: np.ndarray
    depth: np.ndarray
    subtree_end: np.ndarray

    def __len__(self) -> int:
        return len(self.node)

    def ancestors(self, nodes: np.ndarray) -> np.ndarray:
        """Ancestors by depth, from depth 1 on ``[N, D]``; -1 where a node has none that deep."""
        deepest = int(self.depth[nodes].max(initial=1)) - 1
        found = np.full((len(nodes), deepest), -1)
        above, rows = self.parent[nodes], np.arange(len(nodes))
        while len(rows := rows[above >= 0]):
            above = above[above >= 0]
            found[rows, self.depth[above] - 1] = above
            above = self.parent[above]
        return found


def title_trie(answers: Sequence[Sequence[int]]) -> TitleTrie:
    """The trie of all items' answers (a second for 100,000 titles).

    Args:
        answers: tokens of each internal item id, end of title included; entry 0 is the padding item and left out.
            Several items may have the same answer, and an answer may begin another.
    """
    token, parent, depth, path = [0], [-1], [0], [0]
    last_node = np.zeros(len(answers), dtype=np.int64)
    before: Sequence[int] = ()
    for item in sorted(range(1, len(answers)), key=lambda item: list(answers[item])):
        answer, shared = answers[item], 0
        while shared < min(len(before), len(answer)) and before[shared] == answer[shared]:
            shared += 1
        del path[shared + 1 :]
        for piece in answer[shared:]:
            token.append(piece)
            parent.append(path[-1])
            depth.append(len(path))
            path.append(len(token) - 1)
        last_node[item], before = path[-1], answer
    tokens, parents, depths = (np.array(x, dtype=np.int64) for x in (token, parent, depth))
    return TitleTrie(tokens, parents, depths, _subtree_ends(parents, depths), last_node)


def _subtree_ends(parent: np.ndarray, depth: np.ndarray) -> np.ndarray:
    size = np.ones(len(parent), dtype=np.int64)
    for level in range(int(depth.max()), 0, -1):
        nodes = np.flatnonzero(depth == level)
        np.add.at(size, parent[nodes], size[nodes])
    return np.arange(len(parent)) + size


def _starts(owner: np.ndarray, n: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=n))])


def _ranges(start: np.ndarray, values: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values ``start[r]:start[r + 1]`` of each row r, one after the other, and whose they are."""
    counts = start[rows + 1] - start[rows]
    place = np.repeat(np.arange(len(rows)), counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return place, values[start[rows][place] + within]
