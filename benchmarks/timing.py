"""Timing of a jitted train step on random tokens, shared by the speed benchmarks."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from v3jax import objective
from v3jax.config import ExperimentConfig
from v3jax.state import init_state
from v3jax.step import make_train_step


@dataclass(frozen=True)
class Timing:
    """Seconds a step: median and minimum of the wall clock, median of the process's CPU time."""

    wall: float
    wall_min: float
    cpu: float
    compile_seconds: float


def time_step(cfg: ExperimentConfig, n_steps: int = 15, warmup: int = 3) -> Timing:
    """Times the experiment's own jitted step at its full batch, each step waited for."""
    tokens, segments = _random_batch(cfg)
    step = make_train_step(cfg)
    count = jnp.asarray(len(tokens), jnp.int32)
    state = init_state(cfg)

    def once() -> Any:
        nonlocal state
        state, metrics = step(state, tokens, segments, count)
        return metrics

    return _timed(once, n_steps, warmup)


def time_gradient(cfg: ExperimentConfig, n_steps: int = 15, warmup: int = 3) -> Timing:
    """Times forward and backward pass of one micro-batch, without the optimizer."""
    tokens, segments = (x[0] for x in _random_batch(cfg))
    state = init_state(cfg)
    one = jnp.ones(())
    scale = objective.Scale(n_targets=one, n_sequences=one, mtp_weight=one)

    @jax.jit
    def gradient(params: Any) -> Any:
        def loss(params: Any) -> Any:
            return objective.loss(cfg, params, state.router_state, tokens, segments, scale)

        return jax.grad(loss, has_aux=True)(params)

    return _timed(lambda: gradient(state.params), n_steps, warmup)


def _random_batch(cfg: ExperimentConfig) -> tuple[jax.Array, jax.Array]:
    """Tokens and segments `[M, B, S]` of a full batch."""
    n_micro = cfg.batch.end // cfg.batch.micro_batch
    shape = (n_micro, cfg.batch.micro_batch, cfg.data.seq_len + 1)
    ids = np.random.default_rng(0).integers(3, cfg.data.tokenizer_vocab_size, shape)
    return jnp.asarray(ids, jnp.int32), jnp.ones(shape, jnp.int32)


def _timed(once: Callable[[], Any], n_steps: int, warmup: int) -> Timing:
    start = time.perf_counter()
    jax.block_until_ready(once())
    compile_seconds = time.perf_counter() - start
    wall, cpu = [], []
    for _ in range(warmup + n_steps):
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        jax.block_until_ready(once())
        wall.append(time.perf_counter() - wall_start)
        cpu.append(time.process_time() - cpu_start)
    wall, cpu = wall[warmup:], cpu[warmup:]
    return Timing(statistics.median(wall), min(wall), statistics.median(cpu), compile_seconds)


def matmul_flops(dim: int = 2048, repeats: int = 10) -> float:
    """FP32 matrix-product FLOP/s of this machine right now: the limit a step is compared with."""
    a_DD = jax.random.normal(jax.random.key(0), (dim, dim))
    product = jax.jit(lambda a: a @ a)
    jax.block_until_ready(product(a_DD))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(product(a_DD))
        seconds.append(time.perf_counter() - start)
    return 2 * dim**3 / statistics.median(seconds)
