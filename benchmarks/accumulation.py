"""What gradient accumulation holds beside the gradients, from the compiler's own account.

    python -m benchmarks.accumulation

The train step of `v3_small`'s widths on rows of 128 tokens, compiled for one CPU device with one
and with four micro-batches; nothing runs. `more` is what four hold beyond one, over the size of the
gradients: 100% would be a second copy of them. Few layers are unrolled and join their gradients;
many stand in a loop, each of which adds its own in place.
"""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from absl import app

from v3jax import registry
from v3jax.state import init_state
from v3jax.step import make_train_step

LAYERS, MICRO_BATCHES, TOKENS = (8, 13), (1, 4), 128


def main(argv: list[str]) -> None:
    del argv
    jax.config.update("jax_platforms", "cpu")
    print(f"{'layers':>6} {'gradients MB':>13} {'temporaries MB, 1':>18} {'4':>6} {'more':>6}")
    small = registry.get("v3_small")
    for n_layers in LAYERS:
        cfg = replace(
            small,
            model=replace(small.model, n_layers=n_layers),
            data=replace(small.data, seq_len=TOKENS),
            batch=replace(small.batch, micro_batch=1, start=1, end=1),
        )
        state: Any = jax.eval_shape(lambda cfg=cfg: init_state(cfg))
        gradients = sum(4 * math.prod(p.shape) for p in jax.tree.leaves(state.params))
        temporaries = []
        for n_micro in MICRO_BATCHES:
            rows = jax.ShapeDtypeStruct((n_micro, 1, TOKENS + 1), jnp.int32)
            count = jax.ShapeDtypeStruct((), jnp.int32)
            program = make_train_step(cfg).lower(state, rows, rows, count).compile()
            temporaries.append(program.memory_analysis().temp_size_in_bytes)
        one, four = temporaries
        print(
            f"{n_layers:6d} {gradients / 1e6:13.0f} {one / 1e6:18.0f} {four / 1e6:6.0f} "
            f"{(four - one) / gradients:6.0%}",
            flush=True,
        )


if __name__ == "__main__":
    app.run(main)
