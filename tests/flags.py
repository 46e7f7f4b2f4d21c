"""XLA's flags for tests and the programs that they start."""


def xla_flags(devices: int = 1, given: str = "") -> str:
    """So many CPU devices, and quick compilation: what tests compile runs a few times only."""
    ours = (
        f"--xla_force_host_platform_device_count={devices}",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    )
    named = {flag.partition("=")[0] for flag in ours}
    return " ".join([*(f for f in given.split() if f.partition("=")[0] not in named), *ours])
