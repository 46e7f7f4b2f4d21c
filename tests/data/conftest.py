from pathlib import Path

import pytest

from tests.data import small


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources of texts and room for a cache."""
    root = tmp_path_factory.mktemp("home")
    small.write_three(root)
    return root
