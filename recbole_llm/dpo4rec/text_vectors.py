"""Texts as vectors of a frozen encoder, which the recommender's adaptor reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from recbole.config import Config

from recbole_llm.errors import UserError
from recbole_llm.llm.encoder import kept_vectors, text_embeddings
from recbole_llm.llm.logps import decoder_and_head
from recbole_llm.llm.pretrained import LLM, load_llm
from recbole_llm.llm.token_tree import batches_by_budget

LEAST_CONTEXT = 512  # tokens of a text that are read, where the LLM could read more


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
    keys = ("llm", "dtype", "quantization", "fast_linears")
    llm = load_llm(device=config["device"], finetune="none", seed=config["seed"], **{k: config[k] for k in keys})
    return kept_vectors([llm.revision, llm.dtype], texts, lambda: _hidden_means(llm, texts, config["token_budget"]))


@torch.no_grad()
def _hidden_means(llm: LLM, texts: Sequence[str], token_budget: int) -> np.ndarray:
    decoder, _ = decoder_and_head(llm.model)
    llm.model.set_attn_implementation("sdpa")  # it takes padding
    device, most = next(llm.model.parameters()).device, min(LEAST_CONTEXT, llm.context)
    options = {"add_special_tokens": False, "truncation": True, "max_length": most}
    ids = [llm.tokenizer(text, **options)["input_ids"] if text.strip() else [] for text in texts]
    vectors = np.zeros((len(texts), llm.model.config.get_text_config().hidden_size), np.float32)
    rows = [row for row, tokens in enumerate(ids) if tokens]
    for group in batches_by_budget([len(ids[row]) for row in rows], token_budget):
        mine = [rows[i] for i in group]
        longest = max(len(ids[row]) for row in mine)
        batch = torch.full((len(mine), longest), llm.tokenizer.pad_token_id)
        mask = torch.zeros_like(batch)
        for place, row in enumerate(mine):
            batch[place, : len(ids[row])] = torch.tensor(ids[row])
            mask[place, : len(ids[row])] = 1
        states = decoder(input_ids=batch.to(device), attention_mask=mask.to(device), use_cache=False).last_hidden_state
        weight = mask.to(device)[..., None].float()
        vectors[mine] = ((states.float() * weight).sum(1) / weight.sum(1)).cpu().numpy()
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, np.float32(1))
