"""Exact ranking of a whole catalogue: every title, or the best K by a search that misses none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from recbole_llm.llm.prompt_cache import BelowPrompts, NodeCache, PromptCache, hidden_states
from recbole_llm.llm.title_trie import InnerNodes, TitleTrie
from recbole_llm.title_scores import TitleScores, edge_logps
from recbole_llm.topk_search import BestFirst, Found, SearchStats

NODES_A_BLOCK = 32  # in preorder, sharing the keys of their paths: fewer gather more, more see less of what they share
MOST_SHARE, MOST_NODES = 0.3, 4096  # of the inner nodes, and at all: a search that needs more is a full pass instead


@torch.no_grad()
def exact_scores(
    model: torch.nn.Module, prompt: list[int], trie: TitleTrie, scores: TitleScores, *, token_budget: int
) -> torch.Tensor:
    """Scores of all items after one prompt ``[n_items]``, float32 on the CPU; -inf for the padding item.

    The prompt goes through the LLM once, then the trie in preorder, ``token_budget`` nodes at a time. Nodes
    ``[a, b)`` have no ancestors before a but those on the path to a; so between two passes only the keys and values
    of the path to the next node are kept, and memory does not grow with the catalogue.

    Args:
        model: a causal LM in evaluation mode, loaded with ``attention`` blocks or flex.
        prompt: tokens before the answer.
        scores: what ``title_scores`` made of the trie.
        token_budget: trie nodes of one forward pass.
    """
    prompts, inner = PromptCache(1, len(prompt)), trie.inner
    nodes = NodeCache(token_budget + int(trie.depth.max()))
    logps = np.zeros(len(trie), dtype=np.float32)
    hidden, chunk = prompts.read(model, prompt, 0)[None], np.zeros(1, dtype=np.int64)
    for first in range(0, len(inner) + token_budget, token_budget):
        _, child, edges = edge_logps(model, hidden, chunk, trie)
        logps[child] = edges
        last = min(first + token_budget, len(inner))
        if first >= last:
            break
        chunk = inner.node[first:last]
        attend = _chunk_attention(prompts, nodes, inner, first, last)
        positions = torch.as_tensor(len(prompt) - 1 + inner.depth[first:last])
        hidden = hidden_states(model, torch.as_tensor(trie.token[chunk]), positions, attend)
        if last < len(inner):
            path = inner.ancestors(np.array([last]))[0]
            nodes.move_to_front(torch.as_tensor(_slots(inner, path, first)))
    for level in trie.levels:
        logps[level] += logps[trie.parent[level]]
    found = scores.of_items(logps[trie.last_node], np.arange(trie.n_items))
    found[0] = -np.inf
    return torch.as_tensor(found)


def _chunk_attention(prompts: PromptCache, nodes: NodeCache, inner: InnerNodes, first: int, last: int) -> BelowPrompts:
    """Attention of inner nodes ``[first, last)`` in blocks: a block sees the path to its first node, and itself."""
    starts = np.arange(first, last, NODES_A_BLOCK)
    own = starts[:, None] + np.arange(NODES_A_BLOCK)
    keys = np.concatenate([inner.ancestors(starts), own], axis=1)
    known = (keys >= 0) & (keys < last)
    keys = np.where(known, keys, first)
    end = inner.subtree_end[keys]
    sees = known[:, None] & (keys[:, None] <= own[:, :, None]) & (own[:, :, None] < end[:, None])
    sees |= (own >= last)[:, :, None]  # what fills up the last block must see something
    kept = inner.depth[first] - 1
    return BelowPrompts(
        prompts,
        nodes,
        users=torch.zeros(1, dtype=torch.long),
        counts=torch.tensor([last - first]),
        slots=torch.arange(kept, kept + last - first),
        seen=torch.as_tensor(_slots(inner, keys, first)),
        sees=torch.as_tensor(sees),
    )


def _slots(inner: InnerNodes, nodes: np.ndarray, first: int) -> np.ndarray:
    """Where nodes of a chunk, or of the path to its first node, are kept: the path by depth, then the chunk."""
    return np.where(nodes < first, inner.depth[nodes] - 1, inner.depth[first] - 1 + nodes - first)


@torch.no_grad()
def exact_topk(
    model: torch.nn.Module,
    prompts: Sequence[list[int]],
    trie: TitleTrie,
    scores: TitleScores,
    *,
    k: int,
    hidden: Sequence[np.ndarray],
    token_budget: int,
    users_at_once: int = 16,
    nodes_at_once: int = 8,
    most_nodes: int | None = None,
    most_kept: int | None = None,
) -> tuple[list[Found], SearchStats]:
    """For each prompt all items that score no less than the K-th best, ties included: what a full pass would find.

    Args:
        model, scores, token_budget: as for ``exact_scores``.
        prompts: tokens before the answer, for each user.
        k: how many titles.
        hidden: for each user, items that are no answers and take no place.
        users_at_once, nodes_at_once: users that share a forward pass, and trie nodes of each in it.
        most_nodes: a user whose search needs more trie nodes gets a full pass. None = 30 % of those that go through
            the LLM, 4,096 at most.
        most_kept: trie nodes of all users whose keys and values are held at once. None = as many as they may need.
    """
    if most_nodes is None:
        most_nodes = min(int(MOST_SHARE * len(trie.inner)), MOST_NODES)
    most_kept = users_at_once * most_nodes if most_kept is None else most_kept
    search = BestFirst(
        model,
        prompts,
        hidden,
        trie,
        scores,
        k=k,
        users_at_once=users_at_once,
        nodes_at_once=nodes_at_once,
        most_nodes=min(most_nodes, most_kept),
        most_kept=most_kept,
    )
    found: list[Found] = []
    for user, (prompt, mine) in enumerate(zip(prompts, search.run(), strict=True)):
        if mine is None:
            every = exact_scores(model, prompt, trie, scores, token_budget=token_budget).numpy()
            mine = _best(every, k, hidden[user])
            search.stats.expansions[user] += len(trie.inner)
            search.stats.head_rows += len(trie.inner) + 1
        found.append(mine)
    return found, search.stats


def _best(scores: np.ndarray, k: int, hidden: np.ndarray) -> Found:
    shown = scores.copy()
    shown[np.asarray(hidden, dtype=np.int64)] = -np.inf
    least = np.partition(shown, -k)[-k] if len(shown) > k else -np.inf
    items = np.flatnonzero((shown >= least) & (shown > -np.inf))
    return Found(items, shown[items])
