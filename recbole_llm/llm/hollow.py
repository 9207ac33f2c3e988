"""An LLM without its weights: shapes, tokenizer and context, to plan with before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import torch
from recbole.config import Config
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import cached_file

from recbole_llm.llm.attention import NAMES
from recbole_llm.llm.base import (
    check_causal,
    context_of,
    explained_load,
    load_base,
    load_tokenizer,
    locate,
)
from recbole_llm.llm.fast_linears import DEFAULT
from recbole_llm.llm.hub_access import hub_answers
from recbole_llm.llm.identity import fingerprint, weights_of
from recbole_llm.llm.pretrained import add_lora, dtype_of
from recbole_llm.llm.types import LLM, CausalLM


def hollow_llm(config: Config) -> tuple[LLM, bool]:
    """What ``load_llm`` would give, on torch's ``meta`` device, whose tensors have shapes and no values.

    A folder needs no more than ``config.json`` and the tokenizer's files. Weights that are to be quantised are here in
    the type of computation, and attention is one fused kernel (``attend=``), but for architectures that take none.

    Returns:
        The LLM, whose revision is that of the weights where they are there; and whether they are there.

    Raises:
        UserError: as ``load_llm``.
    """
    name, dtype = config["llm"], dtype_of(config["dtype"], config["device"], config["finetune"])
    with explained_load(name):
        base, tokenizer, revision, has_weights = _hollow_base(name, getattr(torch, dtype))
        base.config.use_cache = False
        # Some (GPT-2) look for padding among the tokens, which have no values here. Set past the configuration's own
        # checks, since some allow no None.
        vars(base.config)["pad_token_id"] = None
        base.requires_grad_(config["finetune"] == "full")
        context = context_of(base, tokenizer)
        model: CausalLM = base
        if config["finetune"] == "lora":
            options = {key: config[f"lora_{key}"] for key in ("alpha", "dropout")}
            lora = {"r": config["lora_r"], **{f"lora_{key}": value for key, value in options.items()}}
            with torch.device("meta"):
                model = add_lora(base, {**lora, "target_modules": config["lora_target_modules"]})
    kernels = {"layers": DEFAULT, "head": DEFAULT}
    return LLM(model.eval(), tokenizer, name, revision, context, dtype, "meta", kernels), has_weights


def _hollow_base(name: str, dtype: torch.dtype) -> tuple[CausalLM, object, str, bool]:
    """Model, tokenizer, revision, and whether the weights are there."""
    if name == "tiny":
        model, tokenizer, revision = load_base(name, torch.device("cpu"), dtype, None)
        model.set_attn_implementation(NAMES["blocks"])
        return model.to("meta"), tokenizer, revision, True
    where = locate(name)
    offline = isinstance(where, str) and not hub_answers()
    shape = AutoConfig.from_pretrained(where, trust_remote_code=False, local_files_only=offline)
    check_causal(name, shape)
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(shape, dtype=dtype, attn_implementation=NAMES["blocks"])
        except KeyError:  # Falcon: its layers know the kernels of transformers alone
            model = AutoModelForCausalLM.from_config(shape, dtype=dtype, attn_implementation="eager")
    folder = Path(cached_file(where, "config.json", local_files_only=offline)).parent
    has_weights = any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    return model, load_tokenizer(name, where, model, offline), fingerprint(weights_of(folder)), has_weights
