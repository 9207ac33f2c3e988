"""What a causal LM is to a type checker."""

from __future__ import annotations

from typing import Any, TypeAlias

# A PreTrainedModel, or the PeftModel around it. torch types every attribute of a module as a tensor or a module, so as
# an `nn.Module` neither `model.config` nor `model.generate` would pass.
CausalLM: TypeAlias = Any
