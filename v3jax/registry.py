"""Experiments by name: `@register` on a function that returns an `ExperimentConfig`."""

import difflib
import importlib
import importlib.util
import pkgutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from v3jax.config import ExperimentConfig

ExperimentFn = Callable[[], ExperimentConfig]
_EXPERIMENTS: dict[str, ExperimentFn] = {}
_USER_MODULE = "v3jax_user_experiment_"


def register(fn: ExperimentFn) -> ExperimentFn:
    """Makes `fn` known under its own name; a second function of that name is refused."""
    name = fn.__name__
    known = _EXPERIMENTS.get(name)
    if known is not None and known.__module__ != fn.__module__:
        raise ValueError(
            f"experiment {name!r} of {fn.__module__} is already defined in {known.__module__}"
        )
    _EXPERIMENTS[name] = fn
    return fn


def load(package: str = "experiments") -> None:
    """Imports every module of `package`, so that its experiments register."""
    root = importlib.import_module(package)
    for info in pkgutil.walk_packages(root.__path__, f"{package}."):
        importlib.import_module(info.name)


def names() -> list[str]:
    """The names of all registered experiments, sorted."""
    load()
    return sorted(_EXPERIMENTS)


def get(name: str) -> ExperimentConfig:
    """The experiment called `name`, or the last one that a file `path/to/my.py` registers.

    `path/to/my.py:fn` picks one function of a file that registers several.

    Raises:
      ValueError: no such experiment (with the closest names), no such file, or a file that
        registers nothing.
    """
    load()
    path, _, pick = name.partition(":")
    if path.endswith(".py"):
        return _from_file(Path(path), pick)
    if name not in _EXPERIMENTS:
        close = difflib.get_close_matches(name, _EXPERIMENTS, n=3) or sorted(_EXPERIMENTS)
        raise ValueError(
            f"no experiment {name!r}; did you mean {', '.join(close)}? (--list shows all)"
        )
    return _EXPERIMENTS[name]()


def describe(name: str) -> str:
    """First line of the experiment's docstring."""
    return (_EXPERIMENTS[name].__doc__ or "").strip().split("\n")[0]


def _from_file(path: Path, pick: str) -> ExperimentConfig:
    if not path.is_file():
        raise ValueError(f"--exp {path}: no such file")
    module_name = f"{_USER_MODULE}{path.stem}"
    for known, fn in list(_EXPERIMENTS.items()):
        if fn.__module__.startswith(_USER_MODULE):
            del _EXPERIMENTS[known]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"--exp {path}: {_where(error, path)}") from error
    found = [n for n, fn in _EXPERIMENTS.items() if fn.__module__ == module_name]
    if not found:
        raise ValueError(f"--exp {path}: registers no experiment; put @register on a function")
    chosen = pick or found[-1]
    if chosen not in found:
        raise ValueError(
            f"--exp {path}: no experiment {chosen!r} in this file; it has {', '.join(found)}"
        )
    try:
        return _EXPERIMENTS[chosen]()
    except Exception as error:
        raise ValueError(f"--exp {path}: {_where(error, path)}") from error


def _where(error: Exception, path: Path) -> str:
    """One line: the error and the last line of the file that led to it."""
    if isinstance(error, SyntaxError):
        return f"{error.msg} at line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    text = " ".join(str(error).split()) or "no message"
    return f"line {lines[-1] if lines else '?'}: {type(error).__name__}: {text}"
