"""Timing of a jitted train step on random tokens, shared by the speed benchmarks."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from v3jax import objective
from v3jax.config import ExperimentConfig
from v3jax.sharding import BATCH_AXES
from v3jax.state import init_state
from v3jax.step import amount_of, amount_specs, make_train_step


@dataclass(frozen=True)
class Timing:
    """Seconds a step: median and minimum of the wall clock, median of the process's CPU time."""

    wall: float
    wall_min: float
    cpu: float
    compile_seconds: float


def time_step(
    cfg: ExperimentConfig, n_steps: int = 15, warmup: int = 3, mesh: Mesh | None = None
) -> Timing:
    """Times the experiment's own jitted step at its full batch, each step waited for."""
    return _timed(stepper(cfg, mesh), n_steps, warmup)


def stepper(cfg: ExperimentConfig, mesh: Mesh | None = None) -> Callable[[], Any]:
    """A function that takes one more step each time, on a batch placed over the mesh if any."""
    tokens, segments = _random_batch(cfg)
    amount = jax.tree.map(jnp.asarray, amount_of(cfg, len(tokens)))
    step, state = make_train_step(cfg, mesh), init_state(cfg, mesh)
    if mesh is not None:
        place = NamedSharding(mesh, P(None, BATCH_AXES))
        tokens, segments = jax.device_put((tokens, segments), place)
        places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), amount_specs(cfg))
        amount = jax.device_put(amount, places)

    def once() -> Any:
        nonlocal state
        state, metrics = step(state, tokens, segments, amount)
        return metrics

    def once_on_mesh() -> Any:
        assert mesh is not None
        with jax.set_mesh(mesh):
            return once()

    return once if mesh is None else once_on_mesh


def time_by_turns(
    steppers: Mapping[str, Callable[[], Any]], n_steps: int = 15, warmup: int = 3
) -> dict[str, Timing]:
    """Times several programs, one step of each in turn, so that all meet the same neighbours."""
    compiled, stamps = {}, {name: [] for name in steppers}
    for name, once in steppers.items():
        start = time.perf_counter()
        jax.block_until_ready(once())
        compiled[name] = time.perf_counter() - start
    for i in range(warmup + n_steps):
        for name, once in steppers.items():
            took = _once(once)
            if i >= warmup:
                stamps[name].append(took)
    return {name: _timing(stamps[name], compiled[name]) for name in steppers}


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
    return time_by_turns({"": once}, n_steps, warmup)[""]


def _once(once: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds of one step."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(once())
    return time.perf_counter() - wall, time.process_time() - cpu


def _timing(stamps: list[tuple[float, float]], compile_seconds: float) -> Timing:
    wall, cpu = zip(*stamps, strict=True)
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
