"""Several devices: rows of a batch divided among them, weights on each."""

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from lychee_jax.errors import UserError

DATA = "data"
ROWS, EVERYWHERE = PartitionSpec(DATA), PartitionSpec()


def data_mesh(batch: int) -> Mesh:
    """All devices in one line, along which rows are divided.

    Raises:
        UserError: `batch` rows cannot be divided among the devices.
    """
    devices = jax.devices()
    if batch % len(devices):
        raise UserError(f"a batch of {batch} rows cannot be divided among {len(devices)} devices; use a multiple")
    return Mesh(np.asarray(devices), (DATA,))
