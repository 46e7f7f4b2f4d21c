"""Which experts get copies and which device holds each copy (DeepSeek-V3 report, section 3.4).

    python -m v3jax.eplb --run=runs/v3_tiny --replicas=24 --devices=8 [--nodes=2] [--last=20]
                         [--json] [--out=placement.json]

Prints how loaded the busiest device is before and after; `--json` prints the placement instead and
`--out` writes it, for `python -m v3jax.sample --redundant=placement.json`.

The algorithm is the one published as EPLB: experts with the highest load get copies until all
replicas are in use, and replicas are packed on devices so that these share the load. Where nodes
divide the router's groups evenly, a group's experts and all their copies stay on one node, since
node-limited routing sends a token to few groups; else all devices are one pool. Packing is greedy:
in rare cases (7 of 1,867 random small ones) successive experts on a device would have done better.
Ties go to the lower index and loads are compared in FP64; both are our choice.
Dims: L MoE layers (MTP last), E experts, R replicas, C most copies of an expert, G groups, N nodes,
P devices; X rows balanced side by side (layers times nodes), I items, M packs, S slots of packs.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import flags
from etils import epath

from v3jax import cli, config


@dataclass(frozen=True, eq=False)
class Placement:
    """Where the copies of every layer's experts lie; device p of P holds replicas p R/P and on."""

    phy2log: np.ndarray
    """Expert of each replica, `[L, R]`."""
    log2phy: np.ndarray
    """Replicas of each expert in rising order, `[L, E, C]`, -1 behind the last."""
    copies: np.ndarray
    """Replicas of each expert, `[L, E]`, at least 1."""


def rebalance(
    load_LE: np.ndarray, n_replicas: int, n_groups: int, n_nodes: int, n_devices: int
) -> Placement:
    """The published placement for measured loads (DeepSeek-V3 report, section 3.4.1).

    Args:
      load_LE: tokens sent to each expert, or anything proportional to it; zeros are fine.
      n_replicas: experts and copies of experts in each layer, a multiple of `n_devices`.
      n_groups: groups of the router's node limit, each of E / G successive experts.
      n_nodes: machines of `n_devices / n_nodes` devices each. If they divide the groups evenly the
        placement is hierarchical, else global, as with one group and one node.

    Raises:
      ValueError: loads that are no finite counts `[L, E]`, or sizes that do not divide.
    """
    load_LE = _checked_loads(load_LE)
    _check_sizes(load_LE.shape[1], n_replicas, n_groups, n_nodes, n_devices)
    if not is_hierarchical(n_groups, n_nodes):
        n_groups = n_nodes = 1
    n_layers, n_experts = load_LE.shape
    # Groups to nodes: from here on each node of each layer is a row of its own.
    group_size = n_experts // n_groups
    group_LG = pack(load_LE.reshape(n_layers, n_groups, group_size).sum(-1), n_nodes)
    expert_XE = group_LG[..., None] * group_size + np.arange(group_size)
    expert_XE = expert_XE.reshape(n_layers * n_nodes, n_experts // n_nodes)
    load_XE = np.take_along_axis(load_LE, expert_XE.reshape(load_LE.shape), 1)
    load_XE = load_XE.reshape(expert_XE.shape)
    # Copies of a node's experts, then these on its devices.
    at_XR = replicate(load_XE, n_replicas // n_nodes)
    copies_XE = _count(at_XR, load_XE.shape[1])
    load_XR = np.take_along_axis(load_XE / copies_XE, at_XR, 1)
    at_XR = np.take_along_axis(at_XR, pack(load_XR, n_devices // n_nodes), 1)
    phy2log_LR = np.take_along_axis(expert_XE, at_XR, 1).reshape(n_layers, n_replicas)
    return placement(phy2log_LR, n_experts)


def is_hierarchical(n_groups: int, n_nodes: int) -> bool:
    """Whether every node can hold the same number of whole groups."""
    return n_groups % n_nodes == 0


def pack(weight_XI: np.ndarray, n_packs: int) -> np.ndarray:
    """Items in packs of equal number and, as far as that goes, weight: the item `[X, S]` of slots.

    Heaviest first, each item goes to the lightest pack with room. One item a pack stays in place.
    """
    n_rows, n_items = weight_XI.shape
    room = n_items // n_packs
    if room == 1:
        return np.tile(np.arange(n_items), (n_rows, 1))
    row_X = np.arange(n_rows)
    total_XM = np.zeros((n_rows, n_packs))
    count_XM = np.zeros((n_rows, n_packs), int)
    item_XS = np.empty((n_rows, n_items), int)
    for item_X in np.argsort(-weight_XI, axis=1, kind="stable").T:
        pack_X = np.where(count_XM < room, total_XM, np.inf).argmin(1)
        item_XS[row_X, pack_X * room + count_XM[row_X, pack_X]] = item_X
        total_XM[row_X, pack_X] += weight_XI[row_X, item_X]
        count_XM[row_X, pack_X] += 1
    return item_XS


def replicate(load_XE: np.ndarray, n_replicas: int) -> np.ndarray:
    """The expert `[X, R]` of each replica: all once, then whichever has the most load a copy."""
    n_rows, n_experts = load_XE.shape
    row_X = np.arange(n_rows)
    copies_XE = np.ones((n_rows, n_experts), int)
    expert_XR = np.tile(np.arange(n_replicas), (n_rows, 1))
    for replica in range(n_experts, n_replicas):
        busiest_X = (load_XE / copies_XE).argmax(1)
        expert_XR[:, replica] = busiest_X
        copies_XE[row_X, busiest_X] += 1
    return expert_XR


def placement(phy2log_LR: np.ndarray, n_experts: int) -> Placement:
    """The placement that holds expert `phy2log_LR` in each replica.

    Raises:
      ValueError: a replica of no expert, or an expert without a replica.
    """
    n_layers, n_replicas = phy2log_LR.shape
    if phy2log_LR.min() < 0 or phy2log_LR.max() >= n_experts:
        raise ValueError(f"placement: replicas must be of experts within 0..{n_experts - 1}")
    copies_LE = _count(phy2log_LR, n_experts)
    if not copies_LE.all():
        layer, expert = np.argwhere(copies_LE == 0)[0]
        raise ValueError(f"placement: expert {expert} of layer {layer} has no replica")
    # Replicas sorted by expert; an expert's n-th one is n behind its first.
    order_LR = np.argsort(phy2log_LR, axis=1, kind="stable")
    expert_LR = np.take_along_axis(phy2log_LR, order_LR, 1)
    first_LE = np.cumsum(copies_LE, axis=1) - copies_LE
    copy_LR = np.arange(n_replicas) - np.take_along_axis(first_LE, expert_LR, 1)
    log2phy_LEC = np.full((n_layers, n_experts, copies_LE.max()), -1)
    log2phy_LEC[np.arange(n_layers)[:, None], expert_LR, copy_LR] = order_LR
    return Placement(phy2log_LR, log2phy_LEC, copies_LE)


def _count(expert_XR: np.ndarray, n_experts: int) -> np.ndarray:
    """How often each expert occurs in a row, `[X, E]`."""
    row_X1 = np.arange(len(expert_XR))[:, None]
    flat = np.bincount((row_X1 * n_experts + expert_XR).ravel(), minlength=row_X1.size * n_experts)
    return flat.reshape(-1, n_experts)


def _checked_loads(load_LE: np.ndarray) -> np.ndarray:
    load_LE = np.asarray(load_LE, np.float64)
    if load_LE.ndim != 2 or not load_LE.size:
        raise ValueError(f"loads must be [layers, experts], got shape {list(load_LE.shape)}")
    if not np.isfinite(load_LE).all() or load_LE.min() < 0:
        raise ValueError("loads must be finite and not negative")
    return load_LE


def _check_sizes(
    n_experts: int, n_replicas: int, n_groups: int, n_nodes: int, n_devices: int
) -> None:
    sizes = {"replicas": n_replicas, "groups": n_groups, "nodes": n_nodes, "devices": n_devices}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: must be at least 1")
    if n_experts % n_groups:
        raise ValueError(f"groups={n_groups}: do not divide the {n_experts} experts")
    if n_devices % n_nodes:
        raise ValueError(f"devices={n_devices}: must be a multiple of the {n_nodes} nodes")
    if n_replicas % n_devices:
        raise ValueError(f"replicas={n_replicas}: must be a multiple of the {n_devices} devices")
    if n_replicas < n_experts:
        raise ValueError(f"replicas={n_replicas}: must be at least the {n_experts} experts")


def device_loads(load_LE: np.ndarray, placed: Placement, n_devices: int) -> np.ndarray:
    """Load `[L, P]` of each device if an expert's copies share its load equally."""
    load_LR = np.take_along_axis(load_LE / placed.copies, placed.phy2log, 1)
    return load_LR.reshape(len(load_LE), n_devices, -1).sum(-1)


def contiguous_loads(load_LE: np.ndarray, n_devices: int) -> np.ndarray:
    """Load `[L, P]` of each device if successive experts lie on one, as evenly as they divide."""
    device_E = np.arange(load_LE.shape[1]) * n_devices // load_LE.shape[1]
    return load_LE @ (device_E[:, None] == np.arange(n_devices))


def imbalance(load_LP: np.ndarray) -> np.ndarray:
    """Load of each layer's busiest device over the mean, `[L]`; 1 for a layer without load."""
    mean_L = load_LP.mean(1)
    return np.divide(load_LP.max(1), mean_L, out=np.ones_like(mean_L), where=mean_L > 0)


def overall(load_LP: np.ndarray) -> float:
    """The same of all layers in turn, each of which ends when its busiest device does."""
    total = load_LP.mean(1).sum()
    return float(load_LP.max(1).sum() / total) if total else 1.0


def loads_of(run_dir: epath.PathLike, *, last: int) -> np.ndarray:
    """Tokens sent to each expert, `[L, E]`, over the `last` steps that `loads.jsonl` recorded.

    Raises:
      ValueError: no such file, nothing in it, or rows that are not loads of one model.
    """
    path = epath.Path(run_dir) / "loads.jsonl"
    if not path.exists():
        raise ValueError(f"{path}: not found; name the directory of a run")
    rows = [row for row in map(_loads_in, path.read_text().splitlines()) if row is not None]
    if not rows:
        raise ValueError(f"{path}: holds no expert loads")
    if len({row.shape for row in rows}) > 1 or rows[0].ndim != 2 or not rows[0].size:
        raise ValueError(f"{path}: loads must be [layers, experts], the same in every row")
    if min(row.min() for row in rows) < 0:
        raise ValueError(f"{path}: loads must not be negative")
    return np.sum(rows[-last:], axis=0)


def _loads_in(line: str) -> np.ndarray | None:
    """The loads of a row; None for a line that a crash tore."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    try:
        return np.asarray(row["load"], np.int64)
    except (KeyError, TypeError, ValueError, OverflowError):
        return np.empty(0)


def groups_of(run_dir: epath.PathLike) -> int:
    """Groups of the router's node limit in a run.

    Raises:
      ValueError: no config in the directory, or one of another version.
    """
    path = epath.Path(run_dir) / "config.txt"
    if not path.exists():
        raise ValueError(f"{path}: not found; name the directory of a run")
    try:
        return config.from_text(path.read_text()).model.n_groups
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_placement(file: str | Path) -> Placement:
    """The placement in a file that `--out` wrote.

    Raises:
      ValueError: it cannot be read, or does not hold a placement.
    """
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
        n_experts, phy2log_LR = found["n_experts"], np.asarray(found["phy2log"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file}: no placement of v3jax.eplb ({reason})") from None
    if phy2log_LR.ndim != 2 or phy2log_LR.dtype.kind != "i" or not isinstance(n_experts, int):
        raise ValueError(f"{file}: phy2log must be whole numbers, [layers, replicas]")
    try:
        return placement(phy2log_LR, n_experts)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `python -m v3jax.eplb` prints as JSON; lists by layer, MTP's last."""

    n_experts: int
    n_replicas: int
    n_groups: int
    n_nodes: int
    n_devices: int
    hierarchical: bool
    before: list[float]
    """Busiest device over the mean with successive experts on a device, no copies."""
    after: list[float]
    overall_before: float
    overall_after: float
    phy2log: list[list[int]]
    log2phy: list[list[list[int]]]
    copies: list[list[int]]


def plan(load_LE: np.ndarray, n_replicas: int, n_groups: int, n_nodes: int, n_devices: int) -> Plan:
    """A placement for measured loads and what it is worth on these same loads.

    Raises:
      ValueError: as `rebalance`.
    """
    placed = rebalance(load_LE, n_replicas, n_groups, n_nodes, n_devices)
    before_LP = contiguous_loads(load_LE, n_devices)
    after_LP = device_loads(load_LE, placed, n_devices)
    return Plan(
        n_experts=load_LE.shape[1],
        n_replicas=n_replicas,
        n_groups=n_groups,
        n_nodes=n_nodes,
        n_devices=n_devices,
        hierarchical=is_hierarchical(n_groups, n_nodes),
        before=imbalance(before_LP).tolist(),
        after=imbalance(after_LP).tolist(),
        overall_before=overall(before_LP),
        overall_after=overall(after_LP),
        phy2log=placed.phy2log.tolist(),
        log2phy=placed.log2phy.tolist(),
        copies=placed.copies.tolist(),
    )


def table(p: Plan) -> str:
    """Each layer's imbalance before and after, its most copied experts and a last line for all."""
    where = f"{p.n_devices} devices"
    if p.n_nodes > 1:
        way = "groups stay on a node" if p.hierarchical else "experts go anywhere"
        where += f" of {p.n_nodes} nodes, {way}"
    lines = [
        f"{p.n_experts} experts and {p.n_replicas - p.n_experts} copies on {where}; "
        "load of the busiest device / mean:",
        f"{'layer':>7}  {'before':>6}  {'after':>6}  experts with copies",
    ]
    for layer, copies_E in enumerate(p.copies):
        some = sorted((-n, expert) for expert, n in enumerate(copies_E) if n > 1)
        text = " ".join(f"{expert}x{-n}" for n, expert in some[:8]) + " ..." * (len(some) > 8)
        lines.append(f"{layer:>7}  {p.before[layer]:6.3f}  {p.after[layer]:6.3f}  {text}".rstrip())
    return "\n".join([*lines, f"overall  {p.overall_before:6.3f}  {p.overall_after:6.3f}"])


def _to_json(p: Plan) -> str:
    return json.dumps(dataclasses.asdict(p))


def main(argv: Sequence[str]) -> int:
    """Plans and prints; 2 for a mistake in the call, 1 for a run that cannot be used."""
    values = flags.FLAGS
    if len(argv) > 1:
        return cli.fail("eplb", f"{argv[1]!r} is no flag; see --help", cli.USAGE)
    for name in ("run", "replicas", "devices"):
        if values[name].value is None:
            return cli.fail("eplb", f"--{name} is missing; see --help", cli.USAGE)
    try:
        load_LE = loads_of(values.run, last=values.last)
        n_groups = groups_of(values.run)
    except (ValueError, OSError) as error:
        return cli.fail("eplb", error, cli.UNUSABLE)
    try:
        found = plan(load_LE, values.replicas, n_groups, values.nodes, values.devices)
    except ValueError as error:
        return cli.fail("eplb", f"--{error}", cli.USAGE)
    if values.out is not None:
        try:
            Path(values.out).write_text(_to_json(found) + "\n", encoding="utf-8")
        except OSError as error:
            return cli.fail("eplb", f"--out: {error}", cli.UNUSABLE)
    print(_to_json(found) if values.json else table(found))
    return 0


def define_flags() -> None:
    """The program's flags; importing the module defines none."""
    flags.DEFINE_string("run", None, "Run directory whose loads.jsonl is read.")
    flags.DEFINE_integer("replicas", None, "Experts and copies of experts in each layer.")
    flags.DEFINE_integer("devices", None, "Devices that the replicas are split over.")
    flags.DEFINE_integer("nodes", 1, "Nodes that the devices stand in.")
    flags.DEFINE_integer("last", 20, "Recorded steps to add up, newest first.", lower_bound=1)
    flags.DEFINE_boolean("json", False, "Print the placement as one JSON object.")
    flags.DEFINE_string("out", None, "File that takes the placement as JSON.")


if __name__ == "__main__":
    define_flags()
    cli.run("eplb", main)
