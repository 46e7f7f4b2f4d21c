"""Schedules by their number of stages, for tests."""

from v3jax.pipeline.schedule import SCHEDULES, Schedule


def made(name: str, stages: int, n_micro: int) -> Schedule:
    """`dualpipev` has two stages of one direction on each rank."""
    return SCHEDULES[name](stages // 2 if name == "dualpipev" else stages, n_micro)
