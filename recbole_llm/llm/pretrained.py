"""From a name (packaged, hub, folder, GGUF) to an LLM that is trained by LoRA, in full, or not.

4-bit weights (bitsandbytes NF4) were tried on a CPU with bitsandbytes 0.50.2: loss and gradients equal those
of the dequantised weights bit for bit, at 1 to 2.5 times the time of a float32 step, once its bfloat16 kernel
for evaluation is off (it rounds, and leaves rounded block scales behind). So they are allowed there, and save
memory, not time.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import cached_file

from recbole_llm.errors import UserError
from recbole_llm.llm.adapter import digest
from recbole_llm.llm.attention_check import choose_attention
from recbole_llm.llm.embedded import PACKAGED, embedded_folder, gguf_folder
from recbole_llm.llm.fast_linears import DEFAULT, speed_up_linears
from recbole_llm.llm.tiny import tiny_llm

CHOICES = {
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "quantization": (None, "4bit"),
    "finetune": ("lora", "full", "none"),
    "attention": ("auto", "blocks", "flex", "sdpa", "eager"),
}


@dataclass
class LLM:
    """A causal LM and what a result has to say about it."""

    model: torch.nn.Module  # a PreTrainedModel, or the PeftModel around it when `finetune` is `lora`
    tokenizer: Any  # a fast one, with an end-of-text and a padding token
    name: str  # as the user gave it
    revision: str  # SHA-256 over samples of the base weights' files; over the weights for `tiny`
    context: int  # the most tokens in a sequence: positions, or the sliding window where there is one
    dtype: str  # of the base weights in computation, such as `float32`
    device: str  # such as `cuda:0`
    kernels: dict[str, str]  # for products with frozen weights in `layers` and `head`: `default` or `onednn`


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
    seed: int,
) -> LLM:
    """Load an LLM in evaluation mode; torch's global generator is left as it was.

    Args:
        llm: ``embedded``, ``tiny``, a hub id, a transformers folder, or the path of a ``.gguf`` file.
        device: where the model goes.
        dtype: ``auto`` is bfloat16 on a GPU that has it, else float32.
        quantization: ``4bit`` is NF4 with double quantisation; the base is then frozen.
        finetune: what is trained: ``lora`` adapters (float32), the ``full`` model, or ``none``.
        lora_r: rank of the adapters.
        lora_alpha: an adapter's output is scaled by ``lora_alpha / lora_r``.
        lora_dropout: probability that an input of an adapter is dropped in training.
        lora_target_modules: ``all-linear`` (without the output layer), or names of layers.
        attention: ``blocks``, ``flex``, ``sdpa`` or ``eager``; ``auto`` is ``flex`` on a GPU, else ``blocks``, or the
            next of these that gives the right numbers.
        gradient_checkpointing: compute activations again in the backward pass.
        fast_linears: on a CPU in float32, use the faster of two libraries for products with frozen weights; the two
            are timed once on a machine.
        seed: of the adapters' first values.

    Raises:
        UserError: the model cannot be found, read, or used as asked.
    """
    for key, value in (
        ("dtype", dtype),
        ("quantization", quantization),
        ("finetune", finetune),
        ("attention", attention),
    ):
        if value not in CHOICES[key]:
            raise UserError(f"--{key}={value}: expected one of {', '.join(map(str, CHOICES[key]))}.")
    if quantization and finetune == "full":
        raise UserError("--finetune=full cannot train --quantization=4bit weights: use --finetune=lora.")
    dtype = dtype_of(dtype, device)
    # Not torch.manual_seed: it would seed every GPU as well, and peft fills new adapters on the CPU.
    with torch.random.fork_rng(devices=[]), _explained(llm):
        torch.default_generator.manual_seed(seed)
        model, tokenizer, revision = _load_base(llm, device, getattr(torch, dtype), quantization)
        model.config.use_cache = False
        choose_attention(model, attention, llm)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        context = _context(model, tokenizer)
        model.requires_grad_(finetune == "full")
        kernels = {"layers": DEFAULT, "head": DEFAULT}
        if fast_linears and not quantization:
            kernels = speed_up_linears(model)
        if finetune == "lora":
            lora = {"r": lora_r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
            model = _add_lora(model, {**lora, "target_modules": lora_target_modules})
    return LLM(model.eval(), tokenizer, llm, revision, context, dtype, str(device), kernels)


def dtype_of(dtype: str, device: torch.device) -> str:
    """The type of computation; ``auto`` is bfloat16 on a GPU that has it, else float32."""
    if dtype != "auto":
        return dtype
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if has_bfloat16 else "float32"


def _load_base(
    llm: str, device: torch.device, dtype: torch.dtype, quantization: str | None
) -> tuple[torch.nn.Module, Any, str]:
    if llm == "tiny":
        if quantization:
            raise UserError("--llm=tiny cannot be quantised: leave --quantization out.")
        model, tokenizer = tiny_llm()
        revision = digest(model.state_dict())[:16]
        return model.to(device, dtype), tokenizer, revision
    where = _locate(llm)
    _check_causal(llm, AutoConfig.from_pretrained(where, trust_remote_code=False))
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False}
    if quantization:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError("--quantization=4bit needs bitsandbytes: pip install 'recbole-llm[qlora]'")
        options["device_map"] = {"": str(device)}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model, found = AutoModelForCausalLM.from_pretrained(where, output_loading_info=True, **options)
    if found["missing_keys"] or model._hf_peft_config_loaded:
        lacks = ", ".join(sorted(found["missing_keys"])[:3]) or "an adapter lies over its base model"
        raise UserError(f"--llm={llm} is not a complete causal LM ({lacks}): give a base or a merged model.")
    if quantization and device.type == "cpu":
        for module in model.modules():
            module.support_avx512bf16_for_cpu = False  # see the head of this file
    tokenizer = _load_tokenizer(llm, where, model)
    config_file = cached_file(where, "config.json", local_files_only=True)
    return (model if quantization else model.to(device)), tokenizer, _fingerprint(Path(config_file).parent)


def _locate(llm: str) -> Path | str:
    """A folder, or a hub id as it is."""
    if llm in PACKAGED:
        return embedded_folder(llm)
    path = Path(llm).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return gguf_folder(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            has = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
            hint = "an adapter: give its base model" if (path / "adapter_config.json").is_file() else has
            raise UserError(f"--llm={llm} is a folder without config.json, so no model; it holds {hint}.")
        return path
    if path.exists() or path.suffix == ".gguf" or llm.startswith((".", "/", "~")) or llm.count("/") > 1:
        raise UserError(
            f"--llm={llm}: no such folder or .gguf file. Give embedded, tiny, a hub id (owner/model), a "
            "folder with config.json, or a .gguf file."
        )
    return llm


def _check_causal(llm: str, config: Any) -> None:
    names = config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "")]
    if config.is_encoder_decoder or not set(names) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        raise UserError(
            f"--llm={llm} is a {'/'.join(names) or config.model_type}, not a causal language model: it gives "
            "no log-probabilities of the next token. Choose one whose config.json names a ...ForCausalLM."
        )


def _load_tokenizer(llm: str, where: Path | str, model: torch.nn.Module) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise UserError(f"--llm={llm}: its tokenizer has no fast version (tokenizer.json), which is needed.")
    if tokenizer.eos_token is None:
        raise UserError(f"--llm={llm}: its tokenizer has no end-of-text token (eos_token), which is needed.")
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(f"--llm={llm}: {len(tokenizer)} tokens in its tokenizer, {rows} in the model.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _add_lora(model: torch.nn.Module, options: dict[str, Any]) -> PeftModel:
    try:
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    except ValueError as error:
        linear = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
        names = sorted({name.rpartition(".")[2] for name in linear})
        raise UserError(
            f"LoRA cannot be set up with --lora_r={options['r']} and --lora_target_modules="
            f"{options['target_modules']}: {error}. The model's linear layers are {', '.join(names)}."
        ) from error


def _context(model: torch.nn.Module, tokenizer: Any) -> int:
    config = model.config.get_text_config()
    keys = ("max_position_embeddings", "sliding_window", "attention_chunk_size")
    # Models without absolute positions (ALiBi, state space) set no limit of their own.
    return min(filter(None, (getattr(config, key, None) for key in keys)), default=tokenizer.model_max_length)


def _fingerprint(folder: Path) -> str:
    """16 hex digits over size and 256 spread samples of 16 KiB of each weights file: cheap at any size."""
    sha256 = hashlib.sha256()
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    for file in files:
        size = file.stat().st_size
        sha256.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            for k in range(256):
                stream.seek(size * k // 256)
                sha256.update(stream.read(1 << 14))
    return sha256.hexdigest()[:16]


@contextmanager
def _explained(llm: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"--llm={llm} does not fit into the GPU's memory. Use a smaller model, --dtype=bfloat16, or "
            "--quantization=4bit."
        ) from error
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:400]
        if "connect to" in reason and constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set and the hub's cache on this machine does not hold it"
        if "trust_remote_code" in str(error):
            reason = "it brings Python code of its own, which is never run here"
        raise UserError(
            f"--llm={llm} could not be loaded: {reason}. Give a hub id that this machine can reach or has in "
            "its cache (by `hf download`), a transformers folder, or --llm=embedded, which needs no hub."
        ) from error
