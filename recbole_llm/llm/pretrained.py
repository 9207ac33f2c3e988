"""From a name (packaged, hub, folder, GGUF) to an LLM that is trained by LoRA, in full, or not.

4-bit weights (bitsandbytes NF4) were tried on a CPU with bitsandbytes 0.50.2: loss and gradients equal those
of the dequantised weights bit for bit, at 1 to 2.5 times the time of a float32 step, once its bfloat16 kernel
for evaluation is off (it rounds, and leaves rounded block scales behind). So they are allowed there, and save
memory, not time.
"""

from __future__ import annotations

import logging
import re
import warnings
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from recbole_llm.errors import UserError
from recbole_llm.llm.attention_check import choose_attention
from recbole_llm.llm.base import context_of, explained_load, load_base
from recbole_llm.llm.fast_linears import DEFAULT, speed_up_linears
from recbole_llm.llm.half_precision import keep_half_inputs
from recbole_llm.llm.sharded import shard
from recbole_llm.llm.types import LLM, CausalLM

logger = logging.getLogger()

CHOICES = {
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "quantization": (None, "4bit"),
    "finetune": ("lora", "full", "none"),
    "attention": ("auto", "blocks", "flex", "sdpa", "eager"),
}


def load_llm(
    *,
    llm: str,
    device: torch.device,
    dtype: str = "auto",
    quantization: str | None = None,
    finetune: str = "lora",
    lora_r: int = 16,
    lora_alpha: float = 32,
    lora_dropout: float = 0.0,
    lora_target_modules: str | list[str] = "all-linear",
    attention: str = "auto",
    gradient_checkpointing: bool = False,
    fast_linears: bool = True,
    fsdp: bool = False,
    seed: int,
) -> LLM:
    """Load an LLM in evaluation mode; torch's global generator is left as it was.

    Args:
        llm: ``embedded``, ``tiny``, a hub id, a transformers folder, or the path of a ``.gguf`` file.
        device: where the model goes.
        dtype: ``auto`` is bfloat16 on a GPU that has it, else float32; float32 for ``full``.
        quantization: ``4bit`` is NF4 with double quantisation; the base is then frozen.
        finetune: what is trained: ``lora`` adapters (float32), the ``full`` model, or ``none``.
        lora_r: rank of the adapters.
        lora_alpha: an adapter's output is scaled by ``lora_alpha / lora_r``.
        lora_dropout: probability that an input of an adapter is dropped in training.
        lora_target_modules: ``all-linear`` (without the output layer), names of layers, or a pattern of their paths.
        attention: ``blocks``, ``flex``, ``sdpa`` or ``eager``; ``auto`` is ``flex`` on a GPU, else ``blocks``, or the
            next of these that gives the right numbers.
        gradient_checkpointing: compute activations again in the backward pass.
        fast_linears: on a CPU in float32, use the faster of two libraries for products with frozen weights; the two
            are timed once on a machine.
        fsdp: spread the layers of the frozen model over the processes of the run.
        seed: of the adapters' first values.

    Raises:
        UserError: the model cannot be found, read, or used as asked.
    """
    _check_choices(dtype=dtype, quantization=quantization, finetune=finetune, attention=attention)
    dtype = dtype_of(dtype, device, finetune)
    # Not torch.manual_seed: it would seed every GPU as well, and peft fills new adapters on the CPU.
    with torch.random.fork_rng(devices=[]), explained_load(llm):
        torch.default_generator.manual_seed(seed)
        where = torch.device("cpu") if fsdp else device
        model, tokenizer, revision = load_base(llm, where, getattr(torch, dtype), quantization)
        model.config.use_cache = False
        model.requires_grad_(finetune == "full")
        no_dropout(model)
        fast = fast_linears and not quantization and device.type == "cpu"
        kernels = speed_up_linears(model) if fast else {"layers": DEFAULT, "head": DEFAULT}
        if fsdp:
            shard(model, device)
        choose_attention(model, attention, llm, trained=finetune != "none")
        if gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        context = context_of(model, tokenizer)
        if finetune == "lora":
            lora = {"r": lora_r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
            model = add_lora(model, {**lora, "target_modules": lora_target_modules})
            keep_half_inputs(model)
    return LLM(model.eval(), tokenizer, llm, revision, context, dtype, str(device), kernels)


def _check_choices(**given: str | None) -> None:
    """Raises ``UserError`` for choices that there are not, or that do not go together; warns of what loses digits."""
    for key, value in given.items():
        if value not in CHOICES[key]:
            raise UserError(f"--{key}={value}: expected one of {', '.join(map(str, CHOICES[key]))}.")
    if given["quantization"] and given["finetune"] == "full":
        raise UserError("--finetune=full cannot train --quantization=4bit weights: use --finetune=lora.")
    if given["finetune"] == "full" and given["dtype"] in ("bfloat16", "float16"):
        logger.warning(
            f"--dtype={given['dtype']} with --finetune=full: the weights themselves are trained in it, and small "
            "updates are lost in rounding (of 1e-5 nine in ten). --dtype=float32 keeps them."
        )


def no_dropout(model: torch.nn.Module) -> None:
    """Switch off what the base LLM drops in training (GPT-2, OPT, ...): ``lora_dropout`` alone says what is dropped.

    Else a policy would not begin as its reference, and kernels of attention and cuts of passes would move the loss.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        # Some drop by a number of their own (attn_dropout, layerdrop, ...), some by one of their configuration.
        for part in (module, getattr(module, "config", module)):
            for name, value in list(vars(part).items()):
                if isinstance(value, float) and "drop" in name:
                    setattr(part, name, 0.0)


def dtype_of(dtype: str, device: torch.device, finetune: str) -> str:
    """The type of computation; ``auto`` is bfloat16 on a GPU that has it and frozen weights, else float32."""
    if dtype != "auto":
        return dtype
    if finetune == "full":
        return "float32"
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if has_bfloat16 else "float32"


def add_lora(model: CausalLM, options: dict[str, Any]) -> PeftModel:
    """LoRA adapters over a model, by peft's ``LoraConfig``; ``UserError`` names layers that are not there."""
    named = options["target_modules"]
    if isinstance(named, str) and named != "all-linear" and re.fullmatch(r"\w+(\.\w+)*", named):
        named = [named]  # to peft text is a pattern for whole paths
    try:
        if missing := _no_layers(model, named):
            raise ValueError(f"no layer is called {', '.join(missing)}")
        with warnings.catch_warnings():  # peft asks transformers by a name that goes in a later version
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options | {"target_modules": named}))
    except ValueError as error:
        linear = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
        names = sorted({name.rpartition(".")[2] for name in linear})
        raise UserError(
            f"LoRA cannot be set up with --lora_r={options['r']} and --lora_target_modules="
            f"{options['target_modules']}: {error}. The model's linear layers are {', '.join(names)}."
        ) from error


def _no_layers(model: CausalLM, named: str | list[str]) -> list[str]:
    """Names in a list that no layer has: peft passes over them where another name fits."""
    layers = [f".{path}" for path, _ in model.named_modules()]
    listed = [] if isinstance(named, str) else named
    return [name for name in listed if not any(layer.endswith(f".{name}") for layer in layers)]
