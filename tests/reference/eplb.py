"""Placement of experts and their copies, from the published description, one layer at a time."""

import math


def rebalance(
    load: list[float], n_replicas: int, n_groups: int, n_nodes: int, n_devices: int
) -> list[list[int]]:
    """The experts on each device of one layer."""
    if n_groups % n_nodes:
        n_groups, n_nodes = 1, 1
    size = len(load) // n_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(n_groups)]
    nodes = fill([(math.fsum(load[e] for e in group), group) for group in groups], n_nodes)
    devices = []
    for node in nodes:
        experts = [expert for group in node for expert in group]
        on_node = copy(experts, load, n_replicas // n_nodes)
        shares = [(load[expert] / on_node.count(expert), expert) for expert in on_node]
        devices += fill(shares, n_devices // n_nodes)
    return devices


def fill(items: list, n_boxes: int) -> list[list]:
    """`(weight, item)` pairs into boxes of equal number; where that is one they stay in order."""
    boxes: list[list] = [[] for _ in range(n_boxes)]
    weights = [0.0] * n_boxes
    most = len(items) // n_boxes
    if most == 1:
        return [[item] for _, item in items]
    for weight, item in sorted(items, key=lambda pair: pair[0], reverse=True):
        open_ones = [b for b in range(n_boxes) if len(boxes[b]) < most]
        lightest = min(open_ones, key=lambda b: weights[b])
        boxes[lightest].append(item)
        weights[lightest] += weight
    return boxes


def copy(experts: list[int], load: list[float], n_replicas: int) -> list[int]:
    """The experts and, behind them, copies of whichever is busiest a copy."""
    found = list(experts)
    while len(found) < n_replicas:
        found.append(max(experts, key=lambda expert: load[expert] / found.count(expert)))
    return found
