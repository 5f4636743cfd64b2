"""GPU kernels without a GPU: JAX's interpreter with race detection, and lowering for CUDA."""

import contextlib
import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax._src.pallas.mosaic_gpu import lowering
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

import pallas_kernels
from pallas_kernels import mosaic_gpu
from pallas_kernels.mosaic_gpu.common import targeting
from pallas_kernels.mosaic_gpu.config import DecodeConfig

# Every load is a call back to Python in the interpreter, so that less is unrolled; the code is the same.
FEW = DecodeConfig(held_rows=4, merge_warpgroups=2, merge_least=1, merge_most=2)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Kernels traced inside run on a simulated GPU, where a race is an error, and unwritten memory is NaN."""
    gpu_callbacks.reset_gpu_interpret_mode_state()
    params = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    with pallas_kernels.interpreted("mosaic_gpu", params):
        try:
            yield
            found = gpu_callbacks._races is not None and gpu_callbacks.get_races().races_found
        finally:
            gpu_callbacks.reset_gpu_interpret_mode_state()
            jax.clear_caches()  # simulated kernels are large programs, and no other test runs the same one
    assert not found, "the interpreter saw a data race; it is printed above"


def run(op: Any, *args: Any, **options: Any) -> Any:
    """One call of an op as a GPU kernel under the interpreter; only JAX's arrays are unknown while tracing."""
    if op is not pallas_kernels.extend_attention:
        options["config"] = FEW
    arrays = {name: value for name, value in options.items() if isinstance(value, jax.Array)}
    known = {name: value for name, value in options.items() if name not in arrays}
    call = functools.partial(getattr(mosaic_gpu, op.__name__), **known)
    with interpreted():
        return jax.block_until_ready(jax.jit(call)(*args, **arrays))


def lower(function: Any, *args: Any) -> str:
    """The CUDA module of a function that is traced for a Hopper GPU; nothing is compiled by ptxas."""
    with targeting("cuda"):
        return jax.export.export(jax.jit(function), platforms=["cuda"])(*args).mlir_module()


def unsigned(code: list[str]) -> list[str]:
    """Lines of kernels that compare integers as unsigned ones: none of ours are, but JAX forgets signs.

    A choice between a constant and an array is one such case; only the hardware shows it.
    """
    return [line for text in code for line in text.splitlines() if re.search(r"\b(maxui|minui|umax|umin|cmpi u)", line)]


def kernels(function: Any, *args: Any) -> list[str]:
    """The code of every kernel in a function that is traced for a Hopper GPU, before LLVM sees it."""
    made = lowering.lower_jaxpr_to_module
    found: list[str] = []

    def keep(*args: Any, **options: Any) -> Any:
        result = made(*args, **options)
        found.append(str(result.module))
        return result

    jax.clear_caches()  # what was lowered before would not be lowered again
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowering, "lower_jaxpr_to_module", keep)
        lower(function, *args)
    return found
