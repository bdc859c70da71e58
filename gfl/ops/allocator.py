"""Freed memory of the CPU: kept for the next step, or returned to the kernel.

With glibc; other allocators are left as they are.
"""

import ctypes
import sys
from collections.abc import Callable

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
"""Of `mallopt(3)`."""

KEEPING = {
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_ARENA_MAX": "1",
}
"""The environment that does what `keep_freed_memory` does, also for threads that are there already
when it is called, as Ray's are."""


def keep_freed_memory() -> None:
    """Tell glibc to return no freed memory to the kernel, for new pages cost more than a copy.

    By default, it returns large blocks, and every step would have its maps of features anew, page
    by page.
    """
    mallopt = _glibc("mallopt")
    mallopt(TRIM_THRESHOLD, -1)
    mallopt(MMAP_MAX, 0)
    mallopt(ARENA_MAX, 1)


def return_freed_memory() -> None:
    """Return what is freed by now, so that resident memory is what is in use."""
    _glibc("malloc_trim")(0)


def _glibc(name: str) -> Callable[..., object]:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return getattr(library, name, lambda *_: None)
