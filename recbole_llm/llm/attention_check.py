"""Which attention back end an LLM can use: the first that gives the log-probs of one sequence at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from transformers import PreTrainedModel

from recbole_llm.catalogue import exact_scores
from recbole_llm.errors import UserError
from recbole_llm.llm.attention import NAMES
from recbole_llm.llm.logps import batch_logps
from recbole_llm.llm.title_trie import title_trie
from recbole_llm.llm.token_tree import TreeBuilder
from recbole_llm.title_scores import title_scores

PROMPT, TITLES, TOKENS = 12, 3, 3
# Mean error of a title's log-prob, nats. A wrong mask shifts it by tenths at least; half precision rounds by less.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.3}


@torch.no_grad()
def choose_attention(model: PreTrainedModel, attention: str, llm: str, trained: bool = True) -> None:
    """Set the attention back end, and make sure that packed trees give what one sequence at a time gives.

    Whether titles that go on from a kept prompt do so too is tried as well; if not, ``kept_prompt_error`` of the model
    tells (``prompt_cache.cannot_go_on``).

    Architectures differ in masks that a tree must not have (soft caps, state space layers, windows by place in the
    row), and fail silently.

    Args:
        attention: as ``load_llm`` takes it.
        llm: name of the model, for the message.
        trained: whether gradients will be asked for.

    Raises:
        UserError: no back end, or not the one asked for, gives the right log-probs.
    """
    if attention == "flex" and trained and model.device.type == "cpu":
        raise UserError("--attention=flex: it cannot be trained on a CPU; use blocks, or auto.")
    fast = ["flex", "blocks"] if model.device.type == "cuda" else ["blocks"]
    tried = [attention] if attention != "auto" else [*fast, "sdpa", "eager"]
    prompt, titles = _material(model.get_input_embeddings().num_embeddings)
    expected = _one_at_a_time(model, prompt, titles)
    wrong: list[str] = []
    for kind in tried:
        told = _lacks(model, kind) or _error_of(partial(_packed, model, kind, prompt, titles), expected, model.dtype)
        if told is None:
            if wrong:
                logging.getLogger(__name__).warning(f"--attention: {kind}, because {'; '.join(wrong)}.")
            if model.config._attn_implementation in NAMES.values():  # some leave theirs as it is
                model.kept_prompt_error = _error_of(partial(_below_kept, model, prompt, titles), expected, model.dtype)
            return
        wrong.append(f"{kind} {told}")
    raise UserError(
        f"--llm={llm}: titles that share a prompt do not get the log-probabilities that they get alone "
        f"({'; '.join(wrong)}). Its layers cannot be packed; use a model with plain attention"
        f"{' or --attention=auto' if attention != 'auto' else ''}."
    )


def _lacks(model: PreTrainedModel, kind: str) -> str | None:
    """What a back end is known not to do; None if nothing is."""
    if kind != "eager" and getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        return "has no soft cap"  # the error of leaving it out grows with the weights, and may be small here
    if _own_window(model):  # its error shows in rows that are longer than the window alone
        return "leaves the layers a window of their own, by place in the row"
    return None


def _own_window(model: PreTrainedModel) -> bool:
    """Whether layers hold a causal mask of their own that hides some earlier places, as GPT-Neo's local layers do."""
    masks = (b for b in model.buffers() if b.dtype == torch.bool and b.ndim >= 2 and b.shape[-1] == b.shape[-2])
    return any(bool((~mask).tril().any()) for mask in masks)


def _material(vocabulary: int) -> tuple[list[int], list[list[int]]]:
    """A prompt and titles of tokens spread over the vocabulary."""
    tokens = [7919 * (i + 1) % vocabulary for i in range(PROMPT + TITLES * TOKENS)]
    return tokens[:PROMPT], [tokens[PROMPT + TOKENS * i :][:TOKENS] for i in range(TITLES)]


def _one_at_a_time(model: PreTrainedModel, prompt: Sequence[int], titles: Sequence[Sequence[int]]) -> torch.Tensor:
    """Log-prob of each title in a sequence of its own, by transformers' plainest kernel ``[TITLES]``, nats."""
    model.set_attn_implementation("eager")
    found = []
    for title in titles:
        ids = torch.tensor([[*prompt, *title]], device=model.device)
        logps = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        found.append(logps.gather(1, ids[0, len(prompt) :, None]).sum())
    return torch.stack(found)


def _packed(model: PreTrainedModel, kind: str, prompt: Sequence[int], titles: Sequence[Sequence[int]]) -> torch.Tensor:
    """Log-prob of each title in a tree of all by a back end, twice: a second tree in the row must not see the first."""
    tree = TreeBuilder()
    end = tree.chain(-1, prompt)[-1]
    for title in titles:
        tree.completion(tree.chain(end, title))
    model.set_attn_implementation(NAMES.get(kind, kind))
    return batch_logps(model, [tree.build()] * 2).view(2, -1)


def _below_kept(model: PreTrainedModel, prompt: Sequence[int], titles: Sequence[Sequence[int]]) -> torch.Tensor:
    """Log-prob of each title below what is kept of the prompt, in passes that cut titles in two."""
    trie = title_trie([[], *titles])
    found = exact_scores(model, list(prompt), trie, title_scores(trie), token_budget=TOKENS)
    return found[1:].to(model.device)


def _error_of(ask: Callable[[], torch.Tensor], expected: torch.Tensor, dtype: torch.dtype) -> str | None:
    """What is wrong with a way to get the titles' log-probs; None if nothing is."""
    try:
        worst = float((ask() - expected).abs().mean())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # architectures refuse in their own ways, compilers too
        return f"fails ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    return None if worst <= TOLERANCE[dtype] else f"is off by {worst:.2g} nats a title"
