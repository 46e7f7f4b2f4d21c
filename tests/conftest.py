"""Eight CPU devices for every test, set before jax wakes, and caches of the session's own.

xdist's workers and the programs that tests start inherit these variables, so a tokenizer trained
or a step compiled once serves the whole session, and nothing outside it is read or written.
"""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.flags import xla_flags

_OWN_CACHE = "V3JAX_CACHE" not in os.environ

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = xla_flags(8, os.environ.get("XLA_FLAGS", ""))
if _OWN_CACHE:
    os.environ["V3JAX_CACHE"] = tempfile.mkdtemp(prefix="v3jax-tests-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["V3JAX_CACHE"] + "/compiled"


@pytest.fixture(scope="session")
def repo() -> Path:
    """The repository's root."""
    return Path(__file__).parents[1]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes the cache made above, in the process that made it."""
    if _OWN_CACHE and not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["V3JAX_CACHE"], ignore_errors=True)
