"""The ops on NVIDIA Hopper GPUs: what `xla` says, decoding in two launches of Pallas Mosaic GPU kernels."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from pallas_kernels.mosaic_gpu.attend import SCORE_ROW, attend
from pallas_kernels.mosaic_gpu.common import COLUMNS, multiprocessors, target
from pallas_kernels.mosaic_gpu.extend import BLOCK, extend
from pallas_kernels.mosaic_gpu.finish import finish
from pallas_kernels.mosaic_gpu.plan import Tiling
from pallas_kernels.mosaic_gpu.select import SIDE, chunking
from pallas_kernels.types import Heads, KVPages, PageScore, Selection, SelectionSpec
from pallas_kernels.xla.decode import forced_pages, other_heads, page_limits

_PAGE_SIZES = (16, 32, 64, 128)
_HEAD_DIMS = (64, 128)


def _tiling(q: jax.Array, kv_pages: jax.Array, dense: int, sparse: int, selected: int) -> Tiling:
    """The static facts of a call.

    Raises:
        NotImplementedError: a case that the kernels do not cover.
    """
    batch, kv_heads = q.shape[:2]
    blocks = multiprocessors()
    _check_coverage(q, kv_pages)
    return Tiling(batch, kv_heads, dense, sparse, selected, kv_pages.shape[2], blocks)


def _check_coverage(q: jax.Array, kv_pages: jax.Array) -> None:
    """Queries `[…, G, H]` over a pool.

    Raises:
        NotImplementedError: a case that the kernels do not cover.
    """
    groups, head_dim = q.shape[-2:]
    page_size = kv_pages.shape[2]
    if q.dtype not in (jnp.bfloat16, jnp.float16) or kv_pages.dtype != q.dtype:
        raise NotImplementedError(
            f"mosaic_gpu takes bfloat16 or float16 queries over a cache of the same type, "
            f"not {q.dtype} over {kv_pages.dtype}"
        )
    if head_dim not in _HEAD_DIMS or page_size not in _PAGE_SIZES or groups > COLUMNS:
        raise NotImplementedError(
            f"mosaic_gpu takes head_dim 64 or 128, pages of 16, 32, 64 or 128 tokens and up to {COLUMNS} query heads "
            f"a KV head, not head_dim {head_dim}, pages of {page_size} and {groups}"
        )


def _order(heads: Heads, kv_heads: int) -> Heads | None:
    """All KV heads, those that retrieve first; None where that is their own order."""
    if heads.shape[0] == 0:
        return None
    if isinstance(heads, Tracer):
        return jnp.concatenate([heads.astype(jnp.int32), other_heads(heads, kv_heads)[: kv_heads - heads.shape[0]]])
    # Known while tracing: no launch for it.
    named = np.asarray(heads)
    order = np.concatenate([named, np.setdiff1d(np.arange(kv_heads), named)]).astype(np.int32)
    return None if np.array_equal(order, np.arange(kv_heads)) else order


def _named(heads: Heads, kv_heads: int) -> Heads | None:
    """The heads of a call; None where they are all heads in their own order."""
    if not isinstance(heads, Tracer) and np.array_equal(np.asarray(heads), np.arange(kv_heads)):
        return None
    return heads.astype(np.int32)


def dense_decode(
    q: Float[Array, "B K G H"],
    kv: KVPages,
    page_table: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    heads: Int[Heads, " R"],
    *,
    scale: float,
    page_scores: PageScore | None = None,
    return_lse: bool = False,
) -> tuple[Float[Array, "B R G H"], Float32[Array, "B R P"] | None]:
    """Attention over the whole cache, and page scores from the same pass."""
    if return_lse:
        raise NotImplementedError("mosaic_gpu returns no log-sum-exp")
    shape = (q.shape[0], heads.shape[0], *q.shape[2:])
    if 0 in shape:
        scores = None if page_scores is None else jnp.zeros((*shape[:2], page_table.shape[1]), jnp.float32)
        return jnp.zeros(shape, q.dtype), scores
    tiling = _tiling(q, kv.data, heads.shape[0], 0, 0)
    sums, stats, scores = attend(
        q,
        kv.data,
        page_table,
        lengths,
        _named(heads, q.shape[1]),
        None,
        None,
        tiling=tiling,
        scale=scale,
        page_scores=page_scores,
        score_rows=-(-page_table.shape[1] // SCORE_ROW),
        target=target(),
    )
    # The output has only the heads that were asked for, in their order.
    out, _, _ = finish(lengths, None, tiling=tiling, pieces=(sums, stats), shape=shape, dtype=q.dtype, target=target())
    if scores is not None:
        scores = scores.reshape(*scores.shape[:2], -1)[:, :, : page_table.shape[1]]
    assert out is not None
    return out, scores


def sparse_decode(
    q: Float[Array, "B K G H"],
    kv: KVPages,
    page_table: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    selection: Selection,
    heads: Int[Heads, " R"],
    *,
    scale: float,
    return_lse: bool = False,
) -> Float[Array, "B R G H"]:
    """Attention over the selected pages."""
    if return_lse:
        raise NotImplementedError("mosaic_gpu returns no log-sum-exp")
    shape = (q.shape[0], heads.shape[0], *q.shape[2:])
    if 0 in shape:
        return jnp.zeros(shape, q.dtype)
    tiling = _tiling(q, kv.data, 0, heads.shape[0], selection.pages.shape[2])
    sums, stats, _ = attend(
        q, kv.data, page_table, lengths, _named(heads, q.shape[1]), selection.pages, selection.counts, tiling=tiling,
        scale=scale, page_scores=None, score_rows=0, target=target(),
    )  # fmt: skip
    out, _, _ = finish(lengths, None, tiling=tiling, pieces=(sums, stats), shape=shape, dtype=q.dtype, target=target())
    assert out is not None
    return out


def _limits(page_scores: jax.Array, lengths: jax.Array, page_size: int, spec: SelectionSpec) -> jax.Array:
    used = ((lengths + page_size - 1) // page_size).astype(jnp.int32)
    return page_limits(page_scores, used, forced_pages(used, page_scores.shape[2], spec), spec)


def _whole_chunks(capacity: int) -> int:
    """The pages of the chunks that a selection among `capacity` pages looks at."""
    chunks, columns = chunking(capacity)
    return chunks * SIDE * columns


def select_pages(
    page_scores: Float32[Array, "B R P"],
    lengths: Int[Array, " B"],
    spec: SelectionSpec,
    *,
    page_size: int,
) -> tuple[Int32[Array, "B R M"], Int32[Array, "B R"]]:
    """Exact top pages."""
    multiprocessors()
    batch, rows, capacity = page_scores.shape
    limits = None
    if spec.rule != "budget":
        limits = _limits(page_scores, lengths, page_size, spec)
    scores = page_scores
    whole = _whole_chunks(capacity)
    if whole > capacity:
        scores = jnp.pad(scores, ((0, 0), (0, 0), (0, whole - capacity)))
    tiling = Tiling(batch, rows, rows, 0, 0, page_size, 1)
    _, pages, counts = finish(
        lengths, None, tiling=tiling, scores=scores, limits=limits, target=target(),
        selected=spec.budget_pages, sink_pages=spec.sink_pages, recent_pages=spec.recent_pages,
    )  # fmt: skip
    assert pages is not None
    assert counts is not None
    return pages, counts


def hybrid_decode(
    q: Float[Array, "B K G H"],
    kv: KVPages,
    page_table: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    selection: Selection,
    heads: Int[Heads, " R"],
    spec: SelectionSpec,
    *,
    scale: float,
    dense: Bool[Array, " B"] | None = None,
) -> tuple[Float[Array, "B K G H"], Selection]:
    """All roles of a layer in one launch, then merge and selection in another."""
    if dense is not None:
        raise NotImplementedError("mosaic_gpu has no dense rows beside hybrid ones")
    if q.shape[0] == 0:
        return jnp.zeros(q.shape, q.dtype), selection
    kv_heads, page_size = q.shape[1], kv.page_size
    retrieving = heads.shape[0]
    tiling = _tiling(q, kv.data, retrieving, kv_heads - retrieving, selection.pages.shape[2])
    order = _order(heads, kv_heads)
    sums, stats, scores = attend(
        q, kv.data, page_table, lengths, order, selection.pages, selection.counts, tiling=tiling, scale=scale,
        page_scores=spec.page_score, score_rows=_whole_chunks(page_table.shape[1]) // SCORE_ROW, target=target(),
    )  # fmt: skip
    merged = {"tiling": tiling, "pieces": (sums, stats), "shape": q.shape, "dtype": q.dtype, "target": target()}
    if retrieving == 0:
        out, _, _ = finish(lengths, order, **merged)
        assert out is not None
        return out, selection
    assert scores is not None
    scores = scores.reshape(*scores.shape[:2], -1)
    limits = None
    if spec.rule != "budget":
        real = scores[:, :, : page_table.shape[1]]
        limits = _limits(real, lengths, page_size, spec)
    out, pages, counts = finish(
        lengths, order, **merged, scores=scores, limits=limits, selection=tuple(selection),
        selected=spec.budget_pages, sink_pages=spec.sink_pages, recent_pages=spec.recent_pages,
    )  # fmt: skip
    assert out is not None
    assert pages is not None
    assert counts is not None
    return out, Selection(pages, counts)


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
) -> Float[Array, "B T K G H"]:
    """Causal attention of a chunk over the pages that hold it and its past; `k` and `v` lie there already."""
    del k, v
    multiprocessors()
    _check_coverage(q, kv.data)
    batch, length, kv_heads, groups, head_dim = q.shape
    flat = q.reshape(batch, length, kv_heads * groups, head_dim)
    padding = -length % BLOCK
    if padding:
        flat = jnp.pad(flat, ((0, 0), (0, padding), (0, 0), (0, 0)))
    page_table, starts, counts = (x.astype(jnp.int32) for x in (page_table, starts, counts))
    out = extend(flat, kv.data, page_table, starts, jnp.minimum(counts, length), scale=scale, target=target())
    return out[:, :length].reshape(q.shape)
