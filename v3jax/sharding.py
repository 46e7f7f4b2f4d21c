"""Logical axes -> mesh axes, in one table. All contact with Flax's partitioning boxes is here.

The mesh always has the axes `pipe, data, node, context, expert`, of size 1 when unused. The batch
lives on `(data, node, expert)`, experts on `(node, context, expert)` (report sections 2.1.2 and
3.2). Devices along `context` have the same rows and compute with different positions of them
(`ops.zigzag`): for parameters and their gradients they are like parts of the batch.

A parameter is computed with where the table says and may be stored in smaller parts: `zero1` and
`fsdp` split what the table leaves whole over the rest of the axes (ZeRO, report section 3.2), also
over `pipe`: a checkpoint knows nothing of stages. `stored` says how, `gather` and `reduce` go
between the two inside `jax.shard_map`. With a pipeline the vocabulary is split over its ranks.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from v3jax.config import ExperimentConfig, MeshConfig, MoEConfig

MESH_AXES = ("pipe", "data", "node", "context", "expert")
BATCH_AXES = ("data", "node", "expert")
TOKEN_AXES = ("data", "node", "context", "expert")
"""Along which devices have different tokens."""
MeshAxis = str | tuple[str, ...] | None

_DROPLESS = MoEConfig()

_SMALL = 2**14
"""Parameters below so many elements are stored whole: gathering them would cost more (ours)."""


@dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """Which mesh axis each logical axis is split over (None keeps it whole), and how parameters
    are stored and tokens travel."""

    batch: MeshAxis = BATCH_AXES
    seq: MeshAxis = None
    embed: MeshAxis = None
    vocab: MeshAxis = None
    heads: MeshAxis = None
    latent: MeshAxis = None
    ffn: MeshAxis = None
    experts: MeshAxis = ("node", "context", "expert")
    layers: MeshAxis = None
    storage: Literal["whole", "zero1", "fsdp"] = "whole"
    """As `MeshConfig.storage`."""
    deterministic: bool = False
    """As `MeshConfig.deterministic`."""
    moe: MoEConfig = _DROPLESS
    halves: bool = False
    """Whether the backward pass has to come apart into gradients of inputs and of weights."""

    def spec(self, *logical: str | None) -> P:
        """The PartitionSpec of an array whose dimensions carry these logical names.

        Raises:
          ValueError: an unknown name, or one mesh axis on two dimensions.
        """
        known = {f.name for f in fields(self)} - {"storage", "deterministic", "moe", "halves"}
        for name in logical:
            if name is not None and name not in known:
                raise ValueError(
                    f"no logical axis {name!r}; the rules have {', '.join(sorted(known))}"
                )
        axes = tuple(None if name is None else getattr(self, name) for name in logical)
        flat = jax.tree.leaves(axes)
        if len(set(flat)) != len(flat):
            raise ValueError(f"{logical} puts one mesh axis on two dimensions: {axes}")
        return P(*axes)

    def init(self, initializer: Callable[..., Any], *logical: str | None) -> Callable[..., Any]:
        """Wraps a parameter's initializer so that `specs` can read where the parameter lives."""
        return nn.with_partitioning(initializer, tuple(self.spec(*logical)))


def rules_of(cfg: ExperimentConfig) -> ShardingRules:
    """The rule set that an experiment names."""
    return ShardingRules(
        vocab="pipe" if cfg.mesh.pipe > 1 else None,
        storage=cfg.mesh.storage,
        deterministic=cfg.mesh.deterministic,
        moe=cfg.moe,
    )


# ---- Meshes


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of real devices with the axes of `MESH_AXES`.

    Devices of one host (or one TPU slice) fill `expert` first, then `context`, then `node`, so that
    only the outer axes cross the slow network; on a TPU the order within a slice follows its torus.

    Raises:
      ValueError: the machine has fewer devices than the config asks for, several processes do not
        use all of theirs, or hosts do not divide the mesh's axes.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) < cfg.n_devices:
        raise ValueError(
            f"mesh: needs {cfg.n_devices} devices, found {len(devices)}; set mesh.* to fit"
        )
    if len(devices) > cfg.n_devices and len({d.process_index for d in devices}) > 1:
        raise ValueError(
            f"mesh: {cfg.sizes} uses {cfg.n_devices} of the processes' {len(devices)} devices; "
            "set mesh.* to use all"
        )
    shape = tuple(getattr(cfg, axis) for axis in MESH_AXES)
    grid = _ordered(shape, list(devices[: cfg.n_devices]))
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def _ordered(shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """The devices as an array of the mesh's shape, fast networks on the last axes."""
    key = "slice_index" if getattr(devices[0], "slice_index", None) is not None else "process_index"
    groups = len({getattr(d, key) for d in devices})
    if groups == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    outer = _outer_shape(shape, groups, "slices" if key == "slice_index" else "processes")
    inner = tuple(size // out for size, out in zip(shape, outer, strict=True))
    if devices[0].platform != "tpu":  # no torus: by process, then by number
        by_group = sorted(devices, key=lambda d: (getattr(d, key), d.id))
        grid = np.array(by_group, dtype=object).reshape(*outer, *inner)
        n = len(shape)
        order = [axis for pair in zip(range(n), range(n, 2 * n), strict=True) for axis in pair]
        return grid.transpose(order).reshape(shape)
    return mesh_utils.create_hybrid_device_mesh(
        inner,
        outer,
        devices,
        process_is_granule=key == "process_index",
        allow_split_physical_axes=True,
    )


def _outer_shape(shape: tuple[int, ...], groups: int, what: str) -> tuple[int, ...]:
    """How many `groups` each axis spans, filled from the outermost axis inwards."""
    outer, left = [], groups
    for size in shape:
        share = math.gcd(size, left)
        outer.append(share)
        left //= share
    if left > 1:
        sizes = ", ".join(f"{a}={n}" for a, n in zip(MESH_AXES, shape, strict=True))
        raise ValueError(f"mesh: {groups} {what} do not divide the axes {sizes}; set mesh.* to fit")
    return tuple(outer)


def abstract_mesh(cfg: MeshConfig) -> AbstractMesh:
    """The same mesh without devices, to lower a program for a machine that is not here."""
    shape = tuple(getattr(cfg, axis) for axis in MESH_AXES)
    return AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def manual_axes() -> frozenset[str]:
    """The mesh axes over which the code being traced is one device's program."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


# ---- Where arrays live


def specs(boxed: Any) -> Any:
    """PartitionSpecs of a tree that `Module.init` made, with the tree's structure unboxed."""
    return nn.get_partition_spec(boxed)


def unbox(boxed: Any) -> Any:
    """The arrays, or shapes, of a tree that `Module.init` made; nothing is moved."""

    def is_box(leaf: Any) -> bool:
        return isinstance(leaf, nn.Partitioned)

    return jax.tree.map(lambda leaf: leaf.value if is_box(leaf) else leaf, boxed, is_leaf=is_box)


def shardings(boxed: Any, mesh: Mesh | AbstractMesh) -> Any:
    """NamedShardings of a tree that `Module.init` made, where it is computed with."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(boxed))


def storage_specs(boxed: Any, mesh: Mesh | AbstractMesh, rules: ShardingRules) -> Any:
    """PartitionSpecs of where a tree that `Module.init` made is stored.

    Raises:
      ValueError: a mesh axis does not divide the dimension that the rules put it on.
    """
    sizes = dict(mesh.shape)

    def place(path: Any, spec: P, leaf: Any) -> P:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        _check_divides(name, spec, leaf.shape, sizes)
        group = name.split(".")[0]
        return stored(
            spec, leaf.shape, sizes, rules, stacked=is_stacked(group), columns=is_table(group)
        )

    return jax.tree_util.tree_map_with_path(place, specs(boxed), unbox(boxed))


def is_stacked(group: str) -> bool:
    """Whether the parameters of a module of the transformer have a leading axis of layers."""
    return group.endswith("_layers")


def is_table(group: str) -> bool:
    """Whether a parameter is looked up by row, so that devices rather hold columns of it."""
    return group == "embed_tokens"


def stored(
    spec: P,
    shape: tuple[int, ...],
    sizes: Mapping[str, int],
    rules: ShardingRules,
    *,
    stacked: bool = False,
    columns: bool = False,
) -> P:
    """Where a parameter of this compute spec is stored on a mesh of these axis sizes.

    The axes that `spec` leaves free go on the largest whole dimension they divide, the axis of
    stacked layers excepted, or on its `columns`; if none is divided, fewer of the axes.
    """
    if rules.storage == "whole":
        return spec
    axes = (*spec, *[None] * (len(shape) - len(spec)))
    used = set(jax.tree.leaves(axes))
    free = tuple(a for a in MESH_AXES if a not in used and sizes[a] > 1)
    if math.prod(shape[stacked:]) < _SMALL:
        return spec
    for start in range(len(free)):
        extra = free[start:]
        parts = math.prod(sizes[a] for a in extra)
        first = len(shape) - 1 if columns else int(stacked)
        fits = [d for d in range(first, len(shape)) if axes[d] is None and shape[d] % parts == 0]
        if fits:
            best = max(fits, key=lambda d: shape[d])
            return P(*axes[:best], extra, *axes[best + 1 :])
    return spec


def _check_divides(name: str, spec: P, shape: tuple[int, ...], sizes: Mapping[str, int]) -> None:
    for size, axes in zip(shape, spec, strict=False):
        parts = math.prod(sizes[a] for a in jax.tree.leaves(axes))
        if size % parts:
            of = " x ".join(f"{a}={sizes[a]}" for a in jax.tree.leaves(axes))
            raise ValueError(f"mesh: {of} devices do not divide {name} of {list(shape)} at {size}")


def constrain(x: jax.Array, rules: ShardingRules, *logical: str | None) -> jax.Array:
    """Pins `x` to where its logical axes live on the mesh of `jax.set_mesh`; no-op without one.

    Inside `jax.shard_map` a device has only its own part and there is nothing to pin.
    """
    if jax.sharding.get_abstract_mesh().empty or manual_axes():
        return x
    return jax.lax.with_sharding_constraint(x, rules.spec(*logical))


# ---- Between storage and computation, inside `jax.shard_map`


def added(spec: P, place: P) -> tuple[int, tuple[str, ...]] | None:
    """The dimension that storage splits beyond `spec`, and over which axes."""
    for d, axes in enumerate(place):
        if axes is not None and (d >= len(spec) or spec[d] is None):
            return d, axes if isinstance(axes, tuple) else (axes,)
    return None


Join = Callable[[jax.Array, int, tuple[str, ...]], jax.Array]
"""`joined`, or something that gives nearly the same and sends less."""


def gather(
    x: jax.Array,
    spec: P,
    place: P,
    rules: ShardingRules,
    dtype: Any = None,
    join: Join | None = None,
) -> jax.Array:
    """A stored part made whole as far as `spec` asks, in the type `dtype` if one is given.

    It travels in that type, or as `join` has it; its gradient is added up in the type of `x`, and
    split again.
    """
    extra = added(spec, place)
    if extra is None:
        return x if dtype is None else x.astype(dtype)
    return _gather(x.dtype, jnp.dtype(dtype or x.dtype), *extra, rules.deterministic, join, x)


def joined(x: jax.Array, dim: int, axes: tuple[str, ...]) -> jax.Array:
    """All devices' parts of a dimension that these mesh axes split, in `jax.shard_map`."""
    # One axis after the other, innermost first: the same bytes, and on a torus each is a ring. XLA
    # for TPU makes a sum of zeros and parts, twice the bytes, of a gather over a whole 3-D torus.
    for axis in reversed(axes):
        x = jax.lax.all_gather(x, axis, axis=dim, tiled=True)
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4, 5))
def _gather(
    stored: jnp.dtype,
    dtype: jnp.dtype,
    dim: int,
    axes: tuple[str, ...],
    deterministic: bool,
    join: Join | None,
    x: jax.Array,
) -> jax.Array:
    return joined(x.astype(dtype), dim, axes) if join is None else join(x, dim, axes).astype(dtype)


def _gather_fwd(*arguments: Any) -> tuple[jax.Array, None]:
    return _gather(*arguments), None


def _gather_bwd(
    stored: jnp.dtype,
    dtype: jnp.dtype,
    dim: int,
    axes: tuple[str, ...],
    deterministic: bool,
    join: Join | None,
    residuals: None,
    dout: jax.Array,
) -> tuple[jax.Array]:
    return (reduce_scatter(dout.astype(stored), dim, axes, deterministic),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def reduce(
    gradient: jax.Array,
    spec: P,
    place: P,
    rules: ShardingRules,
    over: tuple[str, ...] = MESH_AXES,
) -> jax.Array:
    """One device's gradient of a parameter added up over the mesh, the stored part of it.

    `gradient` has the shape that `spec` says. Axes on which the parameter itself is split hold
    other parameters, not other parts of its gradient.
    """
    extra = added(spec, place)
    axes: tuple[str, ...] = ()
    if extra is not None:
        dim, axes = extra
        gradient = reduce_scatter(gradient, dim, axes, rules.deterministic)
    held = (*jax.tree.leaves(tuple(spec)), *axes)
    return add_up(gradient, tuple(a for a in over if a not in held), rules)


def reduce_scatter(x: jax.Array, dim: int, axes: tuple[str, ...], deterministic: bool) -> jax.Array:
    """This device's part, along a dimension, of the sum over devices."""
    if not deterministic:
        for axis in axes:
            x = jax.lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)
        return x
    parts = jax.lax.axis_size(axes)
    split = jnp.moveaxis(x.reshape(*x.shape[:dim], parts, -1, *x.shape[dim + 1 :]), dim, 0)
    mine = jax.lax.all_to_all(split, axes, split_axis=0, concat_axis=0)
    return _in_order(mine)


def add_up(x: jax.Array, axes: tuple[str, ...], rules: ShardingRules) -> jax.Array:
    """The sum over devices along `axes`, in the devices' order if the rules ask for it."""
    axes = tuple(a for a in axes if jax.lax.axis_size(a) > 1)
    if not axes:
        return x
    if not rules.deterministic or jnp.issubdtype(x.dtype, jnp.integer):
        return jax.lax.psum(x, axes)
    return _in_order(jax.lax.all_gather(x, axes))


def _in_order(parts: jax.Array) -> jax.Array:
    """The sum over the first axis, first to last."""
    return jax.lax.fori_loop(1, parts.shape[0], lambda i, total: total + parts[i], parts[0])
