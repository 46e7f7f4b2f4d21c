"""Public checkpoints in and out, streamed.

python -m v3jax.convert from-hf SRC DST     a Hugging Face directory into a conversion
python -m v3jax.convert to-hf SRC DST       a run, a conversion or another Hugging Face directory

A conversion is an orbax checkpoint that keeps every tensor in its own type; `sample` runs it and
`train` starts from it (`--set init_from=DST`). Started again, an interrupted one goes on.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags, logging

from v3jax import cli, host, models
from v3jax.checkpoint import local_path
from v3jax.config import ModelConfig
from v3jax.data.chat import DEFAULT_TEMPLATE, tokenizer_config
from v3jax.data.tokenizer import Tokenizer
from v3jax.hf import config as hf_config
from v3jax.hf import converted, export, files
from v3jax.hf.read import Reader, open_source

DTYPES = ("same", *export.KINDS)
Report = Callable[[int, int], None]


def from_hf(source: str | Path, directory: str | Path, *, report: Report | None = None) -> None:
    """Converts a Hugging Face directory, going on where an interrupted conversion stopped.

    Raises:
      ValueError: a checkpoint that is incomplete, damaged or of another model, or a directory that
        holds something else.
    """
    converted.write(open_source(source), Path(directory).expanduser(), report=report)


def to_hf(
    source: str | Path,
    directory: str | Path,
    *,
    dtype: str | None = None,
    ema: bool = False,
    shard_bytes: float = 5e9,
) -> list[str]:
    """Writes a Hugging Face directory, whole or not at all; returns its shards' names.

    Args:
      source: a run directory (its newest checkpoint), a conversion, or a Hugging Face directory.
      dtype: `bf16`, `fp32`, `fp8` (as the release: linear weights in blocks with scales, the rest
        BF16) or `same`. Default: `same` for public weights, `bf16` for a run. The router bias is
        FP32 in all of them.
      ema: the run's averaged weights.

    Raises:
      ValueError: a source that cannot be used, a directory that holds something, or a model that
        the format has no words for.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype={dtype}: one of {', '.join(DTYPES)}")
    if shard_bytes <= 0:
        raise ValueError("--shard-gb must be positive")
    local = local_path(source)
    reader = None if local is None else models.open_reader(local)
    job = _of_run(source, dtype, ema=ema) if reader is None else _of_reader(reader, dtype, ema=ema)
    return export.write(
        Path(directory).expanduser(),
        job.model,
        job.kinds,
        job.stored,
        config=job.config,
        beside=job.beside,
        shard_bytes=shard_bytes,
    )


@dataclass(frozen=True)
class _Job:
    """What `export.write` takes."""

    model: ModelConfig
    kinds: str | Mapping[str, str]
    stored: export.Stored
    config: dict[str, Any]
    beside: dict[str, str]


def _of_reader(reader: Reader, dtype: str | None, *, ema: bool) -> _Job:
    folder = models.files_beside(reader)
    if ema:
        raise ValueError(f"{folder}: public weights come without averaged ones; drop --ema")
    beside = {
        name: (folder / name).read_text(encoding="utf-8")
        for name in converted.CARRIED
        if name != "config.json" and (folder / name).is_file()
    }
    kinds: str | dict[str, str] = dtype or "same"
    raw = reader.config.raw
    if kinds == "same":
        kinds = {name: files.NAMES[reader.dtype(t)] for name, t in reader.tensors.items()}
    else:
        rendered = _render(reader.model, kinds, reader.config.max_positions)
        raw = rendered | hf_config.without_effect(raw)
    return _Job(reader.model, kinds, export.from_reader(reader), raw, beside)


def _of_run(source: str | Path, dtype: str | None, *, ema: bool) -> _Job:
    if dtype == "same":
        raise ValueError("--dtype=same is for public weights; a run's are bf16, fp32 or fp8")
    cfg, params, router_state, tokenizer = models.load_run(source, ema=ema)
    kind = dtype or "bf16"
    positions = cfg.data.seq_len
    config = _render(cfg.model, kind, positions)
    config |= {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    stored = export.from_variables(params, router_state)
    return _Job(cfg.model, kind, stored, config, _run_files(tokenizer, positions))


def _render(model: ModelConfig, kind: str, positions: int) -> dict[str, Any]:
    plain = "float32" if kind == "fp32" else "bfloat16"
    return hf_config.render(model, dtype=plain, fp8=kind == "fp8", max_positions=positions)


def _run_files(tokenizer: Tokenizer, positions: int) -> dict[str, str]:
    generation = {
        "_from_model_config": True,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "do_sample": False,
    }
    return {
        "tokenizer.json": tokenizer.text,
        "tokenizer_config.json": _json(tokenizer_config(tokenizer, DEFAULT_TEMPLATE, positions)),
        "chat_template.jinja": DEFAULT_TEMPLATE,
        "generation_config.json": _json(generation),
    }


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


_fail = functools.partial(cli.fail, "convert")


def main(argv: Sequence[str]) -> int:
    """Parses, converts; 2 for a mistake in the call, 1 for anything that cannot be used."""
    options = flags.FLAGS.flag_values_dict()
    if len(argv) != 4 or argv[1] not in ("from-hf", "to-hf"):
        return _fail("write from-hf SRC DST or to-hf SRC DST; --help shows the options", cli.USAGE)
    _, direction, source, directory = argv
    if options["dtype"] not in (None, *DTYPES):
        return _fail(f"--dtype={options['dtype']}: one of {', '.join(DTYPES)}", cli.USAGE)
    logging.set_verbosity(logging.WARNING)
    host.reuse_freed_memory()
    try:
        if direction == "from-hf":
            from_hf(source, directory, report=_print_progress)
        else:
            shards = to_hf(
                source,
                directory,
                dtype=options["dtype"],
                ema=options["ema"],
                shard_bytes=options["shard-gb"] * 1e9,
            )
            print(f"{len(shards)} file{'s' if len(shards) > 1 else ''} of weights")
    except (ValueError, OSError) as error:
        return _fail(error, cli.UNUSABLE)
    print(f"done: {directory}")
    return 0


def _print_progress(done: int, total: int) -> None:
    print(f"part {done} of {total}", flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("dtype", None, f"to-hf: {', '.join(DTYPES)}.")
    flags.DEFINE_bool("ema", False, "to-hf: a run's averaged weights.")
    flags.DEFINE_float("shard-gb", 5.0, "to-hf: the most a file holds, in 10^9 bytes.")
    cli.run("convert", main)
