"""What all programs do with their command lines: a mistake is one line on stderr."""

import functools
import sys
from collections.abc import Callable, Sequence

from absl import app, flags

USAGE, UNUSABLE = 2, 1
"""Exit codes: a mistake in the call; something named in it that cannot be used."""


def fail(program: str, error: object, code: int) -> int:
    """Prints the first line of `error` under the program's name; returns `code`."""
    line = str(error).strip().split("\n")[0]
    print(f"v3jax.{program}: {line}", file=sys.stderr, flush=True)
    return code


def run(program: str, main: Callable[[Sequence[str]], int]) -> None:
    """Parses the flags, runs `main` on what is left, and exits with what it returns."""
    app.run(main, flags_parser=functools.partial(_parse, program))


def _parse(program: str, argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(fail(program, " ".join(str(error).split()), USAGE))
