"""The host process: memory settings that make CPU steps faster."""

import ctypes
import sys

# <malloc.h> of glibc
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def reuse_freed_memory() -> bool:
    """Keeps freed memory in the process, so that a step does not fault its buffers in again.

    XLA on CPU allocates a step's temporaries afresh; glibc gives blocks that large back to the
    system at once, and a fifth of a small model's step went to page faults. Call it before jax
    starts its threads. Returns whether the C library took the settings (glibc on Linux does).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1))
    return all(mallopt(option, value) == 1 for option, value in settings)
