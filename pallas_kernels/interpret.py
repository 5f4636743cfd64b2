"""The kernels without their machine: interpreted by JAX on a CPU, slowly, to look at them and to test them."""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def interpreted(implementation: str, params: Any = None) -> Iterator[None]:
    """Kernels of `implementation` that are traced inside run in JAX's interpreter of a TPU or of a GPU.

    Ops inside still have to be asked for the implementation by its name. Memory that nothing was written to reads as
    NaN there.

    A simulated GPU's warpgroups wait for each other, each in a thread of XLA's, which has as many as there are cores.
    On a machine with fewer than four, set the environment's `NPROC=8` before JAX starts, or they may wait forever.

    Args:
        implementation: "mosaic_tpu" or "mosaic_gpu".
        params: The simulated machine, `pltpu.InterpretParams` or `plgpu.InterpretGPUParams`; None takes JAX's defaults.

    Raises:
        ValueError: `implementation` has no kernels to interpret.
    """
    if implementation == "mosaic_tpu":
        from pallas_kernels.mosaic_tpu.chip import simulated
    elif implementation == "mosaic_gpu":
        from pallas_kernels.mosaic_gpu.common import simulated
    else:
        raise ValueError(f"{implementation!r} has no kernels to interpret; mosaic_tpu and mosaic_gpu have")
    with simulated(params):
        yield
