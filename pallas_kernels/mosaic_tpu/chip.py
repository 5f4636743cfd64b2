"""What a kernel must know of the chip that it is compiled for."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu

LANES = 128
SUBLANES = 8  # of float32

_simulated: contextvars.ContextVar[pltpu.InterpretParams | None] = contextvars.ContextVar("_simulated", default=None)


@contextlib.contextmanager
def simulated(params: pltpu.InterpretParams | None = None) -> Iterator[None]:
    """Trace for JAX's TPU interpreter: see `pallas_kernels.interpreted`."""
    params = pltpu.InterpretParams() if params is None else params
    token = _simulated.set(params)
    try:
        with pltpu.force_tpu_interpret_mode(params):  # for kernels of JAX's own
            yield
    finally:
        _simulated.reset(token)
        # A kernel that raised leaves its memory behind, and the next one would find it.
        pltpu.reset_tpu_interpret_mode_state()


def interpreter() -> Any:
    """What to give to `pallas_call`'s `interpret`. JAX's own switch is bound to a thread, and programs are also traced
    by other threads, which copy the context.
    """
    return False if _simulated.get() is None else _simulated.get()


def cores() -> int:
    """TensorCores that one JAX device has: 2 on v4 and v5p, 1 elsewhere.

    The chip is the simulated one, else that of the mesh in use (`jax.sharding.use_abstract_mesh`), else the default
    device's.

    Raises:
        NotImplementedError: it is no TPU.
    """
    params = _simulated.get()
    if params is not None:
        return params.num_cores_or_threads
    try:
        return pltpu.get_tpu_info().num_cores
    except ValueError:
        raise NotImplementedError(f"mosaic_tpu runs on TPUs, and JAX sees a {jax.default_backend()} here") from None
