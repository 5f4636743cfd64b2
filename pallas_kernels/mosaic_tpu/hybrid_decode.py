"""`hybrid_decode` on TPU: sparse heads in one launch, retrieval heads in another, then their selection.

A TensorCore runs one program at a time and each launch streams without a gap, so that nothing is won by mixing roles.
Dense rows read the page table in both launches. What other rows come out as does not depend on them, to the bit; they
themselves come out as from `dense_decode` but for the order of float32 sums, where that cuts the context otherwise:
below 4096 tokens, or over two cores.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pallas_kernels.mosaic_tpu.config import TpuConfig
from pallas_kernels.mosaic_tpu.dense_decode import dense_decode
from pallas_kernels.mosaic_tpu.select import select_pages
from pallas_kernels.mosaic_tpu.sparse_decode import sparse_decode
from pallas_kernels.types import Heads, KVPages, Selection, SelectionSpec


def _roles(heads: Heads, kv_heads: int) -> tuple[Heads, Heads]:
    """`heads` and the KV heads that it does not name, both ascending and, where they are known, without −1."""
    if not isinstance(heads, Tracer):
        every = np.arange(kv_heads, dtype=np.int32)
        named = np.isin(every, np.asarray(heads))
        return every[named], every[~named]
    # K entries padded with −1, since nobody knows how many are named; without a sort, which TPUs are slow at.
    ids = jnp.arange(kv_heads, dtype=jnp.int32)
    free = jnp.all(ids[:, None] != heads[None, :], axis=1)
    rank = jnp.sum(free[None, :] & (ids[None, :] < ids[:, None]), axis=1, dtype=jnp.int32)
    return heads, jnp.sum(jnp.where(free & (rank == ids[:, None]), ids + 1, 0), axis=1, dtype=jnp.int32) - 1


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
    config: TpuConfig = TpuConfig(),
) -> tuple[jax.Array, Selection]:
    """See `xla.decode.hybrid_decode`."""
    retrieval, sparse = _roles(heads, q.shape[1])
    out = jnp.zeros_like(q)
    if sparse.shape[0] > 0:
        read = sparse_decode(q, kv, page_table, lengths, selection, sparse, scale=scale, dense=dense, config=config)
        assert isinstance(read, jax.Array)
        out = _put(out, sparse, read)
    if retrieval.shape[0] > 0:
        read, scores, *_ = dense_decode(
            q, kv, page_table, lengths, retrieval, scale=scale, page_scores=spec.page_score, config=config
        )
        assert scores is not None
        pages, counts = select_pages(scores, lengths, spec, page_size=kv.page_size, config=config)
        out = _put(out, retrieval, read)
        selection = Selection(_put(selection.pages, retrieval, pages), _put(selection.counts, retrieval, counts))
    return out, selection
