"""Everything that shares a prefix, packed into one tree of tokens, so that each token is computed once.

Nodes stand in depth-first preorder. Node q may attend to node k iff ``k <= q < subtree_end[k]``: its ancestors and
itself. A node's log-probability comes from its parent's hidden state, so leaves are never fed to the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch


@dataclass(frozen=True)
class TokenTree:
    """A tree of tokens and the completions to score in it.

    Attributes:
        token, parent, depth, subtree_end: of each node in preorder ``[S]``; the root's parent is -1, depth is the
            position id, ``subtree_end`` the index after the last descendant.
        scored: nodes that belong to a completion, and ``completion`` which one ``[M]``.
        n_completions: completions are numbered ``0 .. n_completions - 1``.
    """

    token: torch.Tensor
    parent: torch.Tensor
    depth: torch.Tensor
    subtree_end: torch.Tensor
    scored: torch.Tensor
    completion: torch.Tensor
    n_completions: int

    def __len__(self) -> int:
        return len(self.token)

    @property
    def fed(self) -> int:
        """Nodes that go through the model: all but leaves."""
        return int(torch.unique(self.parent[1:]).numel())

    def without_leaves(self) -> TokenTree:
        """The nodes that must go through the model; ``scored`` keeps the numbering of the full tree."""
        inner = torch.zeros(len(self), dtype=torch.bool)
        inner[self.parent[1:]] = True
        before = torch.cat([torch.zeros(1, dtype=torch.long), inner.long().cumsum(0)])  # inner nodes before each node
        parent = self.parent[inner]
        parent = torch.where(parent < 0, -1, before[parent.clamp(min=0)])
        return TokenTree(
            self.token[inner],
            parent,
            self.depth[inner],
            before[self.subtree_end[inner]],
            self.scored,
            self.completion,
            self.n_completions,
        )


class TreeBuilder:
    """Grows a token tree in preorder: each chain hangs off the node added last or one of its ancestors."""

    def __init__(self) -> None:
        self._token: list[int] = []
        self._parent: list[int] = []
        self._depth: list[int] = []
        self._scored: list[int] = []
        self._completion: list[int] = []
        self._n_completions = 0

    def chain(self, parent: int, tokens: Sequence[int]) -> list[int]:
        """Hang a chain of tokens off ``parent`` (-1 starts the root) and return its nodes.

        Raises:
            ValueError: the parent lies off the path to the node added last, or there is a second root.
        """
        last = len(self._token) - 1
        ancestor = last
        while ancestor > parent:
            ancestor = self._parent[ancestor]
        if ancestor != parent or (parent == -1 and last >= 0):
            raise ValueError(f"node {parent} is not on the path to node {last}: the tree would not be in preorder")
        first, depth = last + 1, self._depth[parent] + 1 if parent >= 0 else 0
        end = first + len(tokens)
        # Whole chains at a time: a GPU waits for its trees.
        self._token += tokens
        self._parent += [parent, *range(first, end - 1)][: len(tokens)]
        self._depth += range(depth, depth + len(tokens))
        return list(range(first, end))

    def completion(self, nodes: Sequence[int]) -> int:
        """Score these nodes together (a title, its end included); returns the completion's number."""
        self._scored += nodes
        self._completion += [self._n_completions] * len(nodes)
        self._n_completions += 1
        return self._n_completions - 1

    def build(self) -> TokenTree:
        """The finished tree.

        Raises:
            ValueError: a completion holds the root, which has no parent to predict it.
        """
        if 0 in self._scored:
            raise ValueError("the root cannot be scored: nothing comes before it")
        end, parents = list(range(1, len(self._token) + 1)), self._parent
        for node in range(len(end) - 1, 0, -1):
            above = parents[node]
            if end[node] > end[above]:
                end[above] = end[node]
        token, parent, depth, subtree_end, scored, completion = (
            torch.tensor(x, dtype=torch.long)
            for x in (self._token, self._parent, self._depth, end, self._scored, self._completion)
        )
        return TokenTree(token, parent, depth, subtree_end, scored, completion, self._n_completions)


@dataclass(frozen=True)
class TreeBatch:
    """Trees one after the other in the one row of a forward pass, without padding between them.

    Attributes:
        input_ids, position_ids: ``[1, S]``.
        subtree_end: of each node, in the numbering of the row ``[S]``.
        starts: where each tree begins, and where the last one ends ``[trees + 1]``.
        head_rows: nodes whose next-token distribution is needed ``[H]``.
        row, target, completion: for each scored token its entry in ``head_rows``, its token, and its completion's
            number over the whole batch ``[M]``.
        n_completions: over the whole batch, tree after tree.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    subtree_end: torch.Tensor
    starts: list[int]
    head_rows: torch.Tensor
    row: torch.Tensor
    target: torch.Tensor
    completion: torch.Tensor
    n_completions: int

    def to(self, device: torch.device) -> TreeBatch:
        """The same on another device; a GPU's queue does not wait for the copy."""
        pinned = device.type == "cuda"
        moved: dict[str, Any] = {
            name: (value.pin_memory() if pinned else value).to(device, non_blocking=True)
            for name, value in self.__dict__.items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


def batch_trees(trees: Sequence[TokenTree], multiple: int = 1) -> TreeBatch:
    """Pack trees into a row; leaves are dropped and log-probs are read off their parents.

    Args:
        multiple: the row is padded to a multiple of so many tokens, each a tree of its own.
    """
    inner = [tree.without_leaves() for tree in trees]
    starts = [0, *accumulate(map(len, inner))]
    padding = -starts[-1] % multiple
    starts += range(starts[-1] + 1, starts[-1] + padding + 1)
    nothing = torch.zeros(padding, dtype=torch.long)
    head, first = [], 0
    target, completion = [], []
    for tree, start in zip(trees, starts, strict=False):
        has_child = torch.zeros(len(tree), dtype=torch.bool)
        has_child[tree.parent[1:]] = True
        place = has_child.long().cumsum(0) - 1
        head.append(start + place[tree.parent[tree.scored]])
        target.append(tree.token[tree.scored])
        completion.append(tree.completion + first)
        first += tree.n_completions
    head_rows, entry = torch.cat(head).unique(return_inverse=True)
    own_end = torch.arange(starts[-1] - padding + 1, starts[-1] + 1)
    ends = [fed.subtree_end + start for fed, start in zip(inner, starts, strict=False)]
    return TreeBatch(
        torch.cat([*(fed.token for fed in inner), nothing])[None],
        torch.cat([*(fed.depth for fed in inner), nothing])[None],
        torch.cat([*ends, own_end]),
        starts,
        head_rows,
        entry,
        torch.cat(target),
        torch.cat(completion),
        first,
    )


def batches_by_budget(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Indices grouped so that the sizes of a group add up to ``budget`` tokens at most; larger ones stand alone.

    Largest first, each into the first group that has room: few groups, and the largest memory need comes at once.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        size = sizes[index]
        place = next((g for g, left in enumerate(room) if left >= size), None)
        if place is None:
            groups.append([])
            room.append(budget)
            place = len(groups) - 1
        groups[place].append(index)
        room[place] -= size
    return groups
