"""Targets by name, and how fast their devices send to each other."""

from types import SimpleNamespace
from typing import Any

import pytest

from v3jax.aot import devices, targets


@pytest.mark.parametrize(
    ("name", "n_devices"),
    [
        ("tpu:v5p:8x8x8", 512),
        ("tpu:v6e:16x16", 256),
        ("tpu:tpu7x:2x2x1", 8),
        ("gpu:h100:256x8", 2048),
    ],
)
def test_devices_of_a_target(name: str, n_devices: int) -> None:
    target = targets.parse(name)
    assert target.n_devices == n_devices
    assert str(target) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tpu:v5:8x8x8", "no tpu:v5; did you mean tpu:v5p"),
        ("cpu", "no cpu; .*there are tpu:v5p, tpu:v6e, tpu:tpu7x, gpu:h100"),
        ("gpu:h200:2x8", "did you mean gpu:h100"),
        ("tpu:v5p:8x8", "v5p takes 3 sizes of its torus, as in tpu:v5p:8x8x8"),
        ("tpu:v6e:16x0", "v6e takes 2 sizes"),
        ("tpu:v6e:", "v6e takes 2 sizes"),
        ("gpu:h100:8", "h100 takes hosts x GPUs, as in gpu:h100:256x8"),
    ],
)
def test_wrong_target_names_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        targets.parse(name)


def on_torus(*coords: tuple[int, int, int]) -> list[Any]:
    return [SimpleNamespace(coords=c) for c in coords]


def test_tpu_sends_on_two_links_for_each_dimension_of_the_torus() -> None:
    chip = targets.parse("tpu:v5p:2x2x1").chip
    assert devices.speed(chip, on_torus((0, 0, 0), (1, 0, 0))) == 2 * chip.link_speed
    assert devices.speed(chip, on_torus((0, 0, 0), (1, 0, 0), (0, 1, 0))) == 4 * chip.link_speed


def test_gpus_of_two_hosts_use_the_slow_network() -> None:
    chip = targets.parse("gpu:h100:2x8").chip
    host, other = SimpleNamespace(process_index=0), SimpleNamespace(process_index=1)
    assert devices.speed(chip, [host, host]) == 450e9
    assert devices.speed(chip, [host, other]) == 50e9
