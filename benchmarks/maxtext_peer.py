"""Runs MaxText's own trainer and prints its step times as one JSON line.

Executed by `benchmarks.step_speed` with the Python of MaxText's environment; arguments are
MaxText's `name=value` options. Each step's metrics are waited for before the clock is read, as on
our side; the first five steps are left out.
"""

import itertools
import json
import statistics
import sys
import sysconfig
import time

import jax
from absl import app
from maxtext.common import metric_logger
from maxtext.trainers.pre_train import train

_stamps: list[tuple[float, float]] = []
_original = metric_logger.MetricLogger.buffer_and_write_metrics


def _stamped(self, metrics, *args, **kwargs):
    jax.block_until_ready(metrics)
    _stamps.append((time.perf_counter(), time.process_time()))
    return _original(self, metrics, *args, **kwargs)


def main(argv):
    metric_logger.MetricLogger.buffer_and_write_metrics = _stamped
    start = time.perf_counter()
    base = f"{sysconfig.get_paths()['purelib']}/maxtext/configs/base.yml"
    train.main([argv[0], base, *argv[1:]])
    pairs = list(itertools.pairwise(_stamps[5:]))
    wall = [b[0] - a[0] for a, b in pairs]
    cpu = [b[1] - a[1] for a, b in pairs]
    result = {
        "wall": statistics.median(wall),
        "wall_min": min(wall),
        "cpu": statistics.median(cpu),
        "compile_seconds": _stamps[0][0] - start,
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    app.run(main, argv=sys.argv)
