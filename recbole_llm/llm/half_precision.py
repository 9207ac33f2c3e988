"""LoRA's products in the half precision of the frozen weights, on a GPU.

Adapters are trained in float32, and peft would take each layer's input to float32 for their small products, which
moves twice the bytes. Autocast takes the adapters' weights to half precision instead, as transformers' and TRL's
trainers do.
"""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from recbole_llm.llm.types import CausalLM


def keep_half_inputs(model: CausalLM) -> None:
    """Have peft leave the inputs of adapters in half precision; what runs the model must then use ``autocast``.

    Nothing is done but for a GPU and weights in half precision, nor to the output layer, which is run without.
    """
    if _suits(model):
        head = model.get_output_embeddings()
        for module in model.modules():
            if isinstance(module, BaseTunerLayer) and module is not head:
                module.cast_input_dtype_enabled = False


def autocast(model: CausalLM) -> torch.autocast:
    """The context in which a model that ``keep_half_inputs`` prepared is run; for all others it does nothing."""
    return torch.autocast("cuda", model.dtype if _suits(model) else torch.bfloat16, enabled=_suits(model))


def _suits(model: CausalLM) -> bool:
    half = model.dtype in (torch.bfloat16, torch.float16)
    return half and hasattr(model, "peft_config") and next(model.parameters()).device.type == "cuda"
