"""Whether large results get fresh pages of the system, as glibc gives them, or those of the results before."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# Of <malloc.h>.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4


def can_keep_pages() -> bool:
    """Whether the C library has such a setting: glibc has."""
    return hasattr(ctypes.CDLL(None), "mallopt")


@contextmanager
def kept_pages() -> Iterator[None]:
    """Freed memory stays with the process, as with MALLOC_MMAP_MAX_=0 and a MALLOC_TRIM_THRESHOLD_ of 2 GiB.

    Without it a tensor of more than 32 MiB is a mapping of its own: each of its pages is faulted in at its first touch,
    in every call anew, which can take longer than what is computed. Afterwards the thresholds are those that glibc
    arrives at by itself once such a tensor was freed.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_MAX, 1 << 16)
        libc.mallopt(_MMAP_THRESHOLD, 1 << 25)
        libc.mallopt(_TRIM_THRESHOLD, 1 << 26)
        libc.malloc_trim(0)
