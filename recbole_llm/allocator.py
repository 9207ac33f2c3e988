"""What the C library does with memory that torch frees on a CPU."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of mallopt (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MOST = 2**31 - 1  # mallopt takes a C int
# What a user may have set for the whole process.
BY_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
# Where glibc's own adjusting ends once a large block was freed; setting anything turns that adjusting off.
USUAL_MMAP = 32 * 2**20
USUAL_TRIM = 2 * USUAL_MMAP


@contextmanager
def freed_memory_kept() -> Iterator[bool]:
    """Inside, blocks that are freed stay with the process, for the next batch.

    A batch of a recommender takes and frees blocks of up to hundreds of MiB. glibc returns each to the kernel,
    which hands it out again page by page, zeroed: up to half of a training step. Numbers are the same; the process
    holds its peak until the end, when all that is free is returned.

    Yields:
        Whether it is so: nothing is done with another C library than glibc, or where the environment sets
        `MALLOC_MMAP_THRESHOLD_`, `MALLOC_TRIM_THRESHOLD_` or `GLIBC_TUNABLES` (docs/plan.md: to save memory).
    """
    library = ctypes.CDLL(None)
    glibc = hasattr(library, "mallopt") and hasattr(library, "malloc_trim")  # macOS and musl have neither
    if not glibc or any(name in os.environ for name in BY_USER):
        yield False
        return
    kept = library.mallopt(M_MMAP_THRESHOLD, MOST) == 1 and library.mallopt(M_TRIM_THRESHOLD, MOST) == 1
    try:
        yield kept
    finally:
        library.mallopt(M_MMAP_THRESHOLD, USUAL_MMAP)
        library.mallopt(M_TRIM_THRESHOLD, USUAL_TRIM)
        library.malloc_trim(0)
