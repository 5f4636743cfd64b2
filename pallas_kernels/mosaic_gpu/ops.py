"""The ops on NVIDIA Hopper GPUs: what `xla` says, decoding in two launches of Pallas Mosaic GPU kernels."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from pallas_kernels.mosaic_gpu.attend import attend
from pallas_kernels.mosaic_gpu.common import COLUMNS, multiprocessors, target
from pallas_kernels.mosaic_gpu.compute import SCORE_ROW
from pallas_kernels.mosaic_gpu.config import DecodeConfig, ExtendConfig
from pallas_kernels.mosaic_gpu.extend import BLOCK, extend
from pallas_kernels.mosaic_gpu.finish import finish
from pallas_kernels.mosaic_gpu.select import SIDE, chunking
from pallas_kernels.mosaic_gpu.split import TILE_TOKENS, SplitPlan
from pallas_kernels.types import Heads, KVPages, PageScore, Selection, SelectionSpec
from pallas_kernels.xla.decode import MASKED, forced_pages, page_limits
from pallas_kernels.xla.quantized import keys_and_values

_PAGE_SIZES = (16, 32, 64, 128)
_HEAD_DIMS = (64, 128)
# The scales of a page are copied by themselves, and a copy begins at a multiple of 128 bytes.
_LEAST_SCALED = 32
_DECODE, _EXTEND = DecodeConfig(), ExtendConfig()


def _check_coverage(q: jax.Array, kv: KVPages) -> None:
    """Queries `[…, G, H]` over a pool.

    Raises:
        NotImplementedError: a case that the kernels do not cover.
    """
    groups, head_dim = q.shape[-2:]
    if q.dtype not in (jnp.bfloat16, jnp.float16) or (kv.quantized is None and kv.data.dtype != q.dtype):
        raise NotImplementedError(
            f"mosaic_gpu takes bfloat16 or float16 queries over a cache of the same type or of 8-bit numbers, "
            f"not {q.dtype} over {kv.quantized or kv.data.dtype}"
        )
    if head_dim not in _HEAD_DIMS or kv.page_size not in _PAGE_SIZES or groups > COLUMNS:
        raise NotImplementedError(
            f"mosaic_gpu takes head_dim 64 or 128, pages of 16, 32, 64 or 128 tokens and up to {COLUMNS} query heads "
            f"a KV head, not head_dim {head_dim}, pages of {kv.page_size} and {groups}"
        )
    if kv.quantized == "int8" and kv.page_size < _LEAST_SCALED:
        raise NotImplementedError(
            f"mosaic_gpu takes int8 caches in pages of {_LEAST_SCALED} tokens or more, not of {kv.page_size}"
        )


def _tile_tokens(kv: KVPages, config: DecodeConfig) -> int:
    """Tokens of a tile, unless a page has more."""
    return TILE_TOKENS if kv.quantized is None else config.word_tokens


class _Named(NamedTuple):
    """The heads that a call names, those of −1 last.

    `order`: their numbers, None where they are all heads in order. `places`: where in the output they belong, and
    `count [1]`: how many there are, both None where no −1 can be among them.
    """

    order: Any
    places: Any
    count: Any

    @classmethod
    def of(cls, heads: Heads, kv_heads: int) -> "_Named":
        """What `heads` names; nothing is launched for what is known while tracing."""
        traced = isinstance(heads, Tracer)
        xp: Any = jnp if traced else np
        heads = xp.asarray(heads, np.int32)
        if not traced and (np.asarray(heads) >= 0).all():
            return cls(None if np.array_equal(heads, np.arange(kv_heads)) else heads, None, None)
        places = xp.argsort(heads < 0, stable=True).astype(np.int32)
        return cls(heads[places], places, (heads >= 0).sum(keepdims=True).astype(np.int32))


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
    config: DecodeConfig = _DECODE,
) -> (
    tuple[Float[Array, "B R G H"], Float32[Array, "B R P"] | None]
    | tuple[Float[Array, "B R G H"], Float32[Array, "B R P"] | None, Float32[Array, "B R G"]]
):
    """Attention over the whole cache; page scores and log-sum-exps come from the same pass."""
    capacity, shape = page_table.shape[1], (q.shape[0], heads.shape[0], *q.shape[2:])
    if 0 in shape:
        scores = None if page_scores is None else jnp.full((*shape[:2], capacity), MASKED, jnp.float32)
        out, lse = jnp.zeros(shape, q.dtype), jnp.full(shape[:3], MASKED, jnp.float32)
        return (out, scores, lse) if return_lse else (out, scores)
    blocks = multiprocessors()
    _check_coverage(q, kv)
    named = _Named.of(heads, kv.kv_heads)
    plan = SplitPlan(
        shape[0],
        kv.kv_heads,
        shape[1],
        0,
        0,
        kv.page_size,
        blocks,
        config,
        padded=named.count is not None,
        least_tokens=_tile_tokens(kv, config),
    )
    sums, stats, scores = attend(
        q, kv, page_table, lengths, named.order, None, named=named.count, plan=plan, scale=scale,
        page_scores=page_scores, score_rows=-(-capacity // SCORE_ROW), target=target(),
    )  # fmt: skip
    # The output has only the heads that were asked for, in their order.
    done = finish(
        lengths, named.places, named=named.count, plan=plan, pieces=(sums, stats), shape=shape, dtype=q.dtype,
        return_lse=return_lse, target=target(),
    )  # fmt: skip
    if scores is not None:
        scores = scores.reshape(*scores.shape[:2], -1)[:, :, :capacity]
        if named.places is not None:
            scores = jnp.where((heads < 0)[:, None], MASKED, jnp.zeros_like(scores).at[:, named.places].set(scores))
    assert done.out is not None
    if not return_lse:
        return done.out, scores
    assert done.lse is not None
    return done.out, scores, done.lse


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
    config: DecodeConfig = _DECODE,
) -> Float[Array, "B R G H"] | tuple[Float[Array, "B R G H"], Float32[Array, "B R G"]]:
    """Attention over the selected pages."""
    shape = (q.shape[0], heads.shape[0], *q.shape[2:])
    if 0 in shape:
        out = jnp.zeros(shape, q.dtype)
        return (out, jnp.full(shape[:3], MASKED, jnp.float32)) if return_lse else out
    blocks = multiprocessors()
    _check_coverage(q, kv)
    named = _Named.of(heads, kv.kv_heads)
    plan = SplitPlan(
        shape[0], kv.kv_heads, 0, shape[1], selection.pages.shape[2], kv.page_size, blocks, config,
        padded=named.count is not None, least_tokens=_tile_tokens(kv, config),
    )  # fmt: skip
    sums, stats, _ = attend(
        q, kv, page_table, lengths, named.order, selection, named=named.count, plan=plan, scale=scale,
        page_scores=None, score_rows=0, target=target(),
    )  # fmt: skip
    done = finish(
        lengths, named.places, named=named.count, plan=plan, pieces=(sums, stats), shape=shape, dtype=q.dtype,
        return_lse=return_lse, target=target(),
    )  # fmt: skip
    assert done.out is not None
    if not return_lse:
        return done.out
    assert done.lse is not None
    return done.out, done.lse


def _limits(scores: jax.Array, lengths: jax.Array, page_size: int, spec: SelectionSpec) -> jax.Array | None:
    """How many pages a head may select by the rules that look at the scores; None for the one that does not."""
    if spec.rule == "budget":
        return None
    used = ((lengths + page_size - 1) // page_size).astype(jnp.int32)
    return page_limits(scores, used, forced_pages(used, scores.shape[2], spec), spec)


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
    config: DecodeConfig = _DECODE,
) -> tuple[Int32[Array, "B R M"], Int32[Array, "B R"]]:
    """Exact top pages."""
    multiprocessors()
    batch, rows, capacity = page_scores.shape
    limits = _limits(page_scores, lengths, page_size, spec)
    scores = page_scores
    whole = _whole_chunks(capacity)
    if whole > capacity:
        scores = jnp.pad(scores, ((0, 0), (0, 0), (0, whole - capacity)))
    plan = SplitPlan(batch, rows, rows, 0, 0, page_size, 1, config)
    done = finish(lengths, None, plan=plan, spec=spec, scores=scores, limits=limits, target=target())
    assert done.pages is not None
    assert done.counts is not None
    return done.pages, done.counts


def _retrieval_first(heads: Heads, kv_heads: int) -> tuple[Any, int, Any]:
    """All KV heads, those that `heads` names first (None: they are in order); a bound on the number of these; and that
    number `[1]`, None where it is the bound.
    """
    if not isinstance(heads, Tracer):
        # Known while tracing: no launch for it.
        named = np.asarray(heads)
        named = named[named >= 0]
        order = np.concatenate([named, np.setdiff1d(np.arange(kv_heads), named)]).astype(np.int32)
        return None if np.array_equal(order, np.arange(kv_heads)) else order, len(named), None
    retrieves = jnp.any(jnp.arange(kv_heads, dtype=heads.dtype)[:, None] == heads, axis=1)
    order = jnp.argsort(~retrieves, stable=True).astype(jnp.int32)
    return order, heads.shape[0], jnp.sum(retrieves, dtype=jnp.int32, keepdims=True)


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
    config: DecodeConfig = _DECODE,
) -> tuple[Float[Array, "B K G H"], Selection]:
    """All roles of a layer in one launch, then merge and selection in another; dense rows hand on what they got."""
    if q.shape[0] == 0:
        return jnp.zeros(q.shape, q.dtype), selection
    blocks = multiprocessors()
    _check_coverage(q, kv)
    capacity = page_table.shape[1]
    order, retrieval, count = _retrieval_first(heads, kv.kv_heads)
    plan = SplitPlan(
        q.shape[0], kv.kv_heads, retrieval, kv.kv_heads - retrieval, selection.pages.shape[2], kv.page_size, blocks,
        config, padded=count is not None, least_tokens=_tile_tokens(kv, config),
    )  # fmt: skip
    roles = {"named": count, "dense_rows": None if dense is None else dense.astype(jnp.int32)}
    sums, stats, scores = attend(
        q, kv, page_table, lengths, order, selection, **roles, plan=plan, scale=scale,
        page_scores=spec.page_score, score_rows=_whole_chunks(capacity) // SCORE_ROW, target=target(),
    )  # fmt: skip
    merged = {"plan": plan, "pieces": (sums, stats), "shape": q.shape, "dtype": q.dtype, "target": target()}
    if scores is None:
        done = finish(lengths, order, **roles, **merged)
        assert done.out is not None
        return done.out, selection
    scores = scores.reshape(*scores.shape[:2], -1)
    limits = _limits(scores[:, :, :capacity], lengths, kv.page_size, spec)
    done = finish(lengths, order, **roles, **merged, spec=spec, scores=scores, limits=limits, selection=selection)
    assert done.out is not None
    assert done.pages is not None
    assert done.counts is not None
    return done.out, Selection(done.pages, done.counts)


def _numbers_of(kv: KVPages, page_table: jax.Array, dtype: Any) -> tuple[KVPages, jax.Array]:
    """The pages that a table names as numbers of 16 bits, row after row, and a table of these."""
    ids = jnp.clip(page_table, 0, kv.num_pages - 1).reshape(-1)
    assert kv.quantized is not None
    halves = keys_and_values(kv.data[ids], kv.quantized, jnp.float32)
    if kv.scales is not None:
        scales = kv.scales[ids].reshape(-1, kv.kv_heads, 2, kv.page_size, 1)
        halves = halves[0] * scales[:, :, 0], halves[1] * scales[:, :, 1]
    table = jnp.arange(ids.shape[0], dtype=jnp.int32).reshape(page_table.shape)
    return KVPages(jnp.concatenate(halves, axis=-1).astype(dtype)), table


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
    config: ExtendConfig = _EXTEND,
) -> Float[Array, "B T K G H"]:
    """Causal attention of a chunk over the pages that hold it and its past; `k` and `v` lie there already."""
    del k, v
    multiprocessors()
    _check_coverage(q, kv)
    batch, length, kv_heads, groups, head_dim = q.shape
    if kv.quantized is not None:
        kv, page_table = _numbers_of(kv, page_table, q.dtype)
    flat = q.reshape(batch, length, kv_heads * groups, head_dim)
    padding = -length % BLOCK
    if padding:
        flat = jnp.pad(flat, ((0, 0), (0, padding), (0, 0), (0, 0)))
    page_table, starts, counts = (x.astype(jnp.int32) for x in (page_table, starts, counts))
    out = extend(
        flat, kv.data, page_table, starts, jnp.minimum(counts, length), scale=scale, config=config, target=target()
    )
    return out[:, :length].reshape(q.shape)
