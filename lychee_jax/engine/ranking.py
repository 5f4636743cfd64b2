"""The best entries of a row without sorting it: compilers take long over a sort of a whole vocabulary.

Entries are ranked by value, equal values by index (the lowest first). A head of that ranking is everything above some
value and the first few of those equal to it, so it is found by bisection, in passes over the row.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt32


def head(
    values: Float32[Array, "B V"], weights: Float32[Array, "B V"], least: Float32[Array, " B"]
) -> Bool[Array, "B V"]:
    """Which entries make up the shortest head of each row's ranking whose weights sum to at least `least`.

    The whole row if they never do. Sums are float32: in which order they are taken is the compiler's choice, so that a
    head whose weight is within rounding of `least` may be an entry longer or shorter.

    Args:
        values: what is ranked, no NaN.
        weights: not negative.
        least: above 0.
    """
    image = _ordered_bits(values)
    index = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)

    def weight(of: Bool[Array, "B V"]) -> Float32[Array, " B"]:
        return jnp.sum(jnp.where(of, weights, 0.0), axis=-1)

    def raise_value(bit: jax.Array, cut: UInt32[Array, " B"]) -> UInt32[Array, " B"]:
        higher = cut | (jnp.uint32(1) << (31 - bit).astype(jnp.uint32))
        return jnp.where(weight(image >= higher[:, None]) >= least, higher, cut)

    cut = jax.lax.fori_loop(0, 32, raise_value, jnp.zeros(values.shape[:1], jnp.uint32))[:, None]
    above, equal = image > cut, image == cut
    bits = (values.shape[1] - 1).bit_length()

    def raise_index(bit: jax.Array, last: Int32[Array, " B"]) -> Int32[Array, " B"]:
        higher = last | (1 << (bits - 1 - bit))
        return jnp.where(weight(above | (equal & (index < higher[:, None]))) < least, higher, last)

    last = jax.lax.fori_loop(0, bits, raise_index, jnp.zeros(values.shape[:1], jnp.int32))
    return above | (equal & (index <= last[:, None]))


def best(values: Float32[Array, "B V"], count: int) -> tuple[Float32[Array, "B top"], Int32[Array, "B top"]]:
    """The first `count` entries of each row's ranking, and their indices; for a few of them. No NaN."""
    batch, size = values.shape
    index = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)

    def next_best(
        place: jax.Array, found: tuple[Float32[Array, "B top"], Int32[Array, "B top"], jax.Array, jax.Array]
    ) -> tuple[jax.Array, ...]:
        top, ids, value, last = found
        # What ranks after the last one found; nothing is written, so that the row is never copied.
        worse = (values < value[:, None]) | ((values == value[:, None]) & (index > last[:, None]))
        value = jnp.max(jnp.where(worse, values, -jnp.inf), axis=-1)
        last = jnp.min(jnp.where(worse & (values == value[:, None]), index, size), axis=-1)
        return top.at[:, place].set(value), ids.at[:, place].set(last), value, last

    none = jnp.zeros((batch, count), jnp.float32), jnp.zeros((batch, count), jnp.int32)
    start = (*none, jnp.full((batch,), jnp.inf, jnp.float32), jnp.full((batch,), -1, jnp.int32))
    top, ids, _, _ = jax.lax.fori_loop(0, count, next_best, start)
    return top, ids


def _ordered_bits(values: Float32[Array, "B V"]) -> UInt32[Array, "B V"]:
    """Integers in the order of the values, equal ones for equal values."""
    bits = jax.lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), jnp.uint32)  # −0 is 0
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))
