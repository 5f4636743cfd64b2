"""Several devices: rows of a batch divided among them, or the heads and widths of one model."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from lychee_jax.errors import UserError

DATA, CONTEXT, MODEL = "data", "context", "model"
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


def check_devices(tensor_parallel: int) -> None:
    """Raise UserError for a number of devices that there cannot be."""
    if tensor_parallel < 1:
        raise UserError(f"tensor_parallel is {tensor_parallel}; it must be at least 1")
    if tensor_parallel > len(jax.devices()):
        raise UserError(f"tensor_parallel is {tensor_parallel}, and this machine has {_named(len(jax.devices()))}")


def model_mesh(tensor_parallel: int) -> Mesh:
    """The first devices, along which one model is divided.

    Raises:
        UserError: there are not so many.
    """
    check_devices(tensor_parallel)
    return mesh_of(jax.devices()[:tensor_parallel])


def abstract_mesh(devices: int) -> AbstractMesh:
    """As many devices that need not be there."""
    return AbstractMesh((1, 1, devices), (DATA, CONTEXT, MODEL))


def mesh_of(devices: Sequence[Any]) -> Mesh:
    """These devices, along which one model is divided."""
    return Mesh(np.asarray(devices).reshape(1, 1, -1), (DATA, CONTEXT, MODEL))


def _named(count: int) -> str:
    kind = {"gpu": "GPU", "tpu": "TPU", "cpu": "CPU device"}.get(jax.default_backend(), "device")
    return f"{count} {kind}" + ("s" if count > 1 else "")
