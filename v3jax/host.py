"""The host process: memory settings that make CPU steps faster, and where things are cached."""

import ctypes
import os
import sys
from pathlib import Path

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


def cache_folder() -> Path:
    """Where tokenizers, rows and compiled programs are kept: `V3JAX_CACHE` or `~/.cache/v3jax`."""
    return Path(os.environ.get("V3JAX_CACHE") or Path.home() / ".cache" / "v3jax")


def prepare() -> None:
    """What a program that computes does first: memory, and compiled programs that are kept."""
    reuse_freed_memory()
    import jax  # starts no threads yet

    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
