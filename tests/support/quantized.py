"""8-bit keys and values once more, in NumPy: the judge of what caches store and of what is read.

It imports nothing of the packages but how a pool is called, and no type of 8 bits: the numbers of e4m3 are counted out
from its definition.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels.types import KVPages

Array = np.ndarray


def _e4m3(code: int) -> float:
    """Sign, four bits of exponent with a bias of 7, three of mantissa; all ones is NaN, and there is no infinity."""
    sign, exponent, mantissa = (-1.0 if code & 0x80 else 1.0), code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E4M3 = np.array([_e4m3(code) for code in range(256)], np.float64)


_BETWEEN = (E4M3[:0x7E] + E4M3[1:0x7F]) / 2


def e4m3_codes(x: Array) -> Array:
    """The nearest numbers of e4m3, ties to the even code; beyond the largest, the largest. No zero has a sign."""
    size = np.abs(x.astype(np.float64))
    below = np.searchsorted(_BETWEEN, size)  # the lower one where two are as near
    tie = np.append(_BETWEEN, np.inf)[below] == size
    codes = np.where(np.isfinite(size), below + (tie & (below % 2 == 1)), 0x7F)
    return np.where(np.signbit(x) & (codes > 0), codes + 0x80, codes).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a cache is to hold of numbers `[…, n]`: a byte each, for int8 with a scale `[…]`, and what is read of it."""

    bytes: Array
    scales: Array | None
    read: Array


def store(x: Array, kind: str) -> Stored:
    """Round the last axis of `x` as a key or a value of one token and head."""
    x = np.asarray(x, np.float32)
    if kind == "fp8":
        codes = e4m3_codes(x)
        return Stored(codes, None, E4M3[codes])
    scales = np.abs(x).max(axis=-1) * (np.float32(1) / np.float32(127))
    numbers = np.round(x / np.where(scales > 0, scales, 1)[..., None]).astype(np.int8)
    read = numbers.astype(np.float64) * scales[..., None].astype(np.float64)
    return Stored(numbers.view(np.uint8), scales, read)


@dataclasses.dataclass(frozen=True)
class Pool:
    """A pool of floats `[num_pages, K, page_size, 2H]` in 8 bits: `words`, `scales`, and the floats that are read.

    What is read is stored as it was, but for the last bit of a scale.
    """

    words: Array
    scales: Array | None
    read: Array


def store_pool(pool: Array, kind: str) -> Pool:
    """Keys in the low bytes, values in the high ones. NaN, where nothing was written, becomes what reads as NaN."""
    rng = np.random.default_rng(5)
    unwritten = np.isnan(pool).any(axis=-1)
    clean = np.where(unwritten[..., None], 0, pool.astype(np.float32))
    keys, values = (store(half, kind) for half in np.split(clean, 2, axis=-1))
    words = keys.bytes.astype(np.uint16) + 256 * values.bytes.astype(np.uint16)
    garbage = np.full(words.shape, 0x7FFF) if kind == "fp8" else rng.integers(0, 1 << 16, words.shape)
    words = np.where(unwritten[..., None], garbage, words).astype(np.uint16)
    read = np.where(unwritten[..., None], np.nan, np.concatenate([keys.read, values.read], axis=-1))
    if keys.scales is None or values.scales is None:
        return Pool(words, None, read)
    scales = np.concatenate([keys.scales, values.scales], axis=-1)
    return Pool(words, np.where(np.tile(unwritten, 2), np.float32(np.nan), scales), read)


def as_pages(pool: Array, kind: str | None) -> KVPages:
    """A pool of floats on the device: as it is, or in 8 bits."""
    if kind is None:
        return KVPages(jnp.asarray(pool))
    stored = store_pool(pool, kind)
    return KVPages(jnp.asarray(stored.words), None if stored.scales is None else jnp.asarray(stored.scales))
