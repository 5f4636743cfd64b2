"""Dense attention of many new tokens at once: over a whole sequence, or over a chunk and its cached past.

Neither form holds a T × S score matrix: keys come in blocks, and the blocks' softmaxes are merged by log-sum-exp.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.types import KVPages
from pallas_kernels.xla.config import XlaConfig
from pallas_kernels.xla.decode import MASKED
from pallas_kernels.xla.quantized import keys_and_values


class _Partial:
    """A running softmax over blocks of keys: maximum, normaliser and unnormalised output, all float32."""

    @staticmethod
    def start(lead: tuple[int, ...], head_dim: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        return (
            jnp.full(lead, MASKED, jnp.float32),
            jnp.zeros(lead, jnp.float32),
            jnp.zeros((*lead, head_dim), jnp.float32),
        )

    @staticmethod
    def add(carry, scores: jax.Array, values: jax.Array):
        """Fold in `scores [B K G T S]` (masked ones at `MASKED`) with `values [B S K H]`."""
        top, total, out = carry
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        # Where nothing has been seen yet, score and maximum are both MASKED and exp would give 1.
        weights = jnp.where(scores > MASKED / 2, jnp.exp(scores - new_top[..., None]), 0.0)
        shrink = jnp.exp(top - new_top)
        total = total * shrink + jnp.sum(weights, axis=-1)
        product = jnp.einsum(
            "bkgts,bskh->bkgth", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
        )
        return new_top, total, out * shrink[..., None] + product

    @staticmethod
    def finish(carry, dtype) -> jax.Array:
        """`[B T K G H]`; a query that saw no key gives zeros."""
        _, total, out = carry
        out = out / jnp.maximum(total, 1e-30)[..., None]
        return out.transpose(0, 3, 1, 2, 4).astype(dtype)


def _scores(q: jax.Array, k: jax.Array, scale: float) -> jax.Array:
    return scale * jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)


def block_tokens(page_size: int, tokens: int) -> int:
    """Whole pages of about `tokens` tokens."""
    return max(1, tokens // page_size) * page_size


def cached_block(
    index: jax.Array, block: int, kv: KVPages, page_table: jax.Array, starts: jax.Array
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """What the cache holds of one block of positions, `[B, K, block, …]`, the scales of keys and values `[2, B, K,
    block]` if it has any, both zero from `starts[b]` on; and which positions are below, `[B, block]`.
    """
    batch, (_, kv_heads, page_size, width) = starts.shape[0], kv.data.shape
    pages = block // page_size
    heads = jnp.arange(kv_heads, dtype=jnp.int32)
    # Whole blocks of logical pages; entries that lie past the row's length may hold anything and are not followed.
    logical = index * pages + jnp.arange(pages, dtype=jnp.int32)
    inside = logical[None, :] * page_size < starts[:, None]
    ids = jnp.take(page_table, jnp.minimum(logical, page_table.shape[1] - 1), axis=1)
    where = jnp.where(inside, ids, 0)[:, None, :], heads[None, :, None]
    tiles = kv.data[where].reshape(batch, kv_heads, block, width)
    position = index * block + jnp.arange(block, dtype=jnp.int32)
    seen = position[None, :] < starts[:, None]
    scales = None
    if kv.scales is not None:
        scales = kv.scales[where].reshape(batch, kv_heads, pages, 2, page_size)
        scales = jnp.moveaxis(scales, 3, 0).reshape(2, batch, kv_heads, block)
        scales = jnp.where(seen[:, None, :], scales, 0.0)
    return jnp.where(seen[:, None, :, None], tiles, jnp.zeros((), tiles.dtype)), scales, seen


def chunk_words(
    kv: KVPages, page_table: jax.Array, starts: jax.Array, counts: jax.Array, length: int
) -> tuple[jax.Array, jax.Array | None]:
    """The words `[B, K, T, H]` that a quantised cache holds of a chunk, and the scales `[2, B, K, T]` if it has any;
    both zero past the chunk's tokens.
    """
    batch, (_, kv_heads, page_size, width) = starts.shape[0], kv.data.shape
    # Whole pages, and the chunk cut out of them: it may begin anywhere in the first.
    pages = -(-length // page_size) + 1
    logical = starts[:, None] // page_size + jnp.arange(pages, dtype=jnp.int32)
    inside = logical * page_size < (starts + counts)[:, None]
    ids = jnp.take_along_axis(page_table, jnp.minimum(logical, page_table.shape[1] - 1), axis=1)
    where = jnp.where(inside, ids, 0)[:, None, :], jnp.arange(kv_heads, dtype=jnp.int32)[None, :, None]
    real = (jnp.arange(length, dtype=jnp.int32) < counts[:, None])[:, None, :, None]

    def cut(tokens: jax.Array) -> jax.Array:
        """`[B, K, pages · page_size, …]` to `[B, K, T, …]`."""
        take = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=length, axis=1)
        return jnp.where(real, jax.vmap(take)(tokens, starts % page_size), jnp.zeros((), tokens.dtype))

    words = cut(kv.data[where].reshape(batch, kv_heads, pages * page_size, width))
    if kv.scales is None:
        return words, None
    scales = kv.scales[where].reshape(batch, kv_heads, pages, 2, page_size)
    scales = cut(jnp.swapaxes(scales, 3, 4).reshape(batch, kv_heads, pages * page_size, 2))
    return words, jnp.moveaxis(scales, 3, 0)


def zero_padding(x: Float[Array, "B T *rest"], counts: Int[Array, " B"]) -> Float[Array, "B T *rest"]:
    """Zeros for what lies past the first `counts[b]` tokens: a weight of 0 does not stop a NaN."""
    real = jnp.arange(x.shape[1], dtype=jnp.int32) < counts[:, None]
    return jnp.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), x, jnp.zeros((), x.dtype))


def extend_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    kv: KVPages,
    page_table: Int[Array, "B P"],
    starts: Int[Array, " B"],
    counts: Int[Array, " B"],
    *,
    scale: float,
    config: XlaConfig = XlaConfig(),
) -> Float[Array, "B T K G H"]:
    """Causal attention of a chunk of new tokens at positions `starts[b] + t` over the cached positions < `starts[b]`
    and over the chunk itself; see `pallas_kernels.extend_attention`.

    The work on the past follows the longest row's `starts`, not the cache's capacity.
    """
    batch, length, kv_heads, groups, head_dim = q.shape
    q = zero_padding(q, counts)
    # Whatever the capacity, the same blocks: a row's sums must not depend on the longest row of its batch.
    block = block_tokens(kv.page_size, config.key_block)
    # 8 bits are exact in bfloat16, and scales may be smaller than float16 can say.
    wide = jnp.dtype(jnp.bfloat16 if q.dtype == jnp.bfloat16 else jnp.float32)
    # All queries of a KV head as rows of one matrix, once: no block of keys or scores is transposed in the loop.
    queries = q.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, groups * length, head_dim)
    queries = queries if kv.quantized is None else queries.astype(wide)

    def halves(tiles: jax.Array) -> tuple[jax.Array, jax.Array]:
        if kv.quantized is None:
            return tiles[..., :head_dim], tiles[..., head_dim:]
        return keys_and_values(tiles, kv.quantized, wide)

    def add(carry, keys: jax.Array, values: jax.Array, scales: jax.Array | None, mask: jax.Array):
        """Fold in keys and values `[B K S H]` and their scales; `mask` broadcasts to the scores `[B K G·T S]`."""
        top, total, out = carry
        scores = scale * jnp.einsum("bkmh,bksh->bkms", queries, keys, preferred_element_type=jnp.float32)
        if scales is not None:
            scores = scores * scales[0][:, :, None]
        scores = jnp.where(mask, scores, MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        # Wholly masked rows get weights of 1 here; the chunk itself, which comes last, shrinks them to nothing.
        weights = jnp.exp(scores - new_top[..., None])
        shrink = jnp.exp(top - new_top)
        total = total * shrink + jnp.sum(weights, axis=-1)
        if scales is not None:
            weights = weights * scales[1][:, :, None]
        product = jnp.einsum(
            "bkms,bksh->bkmh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
        )
        return new_top, total, out * shrink[..., None] + product

    def past(i, carry):
        tiles, scales, seen = cached_block(i, block, kv, page_table, starts)
        return add(carry, *halves(tiles), scales, seen[:, None, None, :])

    lead = (batch, kv_heads, groups * length)
    carry = (
        jnp.full(lead, MASKED, jnp.float32),
        jnp.zeros(lead, jnp.float32),
        jnp.zeros((*lead, head_dim), jnp.float32),
    )
    carry = jax.lax.fori_loop(0, (jnp.max(starts) + block - 1) // block, past, carry)
    causal = jnp.tile(jnp.tril(jnp.ones((length, length), bool)), (groups, 1))
    if kv.quantized is None:
        keys, values = (zero_padding(x, counts).transpose(0, 2, 1, 3) for x in (k, v))
        scales = None
    else:
        words, scales = chunk_words(kv, page_table, starts, counts, length)
        keys, values = keys_and_values(words, kv.quantized, wide)
    _, total, out = add(carry, keys, values, scales, causal[None, None])
    out = (out / total[..., None]).reshape(batch, kv_heads, groups, length, head_dim)
    return out.transpose(0, 3, 1, 2, 4).astype(q.dtype)


def causal_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    scale: float,
    config: XlaConfig = XlaConfig(),
) -> Float[Array, "B T K G H"]:
    """Causal attention within whole sequences; differentiable, with memory linear in T."""
    batch, length, kv_heads, groups, head_dim = q.shape
    if jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and length % 64 == 0:
        out = jax.nn.dot_product_attention(
            q.reshape(batch, length, kv_heads * groups, head_dim), k, v, scale=scale, is_causal=True,
            implementation="cudnn",
        )  # fmt: skip
        return out.reshape(q.shape)

    block = min(config.query_block, length)
    padding = -length % block
    blocks = (length + padding) // block
    padded = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0), (0, 0)))
    padded = padded.reshape(batch, blocks, block, kv_heads, groups, head_dim).transpose(1, 0, 2, 3, 4, 5)

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def rows(queries: jax.Array, first: jax.Array) -> jax.Array:
        scores = _scores(queries, k, scale)
        causal = (first + jnp.arange(block))[:, None] >= jnp.arange(length)[None, :]
        scores = jnp.where(causal[None, None, None], scores, MASKED)
        carry = _Partial.add(_Partial.start((batch, kv_heads, groups, block), head_dim), scores, v)
        return _Partial.finish(carry, q.dtype)

    out = jax.lax.map(lambda xs: rows(*xs), (padded, block * jnp.arange(blocks)))
    return out.transpose(1, 0, 2, 3, 4, 5).reshape(batch, blocks * block, kv_heads, groups, head_dim)[:, :length]
