"""Which attention back end an LLM can use: the first that gives the log-probs of one sequence at a time."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from recbole_llm.errors import UserError
from recbole_llm.llm.attention import NAMES
from recbole_llm.llm.logps import batch_logps
from recbole_llm.llm.token_tree import TreeBuilder

PROMPT, TITLES, TOKENS = 12, 3, 3
# Mean error of a title's log-prob, nats. A wrong mask shifts it by tenths at least; half precision rounds by less.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.3}


@torch.no_grad()
def choose_attention(model: PreTrainedModel, attention: str, llm: str, trained: bool = True) -> None:
    """Set the attention back end, and make sure that packed trees give what one sequence at a time gives.

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
        told = _lacks(model, kind) or _error_of(model, kind, prompt, titles, expected)
        if told is None:
            if wrong:
                logging.getLogger(__name__).warning(f"--attention: {kind}, because {'; '.join(wrong)}.")
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


def _error_of(
    model: PreTrainedModel, kind: str, prompt: Sequence[int], titles: Sequence[Sequence[int]], expected: torch.Tensor
) -> str | None:
    """What is wrong with a back end on this model; None if nothing is."""
    tree = TreeBuilder()
    end = tree.chain(-1, prompt)[-1]
    for title in titles:
        tree.completion(tree.chain(end, title))
    try:
        model.set_attn_implementation(NAMES.get(kind, kind))
        # Twice: a second tree in the row must not see the first.
        found = batch_logps(model, [tree.build()] * 2)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # architectures refuse in their own ways, compilers too
        return f"fails ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    worst = float((found - expected.repeat(2)).abs().mean())
    return None if worst <= TOLERANCE[model.dtype] else f"is off by {worst:.2g} nats a title"
