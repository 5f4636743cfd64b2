"""TPU kernels without a TPU: JAX's interpreter with every check that it has."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

import pallas_kernels
from pallas_kernels import mosaic_tpu
from pallas_kernels.mosaic_tpu.config import TpuConfig


@contextlib.contextmanager
def interpreted(cores: int = 1) -> Iterator[None]:
    """Kernels traced inside run on a simulated TPU of `cores` TensorCores, where a race, a read out of bounds and the
    use of memory that nothing was written to are errors, the last by its NaN.
    """
    params = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise", num_cores_or_threads=cores
    )
    with pallas_kernels.interpreted("mosaic_tpu", params):
        try:
            yield
            found = interpreter.races is not None and interpreter.races.races_found
        finally:
            jax.clear_caches()  # simulated kernels are large programs, and no other test runs the same one
    assert not found, "the interpreter saw a data race; it is printed above"


def run(op: Any, *args: Any, cores: int = 1, config: TpuConfig | None = None, **static: Any) -> Any:
    """One call of an op as a TPU kernel under the interpreter; NumPy arrays among `static` are known while tracing."""
    if config is None:
        call = functools.partial(op, implementation="mosaic_tpu", **static)
    else:
        call = functools.partial(getattr(mosaic_tpu, op.__name__), config=config, **static)
    with interpreted(cores):
        return jax.block_until_ready(jax.jit(call)(*args))
