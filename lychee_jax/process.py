"""Settings of a process that is a command, made before JAX and transformers are imported."""

import io
import os
import sys
from pathlib import Path

from lychee_jax.tpu_environment import has_tpu, without_tpu

MEMORY_SHARE = 0.94
"""Of a GPU, what JAX takes; by default it leaves a quarter unused."""


def prepare_process() -> None:
    """Make them; the user's own come first."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "lychee-jax" / "programs"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    os.environ.setdefault("USE_TORCH", "0")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors alone: XLA writes pages of warnings about GPU kernels
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(MEMORY_SHARE))
    if not has_tpu():  # libtpu may be there to compile with; it would complain on standard error
        without_tpu()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # names of files may be no UTF-8
