"""From hidden states to log-probs of a trie's edges, and from sums of them to scores and to bounds on scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from recbole_llm.llm.logps import decoder_and_head, token_logps
from recbole_llm.llm.title_trie import TitleTrie


@dataclass(frozen=True)
class TitleScores:
    """``score_norm`` over a catalogue: score = sum of log-probs / length - prior.

    A sum only falls along a title. So a node's sum over the longest length below it, less the smallest prior below
    it, is no less than the score of any title below, in float arithmetic too: each step is monotone.

    Attributes:
        item_length, item_prior: ``[n_items]``, float32; 1 and 0 where the norm takes none.
        node_length, node_prior: the longest and the smallest below each node ``[n]``.
    """

    item_length: np.ndarray
    item_prior: np.ndarray
    node_length: np.ndarray
    node_prior: np.ndarray

    def of_items(self, logps: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Scores ``[I]`` of items whose titles have these log-probs ``[I]``, nats."""
        return logps / self.item_length[items] - self.item_prior[items]

    def bounds(self, logps: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        """What no title below these nodes can exceed, from the nodes' log-probs ``[N]``, nats."""
        return logps / self.node_length[nodes] - self.node_prior[nodes]


def title_scores(trie: TitleTrie, norm: str = "sum", prior: np.ndarray | None = None) -> TitleScores:
    """The scores of ``score_norm`` sum, mean or pmi.

    Args:
        prior: pmi: log-prob of every item's title after an empty history ``[n_items]``, nats.
    """
    length = np.ones(trie.n_items, dtype=np.float32)
    if norm == "mean":
        length[1:] = trie.depth[trie.last_node[1:]]
    shift = np.zeros(trie.n_items, dtype=np.float32)
    if norm == "pmi":
        assert prior is not None
        shift[1:] = prior[1:]
    return TitleScores(length, shift, -trie.least_below(-length), trie.least_below(shift))


def edge_logps(
    model: torch.nn.Module, hidden: torch.Tensor, nodes: np.ndarray, trie: TitleTrie
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log p(child | path) of all children of some nodes.

    Args:
        hidden: last hidden state at each node ``[N, d]``.
        nodes: ``[N]``.

    Returns:
        Place of the parent in ``nodes`` ``[E]``, child ``[E]``, nats ``[E]``, float32. None exceeds 0: rounding must
        not make a title more likely than its beginning.
    """
    _, head = decoder_and_head(model)
    place, child = trie.edges(nodes)
    row, target = (torch.as_tensor(x, device=hidden.device) for x in (place, trie.token[child]))
    logps = token_logps(hidden, row, target, head, model.config)
    return place, child, logps.clamp(max=0).cpu().numpy()
