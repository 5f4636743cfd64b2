"""`extend_attention` on TPU: `block_attention` over the chunk and over block after block of its past."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_tpu.block_attention import block_attention
from pallas_kernels.types import KVPages
from pallas_kernels.xla.prefill import block_tokens, cached_block, chunk_words, zero_padding
from pallas_kernels.xla.quantized import keys_and_values


@dataclasses.dataclass(frozen=True)
class ExtendConfig:
    """`key_block`: cached positions that one launch takes. Every launch reads the queries again, so it is large."""

    key_block: int = 4096


def extend_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv: KVPages,
    page_table: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    *,
    scale: float,
    config: ExtendConfig = ExtendConfig(),
) -> jax.Array:
    """See `pallas_kernels.extend_attention`: the past is gathered from the cache, the chunk comes from `k` and `v`.

    Of a quantised cache both are gathered, and rounded to the queries' dtype where tokens have scales.

    Raises:
        NotImplementedError: `block_attention` does not cover the case.
    """
    head_dim = q.shape[-1]
    block = block_tokens(kv.page_size, config.key_block)
    q, k, v = (zero_padding(x, counts) for x in (q, k, v))
    queries = q.transpose(0, 2, 3, 1, 4)

    def read(tiles: jax.Array, scales: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Keys and values `[B, K, S, H]`."""
        if kv.quantized is None:
            return tiles[..., :head_dim], tiles[..., head_dim:]
        both = keys_and_values(tiles, kv.quantized, jnp.float32)
        if scales is not None:
            both = both[0] * scales[0][..., None], both[1] * scales[1][..., None]
        return both[0].astype(q.dtype), both[1].astype(q.dtype)

    def attend(keys: jax.Array, values: jax.Array, valid: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        out, lse = block_attention(queries, keys, values, valid, scale=scale)
        return out.astype(jnp.float32), lse

    def past(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out, lse = carry
        tiles, scales, _ = cached_block(i, block, kv, page_table, starts)
        new_out, new_lse = attend(*read(tiles, scales), jnp.clip(starts - i * block, 0, block))
        # A block of which a row sees nothing has a log-sum-exp of almost −∞.
        both = jnp.logaddexp(lse, new_lse)
        return out * jnp.exp(lse - both)[..., None] + new_out * jnp.exp(new_lse - both)[..., None], both

    if kv.quantized is None:
        chunk = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    else:
        chunk = read(*chunk_words(kv, page_table, starts, counts, q.shape[1]))
    carry = attend(*chunk, None)
    out, _ = jax.lax.fori_loop(0, (jnp.max(starts) + block - 1) // block, past, carry)
    return out.transpose(0, 3, 1, 2, 4).astype(q.dtype)
