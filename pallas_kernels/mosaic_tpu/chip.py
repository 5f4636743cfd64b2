"""What a kernel must know of the chip that it is compiled for."""

import jax
from jax.experimental.pallas import tpu as pltpu


def cores() -> int:
    """TensorCores that one JAX device has: 2 on v4 and v5p, 1 elsewhere.

    The chip is that of the mesh in use (`jax.sharding.use_abstract_mesh`), else the default device's.

    Raises:
        NotImplementedError: it is no TPU.
    """
    try:
        return pltpu.get_tpu_info().num_cores
    except ValueError:
        raise NotImplementedError(f"mosaic_tpu runs on TPUs, and JAX sees a {jax.default_backend()} here") from None
