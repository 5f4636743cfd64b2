"""Weights of 8 bits: a symmetric scale for each output channel, no calibration."""

from typing import cast, get_args

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, Shaped

from lychee_jax.config import Quantization
from lychee_jax.errors import UserError

STORED = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}
"""What the kernels are stored as."""
_LARGEST = {"int8": 127.0, "fp8": 448.0}
_BLOCK = 1 << 22  # numbers that are widened to float32 at once


def check_quantization(quantize: str | None, quantize_head: bool = False) -> Quantization | None:
    """The quantization of that name; None keeps the weights as they are.

    Raises:
        UserError: there is none of that name, or the output head alone is to have one.
    """
    if quantize not in (None, *get_args(Quantization)):
        raise UserError(f"quantize is {quantize!r}; use {' or '.join(get_args(Quantization))}, or none at all")
    if quantize_head and quantize is None:
        raise UserError("quantize_head says that the output head is quantised, too, and quantize is none")
    return cast(Quantization | None, quantize)


def quantize_kernel(
    kernel: Float[np.ndarray, "out in"], quantize: Quantization
) -> tuple[Shaped[np.ndarray, "out in"], Float32[np.ndarray, " out"]]:
    """The kernel in 8 bits, and the scale of each output channel: `kernel ≈ stored · scale[:, None]`.

    A channel's largest number becomes the largest of the format (127, or 448 for e4m3), so nothing is clipped; the
    others are rounded to the nearest, ties to even. A channel of zeros has the scale 1. A block of rows is widened at
    a time.

    Raises:
        UserError: a weight that is not finite.
    """
    stored = np.empty(kernel.shape, STORED[quantize])
    scale = np.ones(kernel.shape[0], np.float32)
    step = max(1, _BLOCK // max(1, kernel.shape[1]))
    for first in range(0, kernel.shape[0], step):
        rows = slice(first, first + step)
        block = kernel[rows].astype(np.float32)
        largest = np.abs(block).max(axis=1, initial=0.0)
        if not np.isfinite(largest).all():
            raise UserError("a weight is NaN or infinite, and has no scale in 8 bits")
        scale[rows] = np.where(largest > 0, largest / np.float32(_LARGEST[quantize]), np.float32(1))
        # A subnormal channel's scale may be 0 in float32: it is a channel of zeros then.
        scale[rows] = np.where(scale[rows] > 0, scale[rows], np.float32(1))
        scaled = block / scale[rows, None]
        if quantize == "int8":
            scaled = np.clip(np.rint(scaled), -127, 127)
        else:
            scaled = np.clip(scaled, -_LARGEST["fp8"], _LARGEST["fp8"])
        stored[rows] = scaled.astype(stored.dtype)
    return stored, scale
