"""How long calls of programs spend compiling."""

import contextlib
import time
from typing import Any

import jax
import numpy as np


class Caller:
    """Calls programs, and adds up the seconds of calls that had to compile: dispatch alone takes under a millisecond.

    Float32 models multiply in full float32: accelerators would round the factors to bfloat16 or TF32.
    """

    def __init__(self, dtype: np.dtype):
        self.precision = "highest" if dtype == np.float32 else None
        self.seconds = 0.0

    def __call__(self, program: Any, *args: Any) -> Any:
        """What the program returns; its arrays may still be on their way."""
        known, started = program._cache_size(), time.perf_counter()
        with jax.default_matmul_precision(self.precision) if self.precision else contextlib.nullcontext():
            out = program(*args)
        if program._cache_size() != known:
            self.seconds += time.perf_counter() - started
        return out
