"""Rows sent between devices, against NumPy that follows each of them.

Dims: P devices, S slots of a device, C = P S bins, N rows, D features.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from v3jax.config import MeshConfig
from v3jax.ops.dispatch import n_blocks_for
from v3jax.ops.exchange import (
    Chunks,
    _pick_from_all,
    exchange,
    exchange_back,
    make_route,
)
from v3jax.sharding import make_mesh

N_SENT, WIDTH = 12, 3


def loads(n_devices: int, n_slots: int, pattern: str) -> np.ndarray:
    """Rows of every device for every bin, `[P, C]`, at most `N_SENT` a device."""
    rng = np.random.default_rng(n_devices * n_slots)
    bins = n_devices * n_slots
    load = np.zeros((n_devices, bins), np.int32)
    for sender in range(n_devices):
        n_rows = N_SENT if pattern == "even" else rng.integers(0, N_SENT + 1)
        chosen = {
            "random": rng.integers(0, bins, n_rows),
            "even": np.arange(n_rows) % bins,
            "last": np.full(n_rows, bins - 1),
        }[pattern]
        np.add.at(load[sender], chosen, 1)
    return load


def over_devices(n_devices: int, fn: Any, *arrays: np.ndarray) -> Any:
    """`fn` as every device's program along `expert`, first axis split."""
    mesh = make_mesh(MeshConfig(expert=n_devices))
    split = P("expert")

    def one(*parts: jax.Array) -> Any:
        return jax.tree.map(lambda x: x[None], fn(*[p[0] for p in parts]))

    run = jax.shard_map(one, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    return jax.device_get(jax.jit(run)(*arrays))


def sent_rows(n_devices: int) -> np.ndarray:
    """Rows that tell where they are from, and are never 0."""
    rows = 1 + np.arange(n_devices * N_SENT * WIDTH, dtype=np.float32)
    return rows.reshape(n_devices, N_SENT, WIDTH)


CASES = [
    (2, 1, "random"),
    (4, 1, "last"),
    (8, 1, "random"),
    (4, 3, "random"),
    (8, 2, "last"),
    (4, 2, "even"),
    (8, 1, "even"),
]


@pytest.mark.parametrize(("n_devices", "n_slots", "pattern"), CASES)
@pytest.mark.parametrize("block", [1, 4])
def test_rows_land_by_bin_then_sender_and_return(
    n_devices: int, n_slots: int, pattern: str, block: int
) -> None:
    load = loads(n_devices, n_slots, pattern)
    rows = sent_rows(n_devices)
    n_blocks = n_blocks_for(n_devices * N_SENT, n_slots, block)

    def there_and_back(rows: jax.Array, load: jax.Array) -> Any:
        route, blocks = make_route(load, "expert", n_sent=N_SENT, n_blocks=n_blocks, block=block)
        landed = exchange(rows, route)
        return landed, exchange_back(landed, route), blocks

    landed, returned, blocks = over_devices(n_devices, there_and_back, rows, load)
    starts = np.cumsum(load, axis=1) - load
    for device in range(n_devices):
        wanted, experts = [], []
        for slot in range(n_slots):
            at = device * n_slots + slot
            pieces = [rows[s, starts[s, at] :][: load[s, at]] for s in range(n_devices)]
            together = np.concatenate(pieces)
            padding = -len(together) % block
            wanted.append(np.pad(together, ((0, padding), (0, 0))))
            experts += [slot] * ((len(together) + padding) // block)
        wanted = np.concatenate(wanted)
        np.testing.assert_array_equal(landed[device, : len(wanted)], wanted)
        assert not landed[device, len(wanted) :].any()
        assert int(blocks.n_used[device]) == len(experts)
        assert blocks.expert_M[device, : len(experts)].tolist() == experts
        n_rows = load[device].sum()
        np.testing.assert_array_equal(returned[device, :n_rows], rows[device, :n_rows])
        assert not returned[device, n_rows:].any()


def test_each_way_is_the_others_gradient() -> None:
    load = loads(4, 2, "random")
    rows = sent_rows(4)
    weights = np.random.default_rng(0).normal(size=(4, 4 * N_SENT, WIDTH)).astype(np.float32)

    def gradients(rows: jax.Array, load: jax.Array, weights: jax.Array) -> Any:
        route, _ = make_route(load, "expert", n_sent=N_SENT, n_blocks=4 * N_SENT)
        out, pull = jax.vjp(lambda x: exchange(x, route), rows)
        home, pull_home = jax.vjp(lambda y: exchange_back(y, route), weights)
        return pull(weights)[0], home, pull_home(rows)[0], out

    there, home, back, out = over_devices(4, gradients, rows, load, weights)
    np.testing.assert_array_equal(there, home)
    np.testing.assert_array_equal(back, out)


def test_the_portable_collective_follows_jaxs_contract() -> None:
    """The example of `jax.lax.ragged_all_to_all`'s documentation, zeros where nothing lands.

    Device 0 sends [1] to itself and [2, 2] to device 1; device 1 sends [3] and [4].
    """
    rows = np.array([[1, 2, 2], [3, 4, 0]])
    into = Chunks(
        start_C=jnp.array([[0, 1], [0, 2]]),
        size_C=jnp.array([[1, 1], [2, 1]]),
        far_C=jnp.array([[0, 0], [1, 1]]),
    )

    def run(*arrays: jax.Array) -> jax.Array:
        rows, *chunks = arrays
        return _pick_from_all(rows, 4, Chunks(*chunks), "expert")

    arrays = [rows, *jax.tree.leaves(into)]
    found = over_devices(2, run, *(np.asarray(a, np.int32) for a in arrays))
    assert found.tolist() == [[1, 3, 0, 0], [2, 2, 4, 0]]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32, jnp.float8_e4m3fn])
def test_any_type_travels(dtype: Any) -> None:
    load = np.full((2, 2), 6, np.int32)
    rows = (sent_rows(2) % 7).astype(dtype)

    def run(rows: jax.Array, load: jax.Array) -> jax.Array:
        route, _ = make_route(load, "expert", n_sent=N_SENT, n_blocks=2 * N_SENT)
        return exchange(rows, route)

    found = over_devices(2, run, rows, load)
    assert found.dtype == dtype
    wanted = np.concatenate([rows[:, :6].reshape(12, WIDTH), np.zeros((12, WIDTH), dtype)])
    np.testing.assert_array_equal(found[0].astype(np.float32), wanted.astype(np.float32))
