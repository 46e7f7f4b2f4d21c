"""Best-fit decreasing, step by step over every open bin (arXiv 2404.10830, algorithm 1)."""

from collections.abc import Sequence


def free_spaces(lengths: Sequence[int], capacity: int) -> list[int]:
    """What the bins have left, sorted: the longest item first, into the fullest bin that fits.

    Bins of equal space are interchangeable here, so the result does not depend on ties.
    """
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in spaces if space >= length]
        if fitting:
            spaces.remove(min(fitting))
            spaces.append(min(fitting) - length)
        else:
            spaces.append(capacity - length)
    return sorted(spaces)


def chunk_lengths(lengths: Sequence[int], capacity: int) -> list[int]:
    """Only what is longer than a row is cut: whole rows, then the rest."""
    chunks = []
    for length in lengths:
        whole, rest = divmod(length, capacity)
        chunks += [capacity] * whole + [rest] * (rest > 0)
    return chunks
