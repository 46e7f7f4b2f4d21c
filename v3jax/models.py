"""A trained model from wherever it is: a run directory, a Hugging Face directory, a conversion.

`open_model` brings one to generate with or to export; `initial_weights` brings the weights that a
new run starts from (`init_from`).
"""

import hashlib
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from etils import epath
from jax.sharding import Mesh

from v3jax import checkpoint, config, hf
from v3jax.config import DataConfig, ExperimentConfig, MeshConfig, ModelConfig, NumericsConfig
from v3jax.data.chat import DEFAULT_TEMPLATE, load_template
from v3jax.data.dataset import TEMPLATE
from v3jax.data.tokenizer import Tokenizer, load_tokenizer
from v3jax.hf.converted import BESIDE, SOURCE, Converted, open_converted
from v3jax.hf.read import Reader, Source, open_source
from v3jax.sharding import ShardingRules, make_mesh
from v3jax.state import abstract_state

# What may differ between weights and the run they start: nothing that the weights depend on.
_FREE_FIELDS = frozenset({"init_std", "yarn"})


@dataclass(frozen=True)
class Loaded:
    """A model on one device, ready to run."""

    model: ModelConfig
    numerics: NumericsConfig
    params: Any
    router_state: Any
    tokenizer: Tokenizer
    chat_template: str
    context: int
    """Tokens of the longest sequence it was made for."""
    data: DataConfig | None = None
    """What a run was trained on; None of public weights."""


def open_reader(directory: str | Path) -> Reader | None:
    """The public checkpoint in a directory, or its conversion; None if it is neither.

    Raises:
      ValueError: it is damaged, incomplete or of another model.
    """
    directory = Path(directory).expanduser()
    if (directory / SOURCE).exists():
        return open_converted(directory)
    return open_source(directory) if (directory / "config.json").exists() else None


def files_beside(reader: Reader) -> Path:
    """The folder of a reader's tokenizer, template and other files."""
    if isinstance(reader, Converted):
        return reader.directory / BESIDE
    assert isinstance(reader, Source)
    return reader.directory


def open_model(path: epath.PathLike, *, ema: bool = False) -> Loaded:
    """The model in a run directory (its newest checkpoint), a Hugging Face directory or conversion.

    Public weights compute in the type they are stored in: FP32 if all are, else BF16.

    Raises:
      ValueError: no model there, no tokenizer, or no averaged weights where `ema` asks for them.
    """
    local = checkpoint.local_path(path)
    reader = None if local is None else open_reader(local)
    if reader is None:
        return _open_run(epath.Path(path), ema=ema)
    if ema:
        raise ValueError(f"{path}: public weights come without averaged ones; drop --ema")
    folder = files_beside(reader)
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > reader.model.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model "
            f"{reader.model.vocab_size}; they do not belong together"
        )
    fp32 = all(reader.dtype(tensor) == "float32" for tensor in reader.tensors.values())
    numerics = NumericsConfig(compute="fp32" if fp32 else "bf16", moments="fp32", remat="none")
    variables = hf.load_variables(reader, dtype="float32" if fp32 else "bfloat16")
    template = load_template(folder) or DEFAULT_TEMPLATE
    return Loaded(
        reader.model,
        numerics,
        variables["params"],
        variables["router_state"],
        tokenizer,
        template,
        reader.config.max_positions,
    )


def _open_run(root: epath.Path, *, ema: bool) -> Loaded:
    cfg, params, router_state, tokenizer = load_run(root, ema=ema)
    parts = (cfg.model, cfg.numerics, params, router_state)
    file = root / TEMPLATE
    template = file.read_text() if file.exists() else DEFAULT_TEMPLATE
    return Loaded(*parts, tokenizer, template, cfg.data.seq_len, cfg.data)


def identity(path: epath.PathLike, *, ema: bool = False) -> str:
    """A digest that changes with the weights in a run directory, Hugging Face directory or
    conversion: of a run's newest manifest, or of the files' names, sizes and times.

    Raises:
      ValueError: a run's manifest is damaged.
    """
    local = checkpoint.local_path(path)
    reader = None if local is None else open_reader(local)
    if reader is None:
        found = checkpoint.latest(epath.Path(path))
        what: Any = [None if found is None else found.manifest, ema]
    else:
        files = sorted(p for p in Path(path).expanduser().rglob("*") if p.is_file())
        what = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def load_run(
    ckpt: epath.PathLike, *, ema: bool = False
) -> tuple[ExperimentConfig, Any, Any, Tokenizer]:
    """Config, parameters, router state and tokenizer of a run directory's newest checkpoint.

    Raises:
      ValueError: no complete checkpoint, no tokenizer, or no averaged weights where asked for.
    """
    root = epath.Path(ckpt)
    cfg, found = _newest(root)
    if not (root / "tokenizer.json").exists():
        raise ValueError(f"{root}: no tokenizer.json; the run was trained on synthetic data")
    tokenizer = Tokenizer((root / "tokenizer.json").read_text(), str(root / "tokenizer.json"))
    target = abstract_state(cfg, make_mesh(cfg.mesh))
    params, router_state = checkpoint.load_params(found, target, ema=ema)
    return cfg, params, router_state, tokenizer


def _newest(root: epath.Path) -> tuple[ExperimentConfig, checkpoint.Checkpoint]:
    """A run's newest checkpoint and its config for one device, wherever it was trained."""
    found = checkpoint.latest(root)
    if found is None:
        raise ValueError(
            f"{root}: no model here; name a run directory with a complete checkpoint, a Hugging "
            "Face directory or a conversion of one"
        )
    text = "".join(f"{path} = {value}\n" for path, value in found.manifest["config"].items())
    return replace(config.from_text(text), mesh=MeshConfig()), found


def initial_weights(
    cfg: ExperimentConfig, mesh: Mesh, rules: ShardingRules | None = None
) -> tuple[Any, Any]:
    """FP32 parameters and router state of `init_from`, in the places of the run `cfg`.

    Raises:
      ValueError: as `find_initial`, or damaged weights.
    """
    found = find_initial(cfg)
    if isinstance(found, checkpoint.Checkpoint):
        return checkpoint.load_params(found, abstract_state(cfg, mesh, rules))
    variables = hf.load_variables(found, mesh=mesh, rules=rules)
    return variables["params"], variables["router_state"]


def find_initial(cfg: ExperimentConfig) -> Reader | checkpoint.Checkpoint:
    """What `init_from` names, its weights not read yet.

    Raises:
      ValueError: no model there, or one of other shapes than `cfg.model`; the message names the
        fields.
    """
    assert cfg.init_from is not None
    local = checkpoint.local_path(cfg.init_from)
    reader = None if local is None else open_reader(local)
    if reader is not None:
        _check_same_model(cfg, reader.model)
        return reader
    then, found = _newest(epath.Path(cfg.init_from))
    _check_same_model(cfg, then.model)
    return found


def _check_same_model(cfg: ExperimentConfig, found: ModelConfig) -> None:
    differ = [
        f"model.{field.name} is {getattr(found, field.name)}, not {getattr(cfg.model, field.name)}"
        for field in fields(ModelConfig)
        if field.name not in _FREE_FIELDS
        and getattr(found, field.name) != getattr(cfg.model, field.name)
    ]
    if differ:
        raise ValueError(f"init_from: {cfg.init_from} is of another model: {'; '.join(differ)}")
