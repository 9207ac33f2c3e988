"""Keys and values that are kept: of prompts, and of nodes of the title trie below them.

Attention of a trie node goes over two parts, the whole prompt and its own path in the trie, which are merged by their
log-sum-exps. So no mask over prompt and catalogue is ever made, and a prompt's keys are never copied.
"""

from __future__ import annotations

from itertools import count

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from recbole_llm.llm.attention import NAMES, Attend
from recbole_llm.llm.half_precision import autocast
from recbole_llm.llm.logps import base_model, decoder_and_head
from recbole_llm.llm.types import CausalLM


def cannot_go_on(model: CausalLM) -> str | None:
    """What goes wrong where an LLM goes on from what is kept of a prompt, without its subject; None if nothing does."""
    kind = model.config._attn_implementation
    if kind not in NAMES.values():
        return f"has {kind} attention, which cannot"
    return getattr(base_model(model), "kept_prompt_error", None)  # choose_attention tried it


def hidden_states(model: torch.nn.Module, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
    """Last hidden states of one row of tokens ``[S, d]``, attention by ``attend``, told its number in the pass.

    Not the layer's: some attend twice (DiffLlama), or are gone through several times (HRM), with other keys and values.
    """
    decoder, _ = decoder_and_head(model)
    device = next(model.parameters()).device
    row = {"input_ids": tokens.to(device)[None], "position_ids": positions.to(device)[None]}
    numbers = count()

    def numbered(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return attend(next(numbers), query, key, value, scale)

    with autocast(model):
        return decoder(**row, use_cache=False, attend=numbered).last_hidden_state[0]


class PromptCache:
    """Keys and values of prompts, by layer; each key with its value behind it, whose widths may differ.

    Args:
        slots: prompts kept at once.
        longest: tokens of the longest.

    Attributes:
        length: tokens of the prompt in each slot ``[slots]``.
    """

    def __init__(self, slots: int, longest: int) -> None:
        self.length = torch.zeros(slots, dtype=torch.long)
        self._longest = longest
        self._kept: dict[int, Tensor] = {}  # layer -> [slots, KV, longest, D + V]

    def read(self, model: torch.nn.Module, prompt: list[int], slot: int) -> Tensor:
        """Put a prompt through the LLM, keep its keys and values, and return its last hidden state ``[d]``."""
        tokens = torch.tensor(prompt)
        self.length[slot] = len(prompt)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
            new = torch.cat([key, value], -1)
            if layer not in self._kept:
                size = (len(self.length), new.shape[1], self._longest, new.shape[3])
                self._kept[layer] = new.new_zeros(size)  # what is masked must be finite
            self._kept[layer][slot, :, : len(prompt)] = new[0]
            found = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
            return found.transpose(1, 2)

        return hidden_states(model, tokens, torch.arange(len(tokens)), attend)[-1]

    @property
    def device(self) -> torch.device:
        """Where keys and values lie; a prompt was read before."""
        return self._kept[0].device

    def keys_values(self, layer: int, slots: Tensor) -> Tensor:
        """Of the prompts in these ascending slots, as long as the longest of them ``[slots, KV, P, D + V]``."""
        kept = self._kept[layer][:, :, : int(self.length[slots].max())]
        return kept if len(slots) == len(self.length) else kept[slots.to(kept.device)]


class NodeCache:
    """Keys and values of trie nodes in numbered slots, by layer; grows with the highest slot that is written.

    Args:
        most: slots at most.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: dict[int, Tensor] = {}  # layer -> [capacity, KV, D + V]

    def write(self, layer: int, slots: Tensor, most: int, key: Tensor, value: Tensor) -> Tensor:
        """Keep keys ``[1, KV, S, D]`` and values ``[1, KV, S, V]`` in slots ``[S]``, all below ``most``; returns all
        that is kept.
        """
        new = torch.cat([key[0], value[0]], -1).transpose(0, 1)
        kept = self._kept.get(layer, new[:0])
        if most > len(kept):
            size = max(most, min(2 * len(kept), self._most))
            kept = torch.cat([kept, kept.new_zeros(size - len(kept), *kept.shape[1:])])
        self._kept[layer] = kept.index_copy_(0, slots, new)
        return self._kept[layer]

    def move_to_front(self, slots: Tensor) -> None:
        """What lies in ``slots`` becomes slots 0, 1, ..."""
        for kept in self._kept.values():
            kept[: len(slots)] = kept[slots.to(kept.device)]


class Slots:
    """Numbers of places in a node cache, and the path in the trie that ends at each."""

    def __init__(self, deepest: int) -> None:
        self.path = np.full((0, deepest), -1)  # slots of the ancestors, the node's own last
        self.free: list[int] = []

    def take(self, above: np.ndarray, depth: np.ndarray) -> np.ndarray:
        """A slot for each node below the nodes in slots ``above`` (-1 = the prompt)."""
        if len(self.free) < len(above):
            size = len(self.path)
            more = max(len(above), size)
            self.path = np.concatenate([self.path, np.full((more, self.path.shape[1]), -1)])
            self.free = [*range(size + more - 1, size - 1, -1), *self.free]
        taken = np.array([self.free.pop() for _ in above])
        self.path[taken] = np.where((above >= 0)[:, None], self.path[above], -1)
        self.path[taken, depth - 1] = taken
        return taken

    @property
    def in_use(self) -> int:
        return len(self.path) - len(self.free)


class BelowPrompts:
    """Attention of trie nodes: each sees the whole prompt that it hangs off, and nodes on its path.

    Args:
        prompts, nodes: where they are kept, the nodes of this pass included.
        users: slots of the prompts in this pass, ascending ``[U]``.
        counts: how many of the nodes, which come prompt after prompt, hang off each ``[U]``.
        slots: where these go ``[S]``.
        seen: slots that a block of consecutive nodes sees ``[blocks, W]``.
        sees: which of them each node sees ``[blocks, B, W]``; the last block may be filled up by nodes that see
            anything but nothing.
    """

    def __init__(
        self,
        prompts: PromptCache,
        nodes: NodeCache,
        *,
        users: Tensor,
        counts: Tensor,
        slots: Tensor,
        seen: Tensor,
        sees: Tensor,
    ) -> None:
        self.prompts, self.nodes, self.users = prompts, nodes, users
        device = prompts.device
        self.slots, self.seen, self.sees = slots.to(device), seen.to(device), sees.to(device)
        self.most = int(slots.max()) + 1
        self.at_once = int(counts.max())  # queries of a prompt, filled up where it has fewer
        filled = torch.arange(self.at_once) < counts[:, None]
        self.place = None if filled.all() else torch.nonzero(filled.flatten())[:, 0].to(device)
        length = prompts.length[users]
        within = torch.arange(int(length.max())) < length[:, None]
        self.in_prompt = None if within.all() else within[:, None].to(device)
        self._masks: tuple[Tensor | None, Tensor | None] | None = None

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        _, heads, size, width = query.shape
        groups = key.shape[1]
        rows = query[0].transpose(0, 1).reshape(size, groups, heads // groups, width)
        if self._masks is None:
            repeated = self.sees.repeat_interleave(heads // groups, 1)
            self._masks = (_additive(self.in_prompt, query.dtype), _additive(repeated, query.dtype))
        prompt_mask, node_mask = self._masks
        kept = self.nodes.write(layer, self.slots, self.most, key, value)[self.seen].transpose(1, 2)
        path = _blocks(rows, self.sees.shape[1], kept[..., :width], kept[..., width:], node_mask, scale)
        kept = self.prompts.keys_values(layer, self.users)
        above = _blocks(self._by_prompt(rows), self.at_once, kept[..., :width], kept[..., width:], prompt_mask, scale)
        if self.place is not None:
            above = [part[self.place] for part in above]
        (here, here_lse), (there, there_lse) = ([part[:size] for part in parts] for parts in (path, above))
        share = torch.sigmoid(here_lse - there_lse)[..., None]  # of the path in the softmax over both
        return torch.lerp(there.float(), here.float(), share).to(query.dtype).reshape(1, size, heads, -1)

    def _by_prompt(self, rows: Tensor) -> Tensor:
        if self.place is None:
            return rows
        padded = rows.new_zeros(len(self.users) * self.at_once, *rows.shape[1:])
        return padded.index_copy_(0, self.place, rows)


def _additive(sees: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``[A, 1, Q, W]``, 0 where ``sees [A, Q, W]``, else -inf."""
    if sees is None:
        return None
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, -torch.inf)[:, None]


def _blocks(rows: Tensor, size: int, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> list[Tensor]:
    """Attention of consecutive blocks of rows, each over keys of its own.

    Args:
        rows: queries ``[S, KV, G, D]``, filled up to ``[A * Q, ...]`` by zeros.
        size: rows of a block, Q.
        key, value: ``[A, KV, W, D]``, ``[A, KV, W, V]``.
        mask: additive ``[A, 1, Q * G, W]``, or 1 in place of ``Q * G``.

    Returns:
        Output ``[A * Q, KV, G, V]`` and log-sum-exp of the products ``[A * Q, KV, G]``, float32.
    """
    blocks = len(key)
    _, groups, heads, width = rows.shape
    filled = pad(rows, (0, 0, 0, 0, 0, 0, 0, blocks * size - len(rows)))
    query = filled.view(blocks, size, groups, heads, width).transpose(1, 2).reshape(blocks, groups, -1, width)
    mask = None if mask is None else mask.expand(-1, -1, query.shape[2], -1)
    fused = query.device.type == "cpu" and width == value.shape[-1]
    found, lse = (_cpu_kernel if fused else _spelled_out)(query, key, value, mask, scale)
    found = found.reshape(blocks, groups, size, heads, -1).transpose(1, 2).reshape(*filled.shape[:3], -1)
    return [found, lse.reshape(blocks, groups, size, heads).transpose(1, 2).reshape(filled.shape[:3])]


def _cpu_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The kernel behind SDPA on a CPU, which tells the log-sum-exp too."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, 0.0, False, attn_mask=mask, scale=scale)


def _spelled_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    products = (query.float() * scale) @ key.float().transpose(-1, -2)
    products = products if mask is None else products + mask
    lse = products.logsumexp(-1)
    return (products - lse[..., None]).exp() @ value.float(), lse
