"""What a kernel must know of the chip that it is compiled for."""

from jax.experimental.pallas import tpu as pltpu


def cores() -> int:
    """TensorCores that one JAX device has: 2 on v4 and v5p, 1 elsewhere, and under the interpreter.

    The chip is that of the mesh in use (`jax.sharding.use_abstract_mesh`), else the default device's.
    """
    try:
        return pltpu.get_tpu_info().num_cores
    except ValueError:  # no TPU
        return 1
