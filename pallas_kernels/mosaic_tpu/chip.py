"""What a kernel must know of the chip that it is compiled for."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
from jax.experimental.pallas import tpu as pltpu

LANES = 128
SUBLANES = 8  # of float32

_simulated: contextvars.ContextVar[int | None] = contextvars.ContextVar("_simulated", default=None)


@contextlib.contextmanager
def simulated(params: pltpu.InterpretParams | None = None) -> Iterator[None]:
    """Trace for JAX's TPU interpreter: see `pallas_kernels.interpreted`."""
    params = pltpu.InterpretParams() if params is None else params
    token = _simulated.set(params.num_cores_or_threads)
    try:
        with pltpu.force_tpu_interpret_mode(params):
            yield
    finally:
        _simulated.reset(token)
        # A kernel that raised leaves its memory behind, and the next one would find it.
        pltpu.reset_tpu_interpret_mode_state()


def cores() -> int:
    """TensorCores that one JAX device has: 2 on v4 and v5p, 1 elsewhere.

    The chip is the simulated one, else that of the mesh in use (`jax.sharding.use_abstract_mesh`), else the default
    device's.

    Raises:
        NotImplementedError: it is no TPU.
    """
    simulated_cores = _simulated.get()
    if simulated_cores is not None:
        return simulated_cores
    try:
        return pltpu.get_tpu_info().num_cores
    except ValueError:
        raise NotImplementedError(f"mosaic_tpu runs on TPUs, and JAX sees a {jax.default_backend()} here") from None
