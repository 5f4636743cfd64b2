"""`block_attention` on TPU: JAX's own splash attention kernel, for the many queries of a prefill."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from pallas_kernels.mosaic_tpu import chip
from pallas_kernels.mosaic_tpu.chip import LANES
from pallas_kernels.mosaic_tpu.config import TpuConfig


def block_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None,
    *,
    scale: float,
    config: TpuConfig = TpuConfig(),
) -> tuple[jax.Array, jax.Array]:
    """Attention of queries `[B, K, G, T, H]` over one block of keys and values `[B, K, S, H]`, and its natural
    log-sum-exps `[B, K, G, T]`, by which blocks are merged.

    Every query sees the first `valid[b]` keys; with None, T = S and query t sees keys 0 … t. The scale is folded into
    the queries, in their own precision.
    """
    chip.cores()  # refuse where there is no TPU
    queries, head_dim, keys = *q.shape[3:], k.shape[2]
    if q.dtype != jnp.bfloat16 or k.dtype != jnp.bfloat16:
        raise NotImplementedError("mosaic_tpu reads blocks of bfloat16: splash attention rounds float32 products")
    if head_dim not in (64, 128):
        raise NotImplementedError(f"mosaic_tpu covers head_dim 64 and 128, not {head_dim}")
    query_block, key_block = min(queries, config.prefill_query_block), min(keys, config.prefill_key_block)
    if queries % LANES or keys % LANES or queries % query_block or keys % key_block:
        raise NotImplementedError(f"mosaic_tpu takes whole blocks, not {queries} queries and {keys} keys")
    return _launch(q, k, v, valid, scale, splash.BlockSizes(block_q=query_block, block_kv=key_block))


@functools.partial(jax.jit, static_argnums=(4, 5))  # layers share one trace
def _launch(
    q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None, scale: float, blocks: splash.BlockSizes
) -> tuple[jax.Array, jax.Array]:
    batch, kv_heads, groups, queries, head_dim = q.shape
    keys = k.shape[2]
    shape = (queries, keys)
    mask = masks.CausalMask(shape) if valid is None else masks.FullMask(shape)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * (kv_heads * groups)),
        block_sizes=blocks, head_shards=1, q_seq_shards=1, save_residuals=True,
    )  # fmt: skip
    query = (q.astype(jnp.float32) * scale).astype(q.dtype).reshape(batch, kv_heads * groups, queries, head_dim)
    outs, sums = [], []
    for row in range(batch):  # the prefill's batches are of one row
        segments = None
        if valid is not None:
            # Keys past the row's valid ones belong to a segment that no query is of.
            beyond = (jnp.arange(keys, dtype=jnp.int32) >= valid[row]).astype(jnp.int32)
            segments = splash.SegmentIds(jnp.zeros((queries,), jnp.int32), beyond)
        out, (lse,) = kernel(query[row], k[row], v[row], segments)
        outs.append(out)
        sums.append(lse)
    return jnp.stack(outs).reshape(q.shape), jnp.stack(sums).reshape(q.shape[:-1])
