"""TPU kernels without a TPU: JAX's interpreter with every check that it has."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

import pallas_kernels


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


def run(op: Any, *args: Any, cores: int = 1, **static: Any) -> Any:
    """One call of an op as a TPU kernel under the interpreter."""
    with interpreted(cores):
        return jax.block_until_ready(jax.jit(lambda *args: op(*args, implementation="mosaic_tpu", **static))(*args))
