"""Which FP8 kernels the program being traced takes."""

from typing import Literal

from v3jax.config import Fp8Config
from v3jax.kernels import device_kind, fp8_gpu, fp8_tpu


def kernels_of(cfg: Fp8Config) -> Literal["gpu", "tpu"] | None:
    """`gpu` on Hopper, `tpu` on TPUs, None elsewhere, for other tiles, or if `cfg` wants none.

    Raises:
      ValueError: `cfg` insists on kernels, and there are none for the device.
    """
    if cfg.backend == "xla" or (cfg.tile, cfg.block, cfg.promotion) != (128, 128, 128):
        return None
    if fp8_gpu.runs_here():
        return "gpu"
    if fp8_tpu.runs_here():
        return "tpu"
    if cfg.backend == "kernel":
        raise ValueError(
            f"numerics.fp8.backend=kernel: there are no FP8 kernels for {device_kind()}, but for "
            "Hopper GPUs and TPUs; set it to auto"
        )
    return None
