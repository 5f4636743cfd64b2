"""`hybrid_decode` on TPU: sparse heads in one launch, retrieval heads in another, then their selection.

A TensorCore runs one program at a time and each launch streams without a gap, so that nothing is won by mixing roles.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_tpu.dense_decode import dense_decode
from pallas_kernels.mosaic_tpu.select import select_pages
from pallas_kernels.mosaic_tpu.sparse_decode import sparse_decode
from pallas_kernels.types import Heads, PageScore, Rule, Selection


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
    kv_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    selection: Selection,
    heads: Heads,
    *,
    scale: float,
    budget_pages: int,
    sink_pages: int,
    recent_pages: int,
    rule: Rule = "budget",
    amount: float = 0.0,
    page_scores: PageScore = "max",
) -> tuple[jax.Array, Selection]:
    """See `reference.hybrid_decode`."""
    kv_heads = q.shape[1]
    out = jnp.zeros_like(q)
    if heads.shape[0] < kv_heads:
        others = _others(heads, kv_heads)
        sparse = sparse_decode(q, kv_pages, page_table, lengths, selection, others, scale=scale)
        out = _put(out, others, sparse)
    if heads.shape[0] > 0:
        dense, scores = dense_decode(q, kv_pages, page_table, lengths, heads, scale=scale, page_scores=page_scores)
        assert scores is not None
        pages, counts = select_pages(
            scores, lengths, page_size=kv_pages.shape[2], budget_pages=budget_pages, sink_pages=sink_pages,
            recent_pages=recent_pages, rule=rule, amount=amount,
        )  # fmt: skip
        out = _put(out, heads, dense)
        selection = Selection(_put(selection.pages, heads, pages), _put(selection.counts, heads, counts))
    return out, selection
