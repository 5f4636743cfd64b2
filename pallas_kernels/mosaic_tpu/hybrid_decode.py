"""`hybrid_decode` on TPU: sparse heads in one launch, retrieval heads in another, then their selection.

A TensorCore runs one program at a time and each launch streams without a gap, so that nothing is won by mixing roles.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_tpu.dense_decode import dense_decode
from pallas_kernels.mosaic_tpu.select import select_pages
from pallas_kernels.mosaic_tpu.sparse_decode import sparse_decode
from pallas_kernels.types import Heads, KVPages, Selection, SelectionSpec


def _others(heads: Heads, kv_heads: int) -> jax.Array:
    """The KV heads that `heads` does not name, ascending; without a sort, which TPUs are slow at."""
    ids = jnp.arange(kv_heads, dtype=jnp.int32)
    free = jnp.all(ids[:, None] != heads[None, :], axis=1)
    rank = jnp.sum(free[None, :] & (ids[None, :] < ids[:, None]), axis=1, dtype=jnp.int32)
    places = jnp.arange(kv_heads - heads.shape[0], dtype=jnp.int32)
    return jnp.sum(jnp.where(free & (rank == places[:, None]), ids, 0), axis=1, dtype=jnp.int32)


def _put(whole: jax.Array, heads: Heads, some: jax.Array) -> jax.Array:
    """`whole [B, K, …]` with `some [B, R, …]` at `heads`: selects, which fuse, where a scatter would be an op."""
    ids = jnp.arange(whole.shape[1], dtype=jnp.int32).reshape(1, -1, *[1] * (whole.ndim - 2))
    for index in range(heads.shape[0]):
        whole = jnp.where(ids == heads[index], some[:, index : index + 1], whole)
    return whole


def hybrid_decode(
    q: jax.Array,
    kv: KVPages,
    page_table: jax.Array,
    lengths: jax.Array,
    selection: Selection,
    heads: Heads,
    spec: SelectionSpec,
    *,
    scale: float,
    dense: jax.Array | None = None,
) -> tuple[jax.Array, Selection]:
    """See `xla.decode.hybrid_decode`."""
    if dense is not None:
        raise NotImplementedError("mosaic_tpu has no dense rows beside hybrid ones")
    kv_heads = q.shape[1]
    out = jnp.zeros_like(q)
    if heads.shape[0] < kv_heads:
        others = _others(heads, kv_heads)
        sparse = sparse_decode(q, kv, page_table, lengths, selection, others, scale=scale)
        out = _put(out, others, sparse)
    if heads.shape[0] > 0:
        full, scores = dense_decode(q, kv, page_table, lengths, heads, scale=scale, page_scores=spec.page_score)
        assert scores is not None
        pages, counts = select_pages(scores, lengths, spec, page_size=kv.page_size)
        out = _put(out, heads, full)
        selection = Selection(_put(selection.pages, heads, pages), _put(selection.counts, heads, counts))
    return out, selection
