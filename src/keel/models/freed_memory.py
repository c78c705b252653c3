"""What glibc does with memory that tensors on the CPU leave behind."""

from __future__ import annotations

import contextlib
import ctypes
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # mallopt(3)


@cache
def keep_freed_memory() -> bool:
    """Let glibc keep what tensors on the CPU leave behind instead of giving it back to the system and asking
    for it again at every step, page by page. For the rest of the process; False where there is no glibc.
    `give_back_freed_memory` gives back what there is."""
    mallopt = getattr(_libc(), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def give_back_freed_memory() -> None:
    """Let the system have what `keep_freed_memory` kept so far, for what does not come from the heap: a file
    of weights that is mapped."""
    if (trim := getattr(_libc(), "malloc_trim", None)) is not None:
        trim(0)


def _libc() -> ctypes.CDLL | None:
    with contextlib.suppress(OSError, TypeError):  # there is no such thing on other systems
        return ctypes.CDLL(None)
    return None
