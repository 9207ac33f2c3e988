"""What the LLM answers when it may write anything: how often that is an item of the catalogue at all."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from recbole_llm.data.candidates import EvalRows
from recbole_llm.data.item_text import clean
from recbole_llm.data.template import load_template
from recbole_llm.llm.half_precision import autocast
from recbole_llm.llm.sampling import cache_key, ends_of, plain_attention

if TYPE_CHECKING:  # importing it takes seconds, which a run of another model need not wait
    from recbole_llm.model.llmranker import LLMRanker

PROMPT_TAIL = 200  # characters of a prompt that are kept beside its answer


def generated_answers(
    model: LLMRanker, rows: EvalRows, count: int, seed: int
) -> tuple[dict[str, float | None], list[dict[str, Any]]]:
    """Free greedy answers for a sample of the rows.

    An answer is valid if it is, cleaned, the text of a catalogue item to the letter.

    Args:
        rows: their histories are given to the model as in ranking.
        count: rows to draw; all of them where there are fewer.
        seed: of the draw.

    Returns:
        ``generation/valid_ratio``, ``generation/hit_over_all_rows``, ``generation/hit_over_valid_rows`` (None where
        no answer is valid) and ``generation/in_history`` (valid answers that the user met before, over all rows);
        and for each row user, target, prompt_tail, answer, valid, hit and in_history.
    """
    drawn = np.random.default_rng(seed).permutation(len(rows))[:count]
    item_of = {text: item for item, text in enumerate(model.texts) if item}
    before, after = _around_title(model)
    most = max(map(len, model.prompt.answers)) + 2
    tokenizer, samples = model.llm.tokenizer, []
    model.eval()
    for row in np.sort(drawn):
        trunk = model.prompt.trunk(_history(model, rows, row))
        room = min(most, model.llm.context - len(trunk))
        text = model.budget.run(partial(greedy_text, model, trunk, room, after))
        answer = answer_text(text, before, after)
        item = item_of.get(answer)
        samples.append(
            {
                "user": str(rows.user_tokens[rows.users[row]]),
                "target": model.texts[rows.targets[row]],
                "prompt_tail": tokenizer.decode(trunk)[-PROMPT_TAIL:],
                "answer": answer,
                "valid": item is not None,
                "hit": item == rows.targets[row],
                "in_history": item is not None and item in rows.history[row],
            }
        )
    return _ratios(samples), samples


def _ratios(samples: list[dict[str, Any]]) -> dict[str, float | None]:
    valid, hits, met = (sum(sample[what] for sample in samples) for what in ("valid", "hit", "in_history"))
    return {
        "generation/valid_ratio": valid / len(samples),
        "generation/hit_over_all_rows": hits / len(samples),
        "generation/hit_over_valid_rows": hits / valid if valid else None,
        "generation/in_history": met / len(samples),
    }


def _history(model: LLMRanker, rows: EvalRows, row: int) -> list[int]:
    visible = rows.visible[torch.tensor([row])]
    history = visible[model.ITEM_SEQ][0, : visible[model.ITEM_SEQ_LEN][0]].tolist()
    return list(model.prompt.fit(history, model.llm.context))


def _around_title(model: LLMRanker) -> tuple[str, str]:
    """What an answer has before and after its title; an instruct answer ends with its turn instead."""
    template = load_template(model.config["prompt"], model.config.properties)
    return tuple(template["line"].split("{title}")) if model.prompt.every_position else ("", "")


def answer_text(text: str, before: str, after: str) -> str:
    """The title in a generated text: between ``before`` and the first ``after`` (an empty one is no end), cleaned."""
    text = text.removeprefix(before)
    return clean(text.partition(after)[0] if after else text)


@torch.no_grad()
def greedy_text(model: LLMRanker, trunk: list[int], most: int, stop: str, token_budget: int) -> str:
    """The likeliest next token again and again, as text.

    Args:
        trunk: tokens of the prompt.
        most: tokens that are written at most.
        stop: ends the text where it appears, and stands in it; empty = nothing but the LLM's own end ends it.
        token_budget: tokens of the prompt that go through the model at a time.
    """
    tokenizer, device = model.llm.tokenizer, next(model.policy.parameters()).device
    ends = ends_of(model.llm)
    *before, feed = torch.tensor([trunk], device=device).split(token_budget, dim=1)
    written: list[int] = []
    cache, text, key = None, "", cache_key(model.policy)
    with plain_attention(model.policy), autocast(model.policy):
        for part in before:
            cache = model.policy(input_ids=part, use_cache=True, **{key: cache})[key]
        while len(written) < most:
            out = model.policy(input_ids=feed, use_cache=True, **{key: cache})
            feed, cache = out.logits[:, -1:].argmax(-1), out[key]
            if int(feed) in ends:
                break
            written.append(int(feed))
            text = tokenizer.decode(written, clean_up_tokenization_spaces=False)
            if stop and stop in text:
                break
    return text
