"""From a name (packaged, hub, folder, GGUF) to the weights and the tokenizer of a causal LM, as they are."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import cached_file

from recbole_llm.errors import NotAtHand, UserError
from recbole_llm.llm.adapter import digest
from recbole_llm.llm.embedded import PACKAGED, embedded_folder, gguf_folder
from recbole_llm.llm.hub_access import hub_answers
from recbole_llm.llm.identity import fingerprint, weights_of
from recbole_llm.llm.tiny import tiny_llm
from recbole_llm.llm.types import CausalLM


def load_base(
    llm: str, device: torch.device, dtype: torch.dtype, quantization: str | None
) -> tuple[CausalLM, Any, str]:
    """Model, tokenizer and revision, as ``load_llm`` takes its arguments.

    Raises:
        UserError: no bitsandbytes for 4-bit weights, or no complete causal LM with a fast tokenizer.
    """
    if llm == "tiny":
        if quantization:
            raise UserError("--llm=tiny cannot be quantised: leave --quantization out.")
        model, tokenizer = tiny_llm()
        revision = digest(model.state_dict())[:16]
        return model.to(device, dtype), tokenizer, revision
    where = locate(llm)
    offline = isinstance(where, str) and not hub_answers()
    plain: dict[str, Any] = {"trust_remote_code": False, "local_files_only": offline}
    check_causal(llm, AutoConfig.from_pretrained(where, **plain))
    options: dict[str, Any] = {"dtype": dtype, **plain}
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
    tokenizer = load_tokenizer(llm, where, model, offline)
    config_file = cached_file(where, "config.json", local_files_only=True)
    return (model if quantization else model.to(device)), tokenizer, fingerprint(weights_of(Path(config_file).parent))


def locate(llm: str) -> Path | str:
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
        raise NotAtHand(
            f"--llm={llm}: no such folder or .gguf file. Give {', '.join(PACKAGED)}, tiny, a hub id (owner/model), "
            "a folder with config.json, or a .gguf file."
        )
    return llm


def check_causal(llm: str, config: Any) -> None:
    """Raises ``UserError`` where a configuration is not that of a causal LM."""
    names = config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "")]
    if config.is_encoder_decoder or not set(names) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        raise UserError(
            f"--llm={llm} is a {'/'.join(names) or config.model_type}, not a causal language model: it gives "
            "no log-probabilities of the next token. Choose one whose config.json names a ...ForCausalLM."
        )


def load_tokenizer(llm: str, where: Path | str, model: CausalLM, offline: bool = False) -> Any:
    """A fast tokenizer with end-of-text and padding tokens, whose tokens the model has; ``UserError`` otherwise."""
    tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, local_files_only=offline)
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


def context_of(model: CausalLM, tokenizer: Any) -> int:
    """The most tokens in a sequence: positions, or the sliding window where there is one."""
    config = model.config.get_text_config()
    keys = ("max_position_embeddings", "sliding_window", "attention_chunk_size")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # beyond, one long sequence changes the positions of all others in its pass
        return min(rope["original_max_position_embeddings"], config.max_position_embeddings)
    # Models without absolute positions (ALiBi, state space) set no limit of their own.
    return min(filter(None, (getattr(config, key, None) for key in keys)), default=tokenizer.model_max_length)


@contextmanager
def explained_load(llm: str) -> Iterator[None]:
    """Around the loading of an LLM: what libraries raise becomes a ``UserError`` that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"--llm={llm} does not fit into the GPU's memory. Use a smaller model, --dtype=bfloat16, or "
            "--quantization=4bit."
        ) from error
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError, UnpicklingError) as error:
        reason = " ".join(str(error).split())[:400]
        if "connect to" in reason and constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set and the hub's cache on this machine does not hold it"
        elif "connect to" in reason:
            reason = f"{constants.ENDPOINT} cannot be reached and the hub's cache on this machine does not hold it"
        if "trust_remote_code" in str(error):
            reason = "it brings Python code of its own, which is never run here"
        if isinstance(error, UnpicklingError):
            reason = "its weights are a pickle of more than tensors, which is never run here"
        raise NotAtHand(
            f"--llm={llm} could not be loaded: {reason}. Give a hub id that this machine can reach or has in "
            "its cache (by `hf download`), a transformers folder, or --llm=embedded, which needs no hub."
        ) from error
