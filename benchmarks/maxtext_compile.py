"""Compiles MaxText's own train step for a pod that is not here; its last line is a JSON object.

Executed by `benchmarks.full_size` with the Python of MaxText's environment: the first argument is
the file that the compiled program's text goes to, the others MaxText's `name=value` options. Its
`train_compile` runs as it is, but for a clock around the compiler.
"""

import json
import resource
import sys
import sysconfig
import time
from pathlib import Path

import jax
from maxtext.trainers.pre_train import train_compile
from maxtext.utils import max_utils, maxtext_utils


def main(text_file, *options):
    result = {}

    def compiled(step, args, kwargs, mesh, shardings, out_shardings, static, donated, cfg, rules):
        with jax.set_mesh(mesh), rules:
            jitted = jax.jit(
                step,
                in_shardings=shardings,
                out_shardings=out_shardings,
                static_argnums=static,
                donate_argnums=donated,
            )
            lowered = jitted.lower(*args, **kwargs)
        start, cpu = time.perf_counter(), time.process_time()
        program = lowered.compile(
            compiler_options=max_utils.parse_libtpu_flags_to_dict(cfg.compile_xla_flags)
        )
        memory, costs = program.memory_analysis(), program.cost_analysis()
        text = program.as_text()
        Path(text_file).write_text(text)
        flops = maxtext_utils.calculate_tflops_training_per_device(cfg, log=False)[0] * 1e12
        result.update(
            mesh={axis: int(size) for axis, size in mesh.shape.items()},
            compile_seconds=time.perf_counter() - start,
            cpu_seconds=time.process_time() - cpu,
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            memory_bytes_per_chip=memory.peak_memory_in_bytes,
            host_bytes_per_chip=memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
            model_flops_per_chip=flops,
            flops=costs["flops"],
            bytes=costs["bytes accessed"],
            optimal_seconds=costs["optimal_seconds"],
            hlo_bytes=len(text),
        )
        return program

    train_compile.jit_and_compile = compiled
    base = f"{sysconfig.get_paths()['purelib']}/maxtext/configs/base.yml"
    train_compile.main(["train_compile", base, *options])
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
