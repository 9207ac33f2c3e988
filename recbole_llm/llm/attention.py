"""Attention over packed token trees: a node sees its ancestors and itself, ``k <= q < subtree_end[k]``.

*blocks* (CPU): trees are cut into blocks of nodes in preorder. All that the nodes of a block may see are the ancestors
of its first node and the block itself, so each block is one small SDPA, and little is spent on other branches.
*flex* (GPU): the same rule as the mask of FlexAttention. *sdpa*, *eager*: transformers' own kernels with a dense mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from recbole_llm.llm.token_tree import TreeBatch
from recbole_llm.llm.types import CausalLM

BLOCK = 128  # nodes of a block at most: fewer spend less on pairs that do not see each other, and more on calls
FLEX_BLOCK = 128  # FlexAttention's own block of queries and keys; rows are padded to multiples of it
NAMES = {"blocks": "token_tree_blocks", "flex": "token_tree_flex"}  # our names of back ends -> transformers'


class Attend(Protocol):
    """What replaces attention in every layer of a forward pass that gets it as ``attend=``."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of the tokens of this pass.

        Args:
            layer: number of the layer.
            query: ``[1, H, S, D]``.
            key, value: ``[1, KV, S, D]``, rotary position applied.
            scale: factor of the products.

        Returns:
            ``[1, S, H, D]``.
        """
        ...


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    attend: Attend | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer; without ``attend`` (free generation) it is plain SDPA.

    Attention dropout is left out under ``attend``: titles that share a prompt must see the same one.

    Raises:
        NotImplementedError: under ``attend``, for what an architecture adds to its attention (sinks, soft caps, biases,
            choices of keys) and ``attend`` leaves out. The error of that may be small, or show in long rows alone.
    """
    if attend is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    added = {"attention_mask": attention_mask, **kwargs}
    tensors = [name for name, given in added.items() if isinstance(given, Tensor) and name != "position_ids"]
    left_out = tensors + ["softcap"] * bool(kwargs.get("softcap"))
    if left_out:
        raise NotImplementedError(f"{', '.join(left_out)} of {type(module).__name__} would be left out")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(module.layer_idx, query, key, value, scale), None


for _name in NAMES.values():
    AttentionInterface.register(_name, _attention)


def attention_inputs(batch: TreeBatch, model: CausalLM) -> dict[str, Any]:
    """What a decoder takes, besides the tokens, to attend as the trees say."""
    kind = model.config._attn_implementation
    if kind == NAMES["blocks"]:
        return {"attention_mask": None, "attend": Blocks(batch.subtree_end, batch.starts, model.dtype)}
    if kind == NAMES["flex"]:
        return {"attention_mask": None, "attend": Flex(batch.subtree_end)}
    # Not a bool mask: eager attention would add it as numbers.
    node = torch.arange(len(batch.subtree_end), device=batch.subtree_end.device)
    return {"attention_mask": additive_mask(node, node, batch.subtree_end, model.dtype)[None, None]}


def additive_mask(queries: Tensor, keys: Tensor, subtree_end: Tensor, dtype: torch.dtype) -> Tensor:
    """``[Q, K]``, 0 where a query's node may attend to a key's node, else -inf.

    Args:
        queries, keys: nodes ``[Q]``, ``[K]``.
        subtree_end: of all nodes.
    """
    sees = (keys[None] <= queries[:, None]) & (queries[:, None] < subtree_end[keys][None])
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, -torch.inf)


class Blocks:
    """Attention in blocks of nodes, each with the keys that its nodes may see.

    For a block ``[a, b)`` of one tree in preorder, an ancestor k < a of a node q of the block has
    ``subtree_end[k] > q >= a``, so it is an ancestor of a too: the keys are the path to a, and the block.

    Args:
        subtree_end: of each node of the packed row ``[S]``.
        starts: where each tree begins, and S ``[trees + 1]``.
        dtype: of the model.
    """

    def __init__(self, subtree_end: Tensor, starts: list[int], dtype: torch.dtype) -> None:
        end, device = subtree_end.cpu(), subtree_end.device
        keys, self.queries, self.seen, self.masks = [], [], [], []
        for first, last in pairwise(starts):
            for a, b, is_chain in _cuts(end[first:last] - first):
                block = torch.arange(first + a, first + b)
                path = torch.nonzero(end[first : first + a] > first + a)[:, 0] + first
                keys.append(torch.cat([path, block]))
                self.queries.append(b - a)
                self.seen.append(len(keys[-1]))
                self.masks.append(None if is_chain else additive_mask(block, keys[-1], end, dtype).to(device))
        index = torch.cat(keys)
        is_all = len(index) == len(end) and bool((index == torch.arange(len(end))).all())
        self.index = None if is_all else index.to(device)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if self.index is not None:
            key, value = key.index_select(2, self.index), value.index_select(2, self.index)
        parts = zip(
            query.split(self.queries, 2), key.split(self.seen, 2), value.split(self.seen, 2), self.masks, strict=True
        )
        found = [
            scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True)
            for q, k, v, mask in parts
        ]
        return torch.cat(found, 2).transpose(1, 2)


def _cuts(end: Tensor) -> list[tuple[int, int, bool]]:
    """Blocks ``[a, b)`` of one tree; the first is the chain that it begins with, plain causal attention."""
    # The chain ends at the first node that some node before does not lead to.
    breaks = torch.nonzero(end.cummin(0).values[:-1] <= torch.arange(1, len(end)))[:, 0]
    chain = int(breaks[0]) + 1 if len(breaks) else len(end)
    return [(0, chain, True)] + [(a, min(a + BLOCK, len(end)), False) for a in range(chain, len(end), BLOCK)]


class Flex:
    """FlexAttention under the trees' rule; the row must be a multiple of ``FLEX_BLOCK`` long."""

    def __init__(self, subtree_end: Tensor) -> None:
        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (query < subtree_end[key])

        some, every = (_listed(blocks) for blocks in _block_pairs(subtree_end))
        self.mask = BlockMask.from_kv_blocks(*some, *every, BLOCK_SIZE=FLEX_BLOCK, mask_mod=sees)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        group = query.shape[1] // key.shape[1]
        if group & (group - 1):  # FlexAttention shares keys among a power of two of heads alone
            key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
            group = 1
        kernel: Any = _compiled_flex() if query.device.type == "cuda" else flex_attention
        found = kernel(query, key, value, block_mask=self.mask, scale=scale, enable_gqa=group > 1)
        return found.transpose(1, 2)


def _block_pairs(subtree_end: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of queries and keys ``[S / FLEX_BLOCK, S / FLEX_BLOCK]`` of which some but not all pairs see each other,
    and those of which all do.

    A key is seen by the queries before its ``subtree_end``, so the largest and the least of a block of keys tell; no
    mask over all pairs of tokens is made.
    """
    ends = subtree_end.view(-1, FLEX_BLOCK)
    start = torch.arange(len(ends), device=ends.device) * FLEX_BLOCK
    before = start[:, None] > start
    every = before & (ends.amin(1) >= start[:, None] + FLEX_BLOCK)
    some = (before & (ends.amax(1) > start[:, None])) | (start[:, None] == start)
    return some & ~every, every


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys belong to each block of queries ``[1, 1, Q]``, and which, first ones first."""
    order = blocks.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    # dynamic: one compilation for rows of every length
    return torch.compile(flex_attention, dynamic=True)
