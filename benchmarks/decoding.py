"""Decoding speed: the two forms of attention, transformers beside ours, and speculation.

    python -m benchmarks.decoding                    # both forms at 4K context, and ours alone
    python -m benchmarks.decoding --oracle=PYTHON    # beside transformers, run by that Python
    python -m benchmarks.decoding --run=DIR          # speculation with a run's MTP module

All on CPU in FP32. PYTHON belongs to an environment with `torch` and `transformers`; it generates
greedily from the same checkpoint and prompts, with one thread and with all, of which the better one
counts. Ours is timed before and after it and the two are averaged, since machines are shared.
"""

import functools
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from v3jax import hf, models, registry
from v3jax.config import ExperimentConfig, ModelConfig
from v3jax.decode import Engine, Stats
from v3jax.decode.cache import absorbable, attend, cached_mla, new_cache, write_rows
from v3jax.hf import config as hf_config
from v3jax.hf import export
from v3jax.host import reuse_freed_memory
from v3jax.objective import make_model
from v3jax.ops import rope
from v3jax.ops.norm import rms_norm
from v3jax.sharding import unbox
from v3jax.weights import FP32

_ORACLE = flags.DEFINE_string("oracle", None, "Python with torch and transformers.")
_RUN = flags.DEFINE_string("run", None, "Run directory with an MTP module, such as v3_tiny's.")
_HERE = Path(__file__).parent
CONTEXT, PROMPT, NEW_TOKENS = 4096, 16, 128


@dataclass(frozen=True)
class Endless:
    """A tokenizer in whose language nothing ends."""

    vocab_size: int
    eos: int = -1

    def decode(self, ids: Iterable[int]) -> str:
        """Nothing is spelled."""
        del ids
        return ""


def main(argv: list[str]) -> None:
    del argv
    reuse_freed_memory()
    print_forms()
    print_peer(_ORACLE.value)
    if _RUN.value:
        print_speculation(_RUN.value)


def random_weights(model: ModelConfig) -> tuple[Any, Any]:
    """`(params, router_state)` as training initialises them."""
    cfg: ExperimentConfig = replace(registry.get("v3_tiny"), model=model, numerics=FP32)
    tokens = jnp.zeros((1, model.mtp_depth + 2), jnp.int32)
    init = jax.jit(functools.partial(make_model(cfg).init, ahead=1))
    variables = unbox(init(jax.random.key(0), tokens))
    return variables["params"], variables["router_state"]


def prompts_of(model: ModelConfig, batch: int, length: int) -> list[list[int]]:
    """Random ids, the same as in `transformers_peer`."""
    return np.random.default_rng(0).integers(0, model.vocab_size, (batch, length)).tolist()


# Absorbed and expanded attention -----------------------------------------------------------------


def print_forms() -> None:
    """One token more after 4K: attention of a layer in three forms, and the whole model in two."""
    model = replace(registry.get("v3_small").model, n_layers=4, mtp_depth=0)
    key = model.nope_head_dim + model.rope_head_dim
    latent = model.kv_latent_dim + model.rope_head_dim
    expanded = model.n_heads * (key + model.v_head_dim)
    params, router_state = random_weights(model)
    speed = {}
    for absorbed in (True, False):
        engine = Engine(
            model,
            params,
            router_state,
            Endless(model.vocab_size),
            numerics=FP32,
            absorbed=absorbed,
        )
        prompt = prompts_of(model, 1, CONTEXT - NEW_TOKENS)
        engine.generate(prompt, max_tokens=2, room=CONTEXT)
        _, stats = engine.generate(prompt, max_tokens=NEW_TOKENS // 4, room=CONTEXT)
        speed[absorbed] = f"{stats.tokens_per_second:.1f}"
    layer = jax.tree.map(lambda x: x[0], params["dense_layers"]["self_attn"])
    times = {form: time_attention(model, layer, form) for form in FORMS}
    print(
        f"One token after {CONTEXT} of them, batch 1: {model.n_layers} layers of width "
        f"{model.dim}, {model.n_heads} heads of {model.nope_head_dim}+{model.rope_head_dim}/"
        f"{model.v_head_dim}, latent {model.kv_latent_dim}"
    )
    print(
        f"{'attention':34s} {'cache elements':>14s} {'bytes':>7s} {'ms/layer':>9s} {'tokens/s':>9s}"
    )
    rows = (
        ("absorbed, latent cache", latent, "absorbed", speed[True]),
        ("expanded from the latent cache", latent, "expanded", speed[False]),
        ("expanded, cache of keys and values", expanded, "kept", "-"),
    )
    for name, elements, form, tokens in rows:
        print(
            f"{name:34s} {elements:14d} {4 * elements:7d} {1e3 * times[form]:9.2f} {tokens:>9s}",
            flush=True,
        )
    print("cache: elements and FP32 bytes a token a layer; tokens/s: the whole model\n")


Step = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
FORMS = ("absorbed", "expanded", "kept")


def time_attention(model: ModelConfig, params: Any, form: str) -> float:
    """Median seconds of a layer's attention for one token, its projections included."""
    ready = {name: x for name, x in params.items() if name != "kv_b_proj"}
    ready |= absorbable(model, params["kv_b_proj"])
    step: Step
    if form == "kept":
        step = functools.partial(_with_kept_keys_and_values, model, params)
        width = model.n_heads * (model.nope_head_dim + model.rope_head_dim + model.v_head_dim)
        rows = jax.random.normal(jax.random.key(1), (1, CONTEXT, width))
    else:
        step = functools.partial(cached_mla, model, ready, absorbed=form == "absorbed")
        (rows, *_) = new_cache(model, 1, CONTEXT, jnp.float32).layers
        rows = jax.random.normal(jax.random.key(1), rows.shape)
    jitted = jax.jit(step, donate_argnums=1)
    x_B1D = jax.random.normal(jax.random.key(0), (1, 1, model.dim))
    position = jnp.full((1, 1), CONTEXT - 1)
    seconds = []
    for _ in range(60):
        start = time.perf_counter()
        out, rows = jitted(x_B1D, rows, position)
        jax.block_until_ready((out, rows))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[10:])


def _with_kept_keys_and_values(
    model: ModelConfig, params: Any, x_BTD: jax.Array, cache_BSX: jax.Array, positions_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """MLA with every head's keys and values in the cache, as models without a latent keep them."""
    heads = (*x_BTD.shape[:2], model.n_heads, -1)
    theta_P = rope.frequencies(model)
    q_BTL = rms_norm(x_BTD @ params["q_a_proj"], params["q_a_layernorm"], model.latent_norm_eps)
    q_BTHK = (q_BTL @ params["q_b_proj"]).reshape(heads)
    q_nope, q_rope = jnp.split(q_BTHK, [model.nope_head_dim], axis=-1)
    down_BTZ = x_BTD @ params["kv_a_proj_with_mqa"]
    c_BTC, k_BTR = jnp.split(down_BTZ, [model.kv_latent_dim], axis=-1)
    c_BTC = rms_norm(c_BTC, params["kv_a_layernorm"], model.latent_norm_eps)
    k_nope, v_BTHV = jnp.split(
        (c_BTC @ params["kv_b_proj"]).reshape(heads), [model.nope_head_dim], axis=-1
    )
    k_rope = rope.rotate(k_BTR, positions_BT, theta_P)[:, :, None]
    k_rope = jnp.broadcast_to(k_rope, (*k_nope.shape[:3], k_rope.shape[-1]))
    rows_BTX = jnp.concatenate([k_nope, k_rope, v_BTHV], axis=-1).reshape(*x_BTD.shape[:2], -1)
    cache_BSX = write_rows(cache_BSX, rows_BTX, positions_BT)
    q_BTHK = jnp.concatenate([q_nope, rope.rotate(q_rope, positions_BT, theta_P)], axis=-1)

    def keys_values(rows_BSX: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows_BSHX = rows_BSX.reshape(*rows_BSX.shape[:2], model.n_heads, -1)
        k_BSHK, v_BSHV = jnp.split(rows_BSHX, [q_BTHK.shape[-1]], axis=-1)
        return k_BSHK, v_BSHV

    out_BTHV = attend(q_BTHK, cache_BSX, positions_BT, keys_values, rope.softmax_scale(model))
    return out_BTHV.reshape(*x_BTD.shape[:2], -1) @ params["o_proj"], cache_BSX


# Beside transformers -----------------------------------------------------------------------------


def print_peer(python: str | None) -> None:
    """Greedy decoding of v3_tiny's shapes with random weights, batch 1 and 8."""
    model = replace(registry.get("v3_tiny").model, mtp_depth=0)
    print(f"Greedy decoding in tokens/s, v3_tiny's shapes, {NEW_TOKENS} tokens after {PROMPT}")
    print(f"{'batch':>5s} {'v3jax':>12s} {'transformers':>13s} {'ratio':>6s} {'same ids':>9s}")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        params, router_state = random_weights(model)
        config = hf_config.render(model, dtype="float32", fp8=False, max_positions=CONTEXT)
        stored = export.from_variables(params, router_state)
        export.write(directory, model, "fp32", stored, config=config, beside={})
        _, params, router_state = hf.load(directory)
        endless = Endless(model.vocab_size)
        engine = Engine(model, params, router_state, endless, numerics=FP32)
        for batch in (1, 8):
            prompts = prompts_of(model, batch, PROMPT)
            engine.generate(prompts, max_tokens=NEW_TOKENS)
            ours = [_ours(engine, prompts)]
            if python is None:
                print(f"{batch:5d} {ours[0][0]:12.0f}", flush=True)
                continue
            theirs, ids = max(_theirs(python, directory, batch, n) for n in (1, os.cpu_count()))
            ours.append(_ours(engine, prompts))
            speed = statistics.mean(one for one, _ in ours)
            same = np.mean(np.array(ids) == np.array(ours[0][1]))
            print(
                f"{batch:5d} {speed:12.0f} {theirs:13.0f} {speed / theirs:6.1f} {same:9.1%}",
                flush=True,
            )
    print()


def _ours(engine: Engine, prompts: Sequence[Sequence[int]]) -> tuple[float, list[list[int]]]:
    """Tokens a second after the first, the median of five calls, and the ids."""
    speeds, ids = [], []
    for _ in range(5):
        out, stats = engine.generate(prompts, max_tokens=NEW_TOKENS)
        speeds.append(stats.tokens_per_second)
        ids = [row.ids for row in out]
    return statistics.median(speeds), ids


def _theirs(
    python: str, directory: Path, batch: int, threads: int | None
) -> tuple[float, list[list[int]]]:
    """As `_ours`, by transformers with so many threads."""
    numbers = map(str, (batch, PROMPT, NEW_TOKENS, 3))
    result = subprocess.run(
        [python, str(_HERE / "transformers_peer.py"), str(directory), *numbers],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(f"transformers did not finish: {result.stderr.strip()[-500:]}")
    found = json.loads(lines[-1])
    return batch * (NEW_TOKENS - 1) / statistics.median(found["seconds"]), found["ids"]


# Speculation -------------------------------------------------------------------------------------


def print_speculation(run: str) -> None:
    """Plain and speculative decoding after texts of a package that no embedded source holds."""
    loaded = models.open_model(run)
    texts = [file.read_text() for file in sorted(_absl_files(), key=lambda file: file.name)]
    prompts = [loaded.tokenizer.encode(text)[200:264] for text in texts]
    prompts = [prompt for prompt in prompts if len(prompt) == 64][:16]
    print(f"{run}: {NEW_TOKENS} tokens after each of {len(prompts)} prompts of 64, batch 1")
    print(f"{'':22s} {'tokens/s':>9s} {'accepted':>9s} {'tokens/step':>12s} {'speed-up':>9s}")
    for temperature in (0.0, 1.0):
        plain = None
        for speculative in (False, True):
            engine = Engine(
                loaded.model,
                loaded.params,
                loaded.router_state,
                loaded.tokenizer,
                numerics=loaded.numerics,
                speculative=speculative,
            )
            stats = Stats()
            engine.generate(prompts[:1], max_tokens=NEW_TOKENS, temperature=temperature)
            for seed, prompt in enumerate(prompts):
                _, one = engine.generate(
                    [prompt], max_tokens=NEW_TOKENS, temperature=temperature, seed=seed
                )
                stats += one
            plain = plain or stats
            name = f"temperature {temperature:g}, {'speculative' if speculative else 'plain'}"
            print(
                f"{name:22s} {stats.tokens_per_second:9.0f} {stats.acceptance_rate:9.1%} "
                f"{stats.tokens_per_step:12.2f} "
                f"{stats.tokens_per_second / plain.tokens_per_second:9.2f}",
                flush=True,
            )


def _absl_files() -> list[Any]:
    folders = [resources.files("absl") / name for name in ("flags", "logging", "testing")]
    return [file for folder in folders for file in folder.iterdir() if file.name.endswith(".py")]


if __name__ == "__main__":
    app.run(main)
