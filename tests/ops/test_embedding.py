"""The embedding looked up where its parts lie, against the whole table, on four devices."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from v3jax.config import MeshConfig
from v3jax.ops.embedding import add_to_split, embed, embed_split
from v3jax.sharding import BATCH_AXES, make_mesh

VOCAB, DIM, BATCH, TIME = 10, 8, 4, 3
RNG = np.random.default_rng(0)
TABLE = jnp.asarray(RNG.standard_normal((VOCAB, DIM)), jnp.float32)
TOKENS = jnp.asarray(RNG.integers(0, VOCAB, (BATCH, TIME)), jnp.int32)
PROBE = jnp.asarray(RNG.standard_normal((BATCH, TIME, DIM)), jnp.bfloat16)


def test_split_columns_give_the_rows_and_the_gradient_of_the_whole_table() -> None:
    mesh = make_mesh(MeshConfig(data=2, expert=2))
    columns, rows = P(None, BATCH_AXES), P(BATCH_AXES)

    def one_device(table: jax.Array, tokens: jax.Array, probe: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(lambda t: embed(t, tokens, jnp.bfloat16, BATCH_AXES), table)
        return out, *pull(probe)

    run = jax.shard_map(
        one_device,
        mesh=mesh,
        in_specs=(columns, rows, rows),
        out_specs=(rows, columns),
        check_vma=False,
    )
    out, gradient = jax.jit(run)(TABLE, TOKENS, PROBE)
    wanted, pull = jax.vjp(lambda t: embed(t, TOKENS, jnp.bfloat16), TABLE)
    np.testing.assert_array_equal(out, wanted)
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient, pull(PROBE)[0], rtol=1e-6, atol=1e-6)


def test_rows_split_over_devices_are_found_and_added_to() -> None:
    rng = np.random.default_rng(3)
    table_VD = rng.normal(size=(16, 6)).astype(np.float32)
    tokens_BS = rng.integers(0, 16, (2, 9))
    rows_BSD = rng.normal(size=(2, 9, 6)).astype(np.float32)
    mesh = make_mesh(MeshConfig(pipe=4))

    def run(table: jax.Array, tokens: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = embed_split(table, tokens, jnp.float32, "pipe")
        return found, add_to_split(jnp.zeros_like(table), tokens, rows, "pipe")

    parts = P("pipe")
    split = jax.shard_map(
        run, mesh=mesh, in_specs=(parts, P(), P()), out_specs=(P(), parts), check_vma=False
    )
    found, added = jax.jit(split)(table_VD, tokens_BS, rows_BSD)
    np.testing.assert_array_equal(found, table_VD[tokens_BS])
    wanted = np.zeros_like(table_VD)
    np.add.at(wanted, tokens_BS, rows_BSD)
    np.testing.assert_allclose(added, wanted, atol=1e-6)
