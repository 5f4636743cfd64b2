"""Settings for processes that have the TPU compiler but no TPU. Imports nothing, so that it can come before JAX."""

import os
from pathlib import Path


def has_tpu() -> bool:
    """Whether the kernel shows a device that may be a TPU."""
    return any(Path("/dev").glob("accel*")) or any(Path("/dev").glob("vfio/[0-9]*"))


def without_tpu() -> None:
    """Let libtpu be loaded by several processes, look neither for chips nor for a cloud, and keep its log to itself."""
    for name, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)
