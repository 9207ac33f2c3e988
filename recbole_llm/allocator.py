"""What the C library does with memory that torch frees on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of mallopt (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MOST = 2**31 - 1  # mallopt takes a C int
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
        Whether it is so: with another C library than glibc nothing is done.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):  # macOS, musl
        yield False
        return
    kept = library.mallopt(M_MMAP_THRESHOLD, 2**30) == 1 and library.mallopt(M_TRIM_THRESHOLD, MOST) == 1
    try:
        yield kept
    finally:
        library.mallopt(M_MMAP_THRESHOLD, USUAL_MMAP)
        library.mallopt(M_TRIM_THRESHOLD, USUAL_TRIM)
        library.malloc_trim(0)
