"""Continues a prompt with a trained model.

python -m v3jax.sample --ckpt=runs/v3_tiny --prompt="def " [--ema] [--tokens=64]
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
from absl import app, flags, logging
from etils import epath

from v3jax import checkpoint, config, decode, host
from v3jax.config import ExperimentConfig, MeshConfig
from v3jax.data.dataset import cache_folder
from v3jax.data.tokenizer import Tokenizer
from v3jax.sharding import make_mesh
from v3jax.state import abstract_state

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
    if not (root / "tokenizer.json").exists():
        raise ValueError(f"{root}: no tokenizer.json; the run was trained on synthetic data")
    text = "".join(f"{path} = {value}\n" for path, value in found.manifest["config"].items())
    cfg = replace(config.from_text(text), mesh=MeshConfig())  # one device, wherever it was trained
    tokenizer = Tokenizer((root / "tokenizer.json").read_text(), str(root / "tokenizer.json"))
    target = abstract_state(cfg, make_mesh(cfg.mesh))
    params, router_state = checkpoint.load_params(found, target, ema=ema)
    return cfg, params, router_state, tokenizer


def main(argv: Sequence[str]) -> int:
    """Parses, generates; 2 for a mistake in the call, 1 for a run that cannot be used."""
    if len(argv) > 1:
        return _fail(f"unexpected arguments {' '.join(argv[1:])}; options start with --", 2)
    if _CKPT.value is None:
        return _fail("--ckpt=RUN_DIRECTORY is missing", 2)
    if not _is_text(_PROMPT.value):
        return _fail("--prompt is not valid UTF-8; use a UTF-8 terminal", 2)
    logging.set_verbosity(logging.WARNING)
    host.reuse_freed_memory()
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    try:
        return _run(_CKPT.value)
    except (ValueError, OSError) as error:
        return _fail(str(error).strip().split("\n")[0], 1)


def _is_text(argument: str) -> bool:
    """Whether the argument's bytes were valid UTF-8; Python keeps others as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in argument)


def _run(ckpt: str) -> int:
    cfg, params, router_state, tokenizer = load_run(ckpt, ema=_EMA.value)
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


def _fail(message: str, code: int) -> int:
    print(f"v3jax.sample: {message}", file=sys.stderr, flush=True)
    return code


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(_fail(" ".join(str(error).split()), 2))


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
