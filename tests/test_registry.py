"""Finding experiments by name and in a user's own file."""

from pathlib import Path

import pytest

from v3jax import registry

USER_FILE = '''
"""A user's own experiments."""

from dataclasses import replace

from experiments.tiny import v3_tiny
from v3jax.config import ExperimentConfig
from v3jax.registry import register


@register
def first() -> ExperimentConfig:
    return replace(v3_tiny(), name="first")


@register
def second() -> ExperimentConfig:
    """The second one."""
    return replace(v3_tiny(), name="second")
'''


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps what a test's user files register from other tests."""
    registry.load()
    monkeypatch.setattr(registry, "_EXPERIMENTS", dict(registry._EXPERIMENTS))


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(USER_FILE)
    return path


def test_shipped_experiments_are_listed_sorted_and_described() -> None:
    names = registry.names()
    assert names == sorted(names)
    assert {"v3_full", "v3_small", "v3_tiny", "v3_peer"} <= set(names)
    assert all(registry.describe(name) for name in names)


def test_unknown_experiment_suggests_the_closest() -> None:
    with pytest.raises(ValueError, match=r"no experiment 'v3_tinny'; did you mean v3_tiny"):
        registry.get("v3_tinny")


def test_unlike_anything_lists_all() -> None:
    with pytest.raises(ValueError, match=r"v3_full.*v3_tiny"):
        registry.get("zzzzzzzz")


def test_user_file_gives_its_last_experiment_or_the_one_picked(user_file: Path) -> None:
    assert registry.get(str(user_file)).name == "second"
    assert registry.get(f"{user_file}:first").name == "first"


def test_user_file_is_read_anew_each_time(user_file: Path) -> None:
    registry.get(str(user_file))
    user_file.write_text(USER_FILE.replace("second", "third"))
    assert registry.get(str(user_file)).name == "third"
    with pytest.raises(ValueError, match="no experiment 'second'"):
        registry.get(f"{user_file}:second")


def test_user_file_without_that_experiment(user_file: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no experiment 'third' in this file; it has first, second"
    ):
        registry.get(f"{user_file}:third")


def test_missing_user_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.py: no such file"):
        registry.get(str(tmp_path / "nowhere.py"))


def test_user_file_that_registers_nothing(tmp_path: Path) -> None:
    path = tmp_path / "empty.py"
    path.write_text("x = 1\n")
    with pytest.raises(ValueError, match="registers no experiment; put @register on a function"):
        registry.get(str(path))


def test_user_file_that_does_not_parse(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("x = 1\ndef f(:\n")
    with pytest.raises(ValueError, match=r"broken\.py: .* at line 2"):
        registry.get(str(path))


def test_user_file_cannot_redefine_a_shipped_experiment(tmp_path: Path) -> None:
    path = tmp_path / "clash.py"
    path.write_text(USER_FILE.replace("def second", "def v3_full"))
    with pytest.raises(ValueError, match=r"'v3_full' of .* is already defined in experiments\.v3"):
        registry.get(str(path))


@pytest.mark.parametrize(
    ("code", "named"),
    [
        ("import no_such_package\n", r"line 1: ModuleNotFoundError: No module named 'no_such"),
        (
            USER_FILE.replace("    return", "    {}['lost']\n    return"),
            r"line \d+: KeyError: 'lost'",
        ),
    ],
)
def test_user_file_that_raises(tmp_path: Path, code: str, named: str) -> None:
    path = tmp_path / "raises.py"
    path.write_text(code)
    with pytest.raises(ValueError, match=rf"raises\.py: {named}"):
        registry.get(str(path))


def test_two_user_files_may_use_one_name(user_file: Path, tmp_path: Path) -> None:
    registry.get(str(user_file))
    other = tmp_path / "other.py"
    other.write_text(USER_FILE)
    assert registry.get(str(other)).name == "second"
    assert registry.get(f"{user_file}:first").name == "first"
