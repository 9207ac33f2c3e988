"""What weights were trained over: base weights, tokenizer and chat template, told apart by fingerprints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recbole_llm.data.prompt import plain_tokens
from recbole_llm.errors import UserError
from recbole_llm.files import content_hash
from recbole_llm.llm.types import LLM

if TYPE_CHECKING:
    from recbole_llm.data.pair_prompt import PairPrompt
    from recbole_llm.data.prompt import Prompt

# Where tokenizers differ: blanks, digits, accents, other scripts, what special tokens look like.
PROBES = (
    "Toy Story (1995)",
    "  two  blanks\n\nand lines\t",
    "3.14159 and 1,000,000",
    "Amélie, Ångström; naïve café",
    "千と千尋の神隠し",
    "Сталкер",
    "كفرناحوم",
    "🎬🍿",
    "don't they're I'LL",
    "<|im_start|>user</s>[INST]<s><|endoftext|>",
    "def f(x): return {x: [1, 2]}",
)
PARTS = {"revision": "weights", "tokenizer": "a tokenizer", "chat_template": "a chat template"}
# What names stages. The configuration refuses no adapter: another release of transformers writes it otherwise.
NAMES_STAGES = (*PARTS, "config")
# Of a configuration: how a model is run, and by whom it was written, not what it computes.
HOW_IT_RUNS = {"architectures", "attn_implementation", "dtype", "torch_dtype", "pad_token_id", "quantization_config"}
HOW_IT_RUNS |= {"transformers_version", "use_cache"}


def identity(llm: LLM) -> dict[str, str]:
    """Name of an LLM, and 16 hex digits each over base weights, tokenisation of ``PROBES``, chat template, and what its
    configuration says of what it computes.
    """
    tokenizer, probes = llm.tokenizer, list(PROBES)
    read = [plain_tokens(tokenizer, probes), tokenizer(probes)["input_ids"]]
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)]
    return {
        "llm": llm.name,
        "revision": llm.revision,
        "tokenizer": _hash([read, ends]),
        "chat_template": _hash(tokenizer.chat_template),
        "config": content_hash(_computes(llm.model.config.to_dict()))[:16],
    }


def _computes(config: Any) -> Any:
    """A configuration, its parts too, without ``HOW_IT_RUNS`` and dropout, which is switched off."""
    if not isinstance(config, dict):
        return config
    named = {str(key): value for key, value in config.items()}
    return {k: _computes(v) for k, v in named.items() if k[:1] != "_" and k not in HOW_IT_RUNS and "drop" not in k}


def check_identity(found: Mapping[str, str], llm: LLM, what: str, instead: str) -> None:
    """Whether something was made over this LLM; parts that an older version did not keep are not asked for.

    Args:
        found: what ``identity`` gave then.
        what: was made, as in "the adapter in saved/...".
        instead: what to do where it was not.

    Raises:
        UserError: names both.
        KeyError: ``found`` names no LLM or no weights.
    """
    now = identity(llm)
    for part, told in PARTS.items():
        then = found[part] if part == "revision" else found.get(part, now[part])
        if then != now[part]:
            raise UserError(
                f"{what} was trained over {found['llm']} ({told} {then}); --llm={llm.name} has other "
                f"{told.removeprefix('a ')} ({now[part]}). {instead}"
            )


def local_weights(llm: str) -> str | None:
    """Fingerprint of what lies at a path: weights, tokenizer, configuration; None where ``llm`` is no path."""
    path = Path(llm).expanduser()
    if path.is_file():
        return fingerprint([path])
    if not path.is_dir():
        return None
    small = [file for pattern in ("*.json", "*.jinja", "*.model", "*.txt") for file in sorted(path.glob(pattern))]
    return _hash([fingerprint(weights_of(path)), [[f.name, hashlib.sha256(f.read_bytes()).hexdigest()] for f in small]])


def weights_of(folder: Path) -> list[Path]:
    """The weights files of a transformers folder."""
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def fingerprint(files: list[Path]) -> str:
    """16 hex digits over size and 256 spread samples of 16 KiB of each file: cheap at any size."""
    sha256 = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        sha256.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            for k in range(256):
                stream.seek(size * k // 256)
                sha256.update(stream.read(1 << 14))
    return sha256.hexdigest()[:16]


def prompt_hash(prompt: Prompt | PairPrompt) -> str:
    """16 hex digits over the tokens of a catalogue as the LLM reads it: frame, history lines and answers."""
    return _hash([prompt.prefix, prompt.suffix, prompt.lines, prompt.answers])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
