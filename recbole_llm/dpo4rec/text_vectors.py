"""Texts as vectors of a frozen encoder, which the recommender's adaptor reads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from recbole.config import Config

from recbole_llm.environment import versions
from recbole_llm.errors import UserError
from recbole_llm.llm.encoder import kept_vectors, text_embeddings, unit
from recbole_llm.llm.identity import identity
from recbole_llm.llm.logps import decoder_and_head
from recbole_llm.llm.pretrained import load_llm
from recbole_llm.llm.sampling import plain_attention
from recbole_llm.llm.types import LLM

MOST_TOKENS = 512  # tokens of a text that are read, where the LLM could read more


def text_vectors(config: Config, texts: Sequence[str]) -> np.ndarray:
    """Unit vectors of texts ``[n, d]``, float32; an empty text gets zeros. Kept on disk by content.

    ``text_encoder`` is a sentence encoder, or ``llm``: the mean over tokens of the LLM's last hidden states, without
    adapters, so that a text's vector does not change as the LLM is aligned.

    Raises:
        UserError: the encoder cannot be had.
    """
    encoder = config["text_encoder"]
    if encoder != "llm":
        try:
            return text_embeddings(texts, encoder)
        except UserError as error:
            raise UserError(
                f"--text_encoder={encoder}: it cannot be used; llm needs no model but the LLM. What went wrong: {error}"
            ) from error
    settings = tuple(config[key] for key in ("llm", "dtype", "quantization", "attention"))
    llm = _encoding_llm(config["device"], config["seed"], *settings)
    known = identity(llm)
    revision = [llm.revision, known["tokenizer"], known["config"], llm.dtype, config["quantization"], versions()]
    return kept_vectors(revision, texts, lambda: _hidden_means(llm, texts, config["token_budget"]))


@lru_cache(maxsize=1)  # asked for in every iteration
def _encoding_llm(
    device: torch.device, seed: int, llm: str, dtype: str, quantization: str | None, attention: str
) -> LLM:
    """The LLM without adapters, beside the one that is aligned."""
    options: dict[str, Any] = {"dtype": dtype, "quantization": quantization, "attention": attention}
    return load_llm(llm=llm, device=device, finetune="none", fast_linears=False, seed=seed, **options)


@torch.no_grad()
def _hidden_means(llm: LLM, texts: Sequence[str], token_budget: int) -> np.ndarray:
    decoder, _ = decoder_and_head(llm.model)
    device, most = next(llm.model.parameters()).device, min(MOST_TOKENS, llm.context)
    options = {"add_special_tokens": False, "split_special_tokens": True, "truncation": True, "max_length": most}
    ids = [llm.tokenizer(text, **options)["input_ids"] if text.strip() else [] for text in texts]
    vectors = np.zeros((len(texts), llm.model.config.get_text_config().hidden_size), np.float32)
    with plain_attention(llm.model):  # it takes padding
        for rows in _padded_batches([len(tokens) for tokens in ids], token_budget):
            longest = len(ids[rows[-1]])
            batch = torch.full((len(rows), longest), llm.tokenizer.pad_token_id)
            mask = torch.zeros_like(batch)
            for place, row in enumerate(rows):
                batch[place, : len(ids[row])] = torch.tensor(ids[row])
                mask[place, : len(ids[row])] = 1
            batch, mask = batch.to(device), mask.to(device)
            states = decoder(input_ids=batch, attention_mask=mask, use_cache=False).last_hidden_state
            weight = mask[..., None].float()
            vectors[rows] = ((states.float() * weight).sum(1) / weight.sum(1)).cpu().numpy()
    return unit(vectors)


def _padded_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Numbers of texts that have tokens, ascending by length, so that a padded batch holds ``token_budget`` at most."""
    batches: list[list[int]] = []
    for row in sorted((row for row, length in enumerate(lengths) if length), key=lambda row: lengths[row]):
        if not batches or (len(batches[-1]) + 1) * lengths[row] > token_budget:
            batches.append([])
        batches[-1].append(row)
    return batches
