"""8-bit keys and values: how they are rounded, and how they are read. See `KVPages` for how they lie in a cache."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, UInt16

from pallas_kernels.types import KVDtype

_LARGEST_INT8, _LARGEST_FP8 = 127.0, 448.0


def quantize_kv(
    kv: Float[Array, "*lead HH"], dtype: KVDtype
) -> tuple[UInt16[Array, "*lead H"], Float32[Array, "*lead 2"] | None]:
    """Keys `kv[..., :H]` and values `kv[..., H:]` as words, and for "int8" the scale of each.

    int8: the largest number of a token's key in one head becomes 127, the others are rounded to the nearest, ties to
    even; values likewise. fp8: rounded to e4m3, numbers beyond 448 become 448, and minus zero becomes zero. What is not
    finite is not finite when it is read, either.
    """
    halves = kv.astype(jnp.float32).reshape(*kv.shape[:-1], 2, kv.shape[-1] // 2)
    if dtype == "fp8":
        near = jnp.clip(halves, -_LARGEST_FP8, _LARGEST_FP8)
        stored, scales = jnp.where(jnp.isfinite(halves), near, jnp.nan).astype(jnp.float8_e4m3fn), None
    else:
        largest = jnp.max(jnp.abs(halves), axis=-1)
        scales = largest * (1.0 / _LARGEST_INT8)  # what XLA makes of a division by a constant, said here
        # What is too small for a scale, zeros above all, is read as zero; what is not finite, by its scale.
        divisor = jnp.where(scales > 0.0, scales, 1.0)[..., None]
        near = jnp.clip(jnp.rint(halves / divisor), -_LARGEST_INT8, _LARGEST_INT8)
        stored = jnp.where(jnp.isfinite(near), near, 0.0).astype(jnp.int8)
    codes = jax.lax.bitcast_convert_type(stored, jnp.uint8)
    codes = jnp.where(codes == 0x80, jnp.uint8(0), codes)  # minus zero, and no other number of either format
    low, high = jnp.split(codes.astype(jnp.uint16), 2, axis=-2)
    return (low | high << 8)[..., 0, :], scales


def keys_and_values(
    words: UInt16[Array, "*lead H"], dtype: KVDtype, wide: DTypeLike
) -> tuple[Float[Array, "*lead H"], Float[Array, "*lead H"]]:
    """The keys and the values of words as numbers of a type that holds them exactly, not scaled yet."""
    if dtype == "int8":
        signed = jax.lax.bitcast_convert_type(words, jnp.int16)
        return (signed << 8 >> 8).astype(wide), (signed >> 8).astype(wide)
    low, high = (words & 0xFF).astype(jnp.uint8), (words >> 8).astype(jnp.uint8)
    key, value = (jax.lax.bitcast_convert_type(half, jnp.float8_e4m3fn) for half in (low, high))
    return key.astype(wide), value.astype(wide)
