"""Continues a prompt with a trained model.

python -m v3jax.sample --ckpt=runs/v3_tiny --prompt="def " [--ema] [--tokens=64]
"""

import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
from absl import app, flags
from etils import epath

from v3jax import checkpoint, config, decode, host
from v3jax.config import ExperimentConfig
from v3jax.data.loader import cache_folder
from v3jax.data.tokenizer import Tokenizer
from v3jax.sharding import make_mesh
from v3jax.state import TrainState, abstract_state

_CKPT = flags.DEFINE_string("ckpt", None, "Run directory.")
_PROMPT = flags.DEFINE_string("prompt", "", "Text to continue.")
_EMA = flags.DEFINE_bool("ema", False, "Use the averaged weights.")
_TOKENS = flags.DEFINE_integer("tokens", 64, "Tokens to generate.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest.", lower_bound=0.0)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the draws.")


def load_run(
    ckpt: epath.PathLike, *, ema: bool = False
) -> tuple[ExperimentConfig, Any, Any, Tokenizer]:
    """Config, parameters, router state and tokenizer of a run directory's newest checkpoint.

    Raises:
      ValueError: no complete checkpoint, no tokenizer, or no averaged weights where asked for.
    """
    root = epath.Path(ckpt)
    found = checkpoint.latest(root)
    if found is None:
        raise ValueError(f"{root}: no complete checkpoint here; --ckpt names a run directory")
    cfg = config.from_text((root / "config.txt").read_text())
    if not (root / "tokenizer.json").exists():
        raise ValueError(f"{root}: no tokenizer.json; the run was trained on synthetic data")
    tokenizer = Tokenizer((root / "tokenizer.json").read_text(), str(root / "tokenizer.json"))
    state: TrainState = checkpoint.restore(found, abstract_state(cfg, make_mesh(cfg.mesh)))
    if ema and state.ema is None:
        raise ValueError(f"{root}: the run kept no averaged weights; drop --ema")
    return cfg, state.ema if ema else state.params, state.router_state, tokenizer


def main(argv: Sequence[str]) -> int:
    if len(argv) > 1 or _CKPT.value is None:
        print("v3jax.sample: --ckpt=RUN_DIRECTORY is missing", file=sys.stderr)
        return 2
    host.reuse_freed_memory()
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    try:
        cfg, params, router_state, tokenizer = load_run(_CKPT.value, ema=_EMA.value)
    except ValueError as error:
        print(f"v3jax.sample: {error}", file=sys.stderr)
        return 1
    start = time.monotonic()
    ids = decode.generate(
        cfg,
        params,
        router_state,
        tokenizer,
        [_PROMPT.value],
        n_tokens=_TOKENS.value,
        temperature=_TEMPERATURE.value,
        seed=_SEED.value,
    )[0]
    seconds = time.monotonic() - start
    print(_PROMPT.value + tokenizer.decode(ids))
    print(f"{len(ids)} tokens, {len(ids) / seconds:.1f} tokens/s, compilation included")
    return 0


if __name__ == "__main__":
    app.run(main)
