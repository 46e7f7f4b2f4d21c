"""Held-out loss through a pipeline: forward passes alone, nothing kept of them.

Dims: M micro-batches, B sequences, S = T + 1 row.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from v3jax import objective
from v3jax.config import ExperimentConfig
from v3jax.objective import Scale
from v3jax.ops import zigzag
from v3jax.pipeline.plan import Orders, evaluation_plan
from v3jax.pipeline.run import Program, gather
from v3jax.sharding import ShardingRules


def nll(
    cfg: ExperimentConfig,
    rules: ShardingRules,
    specs: Any,
    places: Any,
    params: Any,
    router_state: Any,
    tokens_BS: jax.Array,
    segments_BS: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """This device's shares of `objective.eval_loss` over its rows, which are split into as many
    micro-batches as `batch.micro_batch` makes of them, inside `jax.shard_map`."""
    batch = cfg.batch.micro_batch // cfg.mesh.batch_shards
    batch = batch if len(tokens_BS) % batch == 0 else len(tokens_BS)
    tokens_MBS, segments_MBS = (
        rows.reshape(-1, batch, rows.shape[-1]) for rows in (tokens_BS, segments_BS)
    )
    plan = evaluation_plan(cfg, len(tokens_MBS))
    arrays = jax.tree.map(jnp.asarray, plan.orders(len(tokens_MBS)))
    rank = jax.lax.axis_index("pipe")
    orders: Orders = replace(
        arrays, ranks={name: array_SR[:, rank, None] for name, array_SR in arrays.ranks.items()}
    )
    # Sums, of the main model alone, which a stage of MTP modules need not have any of: the ranks
    # are the plan's.
    main = replace(cfg, model=replace(cfg.model, mtp_depth=0), mesh=replace(cfg.mesh, pipe=1))
    weights = gather(cfg, rules, plan, specs, places, params)
    one = jnp.ones(())
    scale = Scale(n_targets=one, n_sequences=one, mtp_weight=jnp.zeros(()))
    program = Program(
        main, rules, plan, weights, router_state, tokens_MBS, segments_MBS, orders, scale
    )
    _, parts = program.run()
    mask_BT = objective.target_mask(segments_BS, isolate_documents=cfg.data.isolate_documents)
    mine = jnp.where(rank == 0, zigzag.own(mask_BT).sum(dtype=jnp.int32), 0)
    return parts.main, mine
