"""Schedules of a run: learning rate, batch size, and anything piecewise constant over tokens.

Report section 4.2. Warm-up counts committed optimizer steps, everything else tokens consumed.
Device-side schedules are traced once and take scalars; host-side ones use Python numbers, which
hold 14.8e12 tokens exactly. A step's values are those of the counts *before* it: the first step
sees step 0 and 0 tokens.

The report says only that the batch grows "gradually"; linear in tokens, rounded to the nearest
whole number of micro-batches, is ours.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from v3jax.config import BatchConfig, ExperimentConfig, LrPhase, OptimConfig, Schedule

TokenSchedule = Callable[[jax.Array], jax.Array]


def tokens_of(sequences: jax.Array, seq_len: int) -> jax.Array:
    """Tokens in `sequences` (uint32 scalar) as an FP32 scalar, exact to 6e-8 relative.

    At 14.8e12 tokens that is half a million, against 63 million in one step of the full run.
    """
    return sequences.astype(jnp.float32) * seq_len


def learning_rate(cfg: OptimConfig) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The rate at `(step, tokens)`: linear warm-up in steps times the phases in tokens.

    Source: report section 4.2. `step` is an int32 scalar, `tokens` FP32, the result FP32.
    """
    warmup = optax.linear_schedule(0.0, 1.0, cfg.warmup_steps) if cfg.warmup_steps else _one
    starts = [0.0, *(phase.until_tokens for phase in cfg.phases)]
    previous = [cfg.phases[0].lr, *(phase.lr for phase in cfg.phases)]
    phases = [
        _phase(phase, start, before)
        for phase, start, before in zip(cfg.phases, starts, previous, strict=False)
    ]
    over_tokens = _joined(phases, starts[1:-1])

    def schedule(step: jax.Array, tokens: jax.Array) -> jax.Array:
        with jax.named_scope("learning_rate"):
            return jnp.asarray(warmup(step) * over_tokens(tokens), jnp.float32)

    return schedule


def _one(_: jax.typing.ArrayLike) -> float:
    return 1.0


def _joined(schedules: list[optax.Schedule], boundaries: list[Any]) -> optax.Schedule:
    """optax annotates its counts as int; token counts are floats, which int32 could not hold."""
    return optax.join_schedules(schedules, boundaries)


def _phase(phase: LrPhase, start_tokens: float, previous_lr: float) -> optax.Schedule:
    """One phase as a function of the tokens since its start."""
    if phase.shape == "constant":
        return optax.constant_schedule(phase.lr)
    length: Any = phase.until_tokens - start_tokens
    return optax.cosine_decay_schedule(previous_lr, length, alpha=phase.lr / previous_lr)


def piecewise(schedule: Schedule) -> TokenSchedule:
    """Value `i` while tokens < `until_i`, the last value from there on; FP32 scalars."""
    untils = [until for until, _ in schedule]
    joined = _joined([optax.constant_schedule(value) for _, value in schedule], untils[:-1])
    return lambda tokens: jnp.asarray(joined(tokens), jnp.float32)


def batch_size(cfg: BatchConfig, tokens: float) -> int:
    """Sequences of the step that starts after `tokens`: linear from `start` to `end`."""
    if tokens >= cfg.ramp_tokens:
        return cfg.end
    exact = cfg.start + (cfg.end - cfg.start) * tokens / cfg.ramp_tokens
    return cfg.micro_batch * math.floor(exact / cfg.micro_batch + 0.5)


def batch_plan(cfg: ExperimentConfig) -> Iterator[int]:
    """Sequences of each step until `run.total_tokens` is reached; the last step is a whole one."""
    sequences = 0
    while sequences * cfg.data.seq_len < cfg.run.total_tokens:
        size = batch_size(cfg.batch, sequences * cfg.data.seq_len)
        yield size
        sequences += size


def n_steps(cfg: ExperimentConfig) -> int:
    """Steps of `batch_plan`, walked only as far as the ramp goes."""
    steps = sequences = 0
    for size in batch_plan(cfg):
        if size == cfg.batch.end:
            break
        steps += 1
        sequences += size
    remaining = max(0.0, cfg.run.total_tokens - sequences * cfg.data.seq_len)
    return steps + math.ceil(remaining / (cfg.batch.end * cfg.data.seq_len))
