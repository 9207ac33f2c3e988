"""Free text from an LLM: several answers to a prompt, whose keys and values are computed once.

transformers' ``generate`` writes; it would put every copy of a prompt through the model again, so it is handed the
prompts' cache with one copy of it for each answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig

from recbole_llm.llm.attention import NAMES
from recbole_llm.llm.half_precision import autocast
from recbole_llm.llm.logps import base_model, decoder_and_head
from recbole_llm.llm.types import LLM, CausalLM


@dataclass(frozen=True)
class Sampling:
    """How texts are drawn.

    Attributes:
        number: texts a prompt.
        most: tokens of a text at most.
        temperature: divides the logits; 0 = the likeliest token each time, and then ``number`` must be 1.
        top_p: draw from the likeliest tokens that together have this probability.
    """

    number: int
    most: int
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature == 0 and self.number > 1:
            raise ValueError(f"greedy texts of a prompt are all alike; got number = {self.number}")


@dataclass(frozen=True)
class Written:
    """A text, its length in tokens (the end not counted), whether the LLM ended it by itself, and the token by which:
    None where a server wrote, which does not tell.
    """

    text: str
    tokens: int
    ended: bool
    end: int | None = None


@torch.no_grad()
def sample_texts(llm: LLM, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[list[Written]]:
    """Texts after each prompt, ``sampling.number`` of each; all of them are written together.

    The same prompts in the same call with the same seed give the same texts; torch's global generator is left as it
    was.

    Args:
        prompts: token ids, of any lengths.
        seed: of the draws.
    """
    model, tokenizer, ends = llm.model.eval(), llm.tokenizer, ends_of(llm)
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padded on the left: all go on at the same place
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    draws = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with draws, plain_attention(model), plain_generation(model):
        torch.manual_seed(seed)
        cache = _prompt_cache(model, ids, mask)
        if sampling.number > 1 and cache is not None:
            cache.batch_repeat_interleave(sampling.number)
        ids, mask = (x.repeat_interleave(sampling.number, 0) for x in (ids, mask))
        with autocast(model):
            found = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=sampling.most,
                eos_token_id=ends,
                pad_token_id=tokenizer.pad_token_id,
                **{cache_key(model): cache},
                **_choice(sampling),
            )
    written = [_read(tokenizer, row, ends) for row in found[:, longest:].tolist()]
    return [written[i : i + sampling.number] for i in range(0, len(written), sampling.number)]


def _prompt_cache(model: CausalLM, ids: torch.Tensor, mask: torch.Tensor) -> DynamicCache | None:
    """Keys and values of all tokens but the last, which ``generate`` feeds; None where there are none."""
    if ids.shape[1] < 2:
        return None
    cache = DynamicCache(config=model.config.get_text_config())
    position = (mask.cumsum(1) - 1).clamp(min=0)
    decoder, _ = decoder_and_head(model)  # no LM head: nothing is predicted here
    with autocast(model):
        decoder(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=position[:, :-1],
            use_cache=True,
            **{cache_key(model): cache},
        )
    return cache


def cache_key(model: CausalLM) -> str:
    """What transformers calls a cache: ``cache`` from 5.24 on, ``past_key_values`` before."""
    return "cache" if "cache" in signature(base_model(model).forward).parameters else "past_key_values"


def _choice(sampling: Sampling) -> dict[str, Any]:
    """What ``generate`` takes."""
    plain = {"num_beams": 1, "repetition_penalty": 1.0, "use_cache": True}
    if sampling.temperature == 0:
        return {**plain, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    choice = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return {**plain, "do_sample": True, **choice}


def ends_of(llm: LLM) -> list[int]:
    """Tokens that end a text: the tokenizer's, and the end of a turn where the model's own settings know another."""
    known = getattr(base_model(llm.model).generation_config, "eos_token_id", None)
    return sorted({llm.tokenizer.eos_token_id, *([known] if isinstance(known, int) else known or ())})


def _read(tokenizer: Any, ids: list[int], ends: Sequence[int]) -> Written:
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    before = ids[:end]
    text = tokenizer.decode(before, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Written(text, len(before), end is not None, None if end is None else ids[end])


@contextmanager
def plain_generation(model: CausalLM) -> Iterator[None]:
    """A model's own generation settings aside: ``generate`` takes from them whatever it is not told, as ``min_p``."""
    base = base_model(model)
    before = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = before


@contextmanager
def plain_attention(model: CausalLM) -> Iterator[None]:
    """Our back ends take no padding mask: inside, where one of them is used, attention is transformers' SDPA."""
    base = base_model(model)
    before = base.config._attn_implementation
    if before in NAMES.values():  # a model that needs another keeps it
        base.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        base.set_attn_implementation(before)
