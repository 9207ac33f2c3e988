"""Files are written whole or not at all; a folder that several processes fill is filled by one at a time."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file

from recbole_llm.costs import waiting
from recbole_llm.distributed import is_first
from recbole_llm.errors import UserError


def content_hash(value: Any) -> str:
    """SHA-256 of anything JSON-able, keys sorted; other objects by their text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def stamp(file: Path) -> tuple[int, int]:
    """Time of the last change (ns) and size (bytes): while both stay, what was read of the file holds."""
    told = file.stat()
    return told.st_mtime_ns, told.st_size


def make_stage_folder(folder: Path) -> Path:
    """The folder, made where it is not there.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--checkpoint_dir: cannot make {folder} ({error}). Name a folder that can be written."
        ) from error
    return folder


@contextmanager
def only_here(folder: Path) -> Iterator[None]:
    """Hold a folder that other processes may want to fill too; where one does, say so and wait until it is done.

    Who holds it may hold it again. The lock goes with its process, so a killed one holds nothing.
    Of the processes of one run the first holds it for all.

    Raises:
        UserError: the folder cannot be made.
    """
    if not is_first():
        yield
        return
    with held(make_stage_folder(folder).resolve() / ".lock", folder):
        yield


@contextmanager
def held(file: Path, what: Path) -> Iterator[None]:
    """Hold a lock file, which stays there: who waited for one that was removed would hold nothing.

    Raises:
        UserError: it cannot be opened.
    """
    # One lock object for each file in a process: it counts how often its thread holds it.
    lock = FileLock(file, is_singleton=True)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"Waiting for {what}: another process works there.", flush=True)
            with waiting():
                lock.acquire()
    except OSError as error:
        raise UserError(
            f"--checkpoint_dir: cannot open {file} ({error}). Name a folder that can be written."
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def whole(file: Path, *, shared: bool = False) -> Iterator[Path]:
    """A path beside ``file`` to write to; it takes the file's place when all went well, and is removed else.

    Args:
        shared: several processes may write the file at a time, each beside by a name of its own. Else what a killed
            process left there is written over.
    """
    beside = file.with_name(f"{file.name}.{os.getpid()}.tmp" if shared else f"{file.name}.tmp")
    try:
        yield beside
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write a whole file or none: beside, to disk, then renamed."""
    with whole(file, shared=True) as beside, open(beside, "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())


def write_tensors(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all, to disk; who may read it is as for any other new file."""
    with whole(file) as beside:
        beside.unlink(missing_ok=True)
        beside.touch()
        mode = beside.stat().st_mode
        save_file(tensors, beside, metadata=metadata)
        beside.chmod(mode)  # safetensors lets the owner alone read it
        to_disk(beside)


def to_disk(file: Path) -> None:
    """Force a written file to the disk: what is renamed or written after it is there after it."""
    with open(file, "rb+") as written:  # Windows forces to the disk what is open for writing alone
        os.fsync(written.fileno())


def write_json(file: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(file, json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")


def finished_stage(folder: Path) -> dict[str, Any] | None:
    """The record of the stage in a folder, by this run or another; None where it is not finished."""
    done = folder / "stage.json"
    return json.loads(done.read_text(encoding="utf-8")) if done.is_file() else None


def found_or_made(folder: Path, make: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], bool]:
    """The record of a stage, which lies in its folder when the stage is finished, and whether it lay there.

    Args:
        make: does the stage and gives its record; meanwhile no other process works there.
    """
    with only_here(folder):
        if (finished := finished_stage(folder)) is not None:
            return finished, True
        record = make()
        write_json(folder / "stage.json", record)
        return record, False


def write_table(file: Path, table: pd.DataFrame) -> None:
    """Write a gzipped CSV, whole or not at all; the same table gives the same bytes."""
    with whole_gzip(file) as out:
        table.to_csv(out, index=False, float_format="%.10g")


@contextmanager
def whole_gzip(file: Path) -> Iterator[gzip.GzipFile]:
    """A gzipped file to write to, whole or not at all; without its name and time: the same text is the same bytes."""
    with whole(file, shared=True) as beside, open(beside, "wb") as raw:
        with gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as out:
            yield out
        raw.flush()
        os.fsync(raw.fileno())  # result.json, which says that the run is whole, is on the disk after it


def plain(value: Any) -> Any:
    """Numbers, texts, lists and dicts of them; everything else as text."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(v) for v in value]
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        return value.item()
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
