"""A causal LM: what it is to a type checker, and what goes with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

# A PreTrainedModel, or the PeftModel around it. torch types every attribute of a module as a tensor or a module, so as
# an `nn.Module` neither `model.config` nor `model.generate` would pass.
CausalLM: TypeAlias = Any


@dataclass
class LLM:
    """A causal LM and what a result has to say about it."""

    model: CausalLM  # a PreTrainedModel, or the PeftModel around it when `finetune` is `lora`
    tokenizer: Any  # a fast one, with an end-of-text and a padding token
    name: str  # as the user gave it
    revision: str  # SHA-256 over samples of the base weights' files; over the weights for `tiny`
    context: int  # the most tokens in a sequence: positions, or the sliding window where there is one
    dtype: str  # of the base weights in computation, such as `float32`
    device: str  # such as `cuda:0`
    kernels: dict[str, str]  # for products with frozen weights in `layers` and `head`: `default` or `onednn`
