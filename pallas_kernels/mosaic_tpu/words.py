"""Words of 8-bit keys and values as numbers that a TPU multiplies, in registers: see `KVPages`.

v5e to v6e do not convert e4m3, but its sibling with a bias of 11: of the same bits a sixteenth of the number, subnormal
ones included. Two codes mean something else there. Minus zero, which caches do not hold, would be NaN; and NaN would
be a number, so that it is looked for.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels.mosaic_tpu.chip import LANES, SUBLANES
from pallas_kernels.mosaic_tpu.launch import Launch

_SIZES, _ONES, _SIGNS = 0x7F7F7F7F, 0x01010101, -0x7F7F7F80  # of the four bytes of an integer


def unit(launch: Launch) -> float:
    """What keys and values are to be multiplied by, beside the scales of their tokens."""
    return 16.0 if launch.quantized == "fp8" else 1.0


def keys_of(launch: Launch, words: jax.Array, wide: DTypeLike) -> jax.Array:
    """The keys of `words [tokens, H]`."""
    signed = pltpu.bitcast(words, jnp.int16).astype(jnp.int32)
    return _number(launch, signed << 24 >> 24 if launch.quantized == "int8" else signed, wide)


def values_of(launch: Launch, words: jax.Array, wide: DTypeLike) -> jax.Array:
    """The values of `words [tokens, H]`."""
    return _number(launch, pltpu.bitcast(words, jnp.int16).astype(jnp.int32) >> 8, wide)


def _number(launch: Launch, byte: jax.Array, wide: DTypeLike) -> jax.Array:
    """What the lowest byte of integers says."""
    if launch.quantized == "int8":
        return byte.astype(jnp.float32).astype(wide)
    return pltpu.bitcast(byte.astype(jnp.int8), jnp.float8_e4m3b11fnuz).astype(jnp.bfloat16).astype(wide)


def nan_of(words: jax.Array) -> jax.Array:
    """float32 `[1, H]`: NaN where some key or value of e4m3 is, else 0."""
    codes = pltpu.bitcast(words, jnp.int32)
    carried = (codes & _SIZES) + _ONES  # reaches the sign of a byte that is NaN
    while carried.shape[0] > SUBLANES:
        half = carried.shape[0] // 2
        carried = carried[:half] | carried[half:]
    found = jnp.max(jnp.where(carried & _SIGNS != 0, 1.0, 0.0), axis=0, keepdims=True)
    return jnp.where(found > 0.0, jnp.nan, 0.0)


def token_scales(launch: Launch, scales: Any, first: int, count: int) -> tuple[jax.Array, jax.Array]:
    """The scales of `count` pages from `first` on as rows `[1, tokens]`: of their keys and of their values.

    `scales [pages, 2 · page_size]` has the keys' before the values'.
    """
    size = launch.page_size
    if size == LANES:
        rows = [scales[pl.ds(page, 1), :] for page in range(first, first + count)]
        keys, values = ([row[:, part : part + size] for row in rows] for part in (0, size))
        return jnp.concatenate(keys, axis=1), jnp.concatenate(values, axis=1)
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    keys, values = [], []
    for page in range(first, first + count, 2):
        even, odd = scales[pl.ds(page, 1), :], scales[pl.ds(page + 1, 1), :]
        keys.append(jnp.where(lane < size, even, pltpu.roll(odd, size, 1)))
        values.append(jnp.where(lane < size, pltpu.roll(even, size, 1), odd))
    return jnp.concatenate(keys, axis=1), jnp.concatenate(values, axis=1)
