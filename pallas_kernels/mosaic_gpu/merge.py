"""Merging pieces: the blocks that attended left, for every head, some weighted sums with tops of their own.

The few pieces of a query head are one warpgroup's, so that a block merges several; where one head's are spread over the
whole chip, all warpgroups of a block share them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.common import LOG2E, WGMMA, Refs, full, load, quotient, quotient_up, store
from pallas_kernels.mosaic_gpu.split import SplitPlan, TileList
from pallas_kernels.xla.decode import MASKED

# One element a thread: a piece's sum is one load of every warp and takes one register. Only for head_dim 128.
_SPREAD = plgpu.Layout.TILED(
    plgpu.Tiling(((128,), (32,), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)  # fmt: skip


def merge_scratch(warpgroups: int, head_dim: int) -> dict[str, Any]:
    """Shared memory of a block that merges."""
    return {
        "held_sums": plgpu.SMEM((warpgroups, head_dim), jnp.float32),
        "held_stats": plgpu.SMEM((warpgroups, 2, head_dim), jnp.float32),
        "merged": plgpu.Barrier(num_arrivals=warpgroups),
    }


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The pieces of KV head `head` of `row`: `count` of them, numbered from `first`.

    `selects`: whether the head selects pages; None where all dense heads do.
    """

    row: Any
    head: Any
    first: Any
    count: Any
    selects: Any


def find_pieces(plan: SplitPlan, refs: Refs, row: jax.Array, index: jax.Array) -> Pieces:
    """The pieces of head `index` of `row`; reads only what `TileList` does, and the order."""
    head = refs.order[index] if hasattr(refs, "order") else index
    tiles = TileList(plan, refs)
    found = tiles.row(row)
    dense_tiles, sparse_tiles = plan.dense_tiles(found.length), plan.sparse_tiles(found.length)
    beyond = index - found.dense_heads
    dense = beyond < 0
    own = jnp.where(dense, dense_tiles, sparse_tiles)
    before = jnp.where(dense, index * dense_tiles, found.dense_heads * dense_tiles + beyond * sparse_tiles)
    if plan.padded and not plan.dense_heads:
        # The heads that the call does not name come last and have no tiles.
        own = jnp.where(index < tiles.sparse_heads, own, 0)
    start = found.start + before
    first = quotient(start, tiles.share)
    # A row without tokens has no pieces.
    count = jnp.where(own > 0, quotient(start + own - 1, tiles.share) - first + 1, 0)
    selects = index < tiles.dense_heads if plan.padded else None
    if found.flag is not None:
        selects = ~found.flag if selects is None else selects & ~found.flag
    return Pieces(row, head, first + row * plan.heads + index, count, selects)


def together(plan: SplitPlan) -> bool:
    """Whether all warpgroups of a block share the pieces of one query head of a dense head: one could not hold them."""
    return plan.dense_heads > 0 and plan.pieces_of(dense=True) > plan.config.merge_most


def _gather(
    plan: SplitPlan, refs: Refs, pieces: Pieces, group: jax.Array, dense: bool, part: Any, parts: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Top, total and weighted sum of part `part` of `parts` of a query head's pieces."""
    first, count = pieces.first, pieces.count
    head_dim = refs.held_sums.shape[1]
    # Bounded by what a head has in rows of one length.
    at_once = min(max(-(-plan.pieces_of(dense) // parts), plan.config.merge_least), plan.config.merge_most)
    vector = _vector(head_dim)

    def several(i: jax.Array, carry: Any) -> Any:
        top, total, out = carry
        base = (i * parts + part) * at_once
        numbers = [first + jnp.minimum(base + u, count - 1) for u in range(at_once)]
        tops = [refs.stats[n, 0, group] for n in numbers]
        totals = [refs.stats[n, 1, group] for n in numbers]
        sums = [load(refs.sums.at[n, group], vector) for n in numbers]
        tops = [jnp.where(base + u < count, t, MASKED) for u, t in enumerate(tops)]
        new_top = top
        for t in tops:
            new_top = jnp.maximum(new_top, t)
        shrink = jnp.exp2(top - new_top)
        total, out = total * shrink, out * shrink
        for u in range(at_once):
            weight = jnp.where(base + u < count, jnp.exp2(tops[u] - new_top), 0.0)
            total = total + weight * totals[u]
            out = out + weight * sums[u]
        return new_top, total, out

    rounds = quotient_up(count, parts * at_once)
    carry = jnp.float32(MASKED), jnp.float32(0.0), full((head_dim,), 0.0, vector)
    return jax.lax.fori_loop(0, rounds, several, carry)


def _vector(head_dim: int) -> Any:
    return _SPREAD if head_dim == 128 else WGMMA.reduce(1)


def _write(refs: Refs, pieces: Pieces, group: jax.Array, total: jax.Array, out: jax.Array) -> None:
    out = out / jnp.maximum(total, 1e-30)
    store(refs.out.at[pieces.row, pieces.head, group], out.astype(refs.out.dtype))


def _write_lse(refs: Refs, pieces: Pieces, group: jax.Array, top: jax.Array, total: jax.Array) -> None:
    """The natural log-sum-exp of a query head, from numbers of base 2; `MASKED` if it read nothing."""
    lse = (top + jnp.log2(jnp.maximum(total, 1e-30))) * (1.0 / LOG2E)
    refs.lse[pieces.row, pieces.head, group] = jnp.where(total > 0.0, lse, MASKED)


def merge_heads(plan: SplitPlan, refs: Refs, pieces: Pieces, dense: bool, groups: int) -> None:
    """Merge the query heads of a KV head, each by one warpgroup, and write them to the output."""
    warpgroup = jax.lax.axis_index("warpgroup").astype(jnp.int32)
    for first in range(0, groups, plan.config.merge_warpgroups):
        group = first + warpgroup

        @pl.when(group < groups)
        def _(group: jax.Array = group) -> None:
            top, total, out = _gather(plan, refs, pieces, group, dense, 0, 1)
            _write(refs, pieces, group, total, out)
            if hasattr(refs, "lse"):
                _write_lse(refs, pieces, group, top, total)


def merge_together(plan: SplitPlan, refs: Refs, pieces: Pieces, group: jax.Array) -> None:
    """Merge one query head of a dense head, and write it to the output; all warpgroups take part."""
    warpgroup = jax.lax.axis_index("warpgroup").astype(jnp.int32)
    warpgroups, head_dim = refs.held_sums.shape
    vector = _vector(head_dim)
    top, total, out = _gather(plan, refs, pieces, group, True, warpgroup, warpgroups)
    store(refs.held_sums.at[warpgroup], out)
    # As vectors: every thread later finds what it needs where it looks for its sums.
    store(refs.held_stats.at[warpgroup, 0], full((head_dim,), 0.0, vector) + top)
    store(refs.held_stats.at[warpgroup, 1], full((head_dim,), 0.0, vector) + total)
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.merged)

    def unite(read: Callable[[int, int], jax.Array], start: Any) -> tuple[Any, Any, list[Any]]:
        """Top, total and the warpgroups' weights, from their tops and totals (`read`)."""
        tops = [read(w, 0) for w in range(warpgroups)]
        new_top = functools.reduce(jnp.maximum, tops)
        weights, total = [jnp.exp2(top - new_top) for top in tops], start
        for w, weight in enumerate(weights):
            total = total + weight * read(w, 1)
        return new_top, total, weights

    @pl.when(warpgroup == 0)
    def _():
        plgpu.barrier_wait(refs.merged)
        zeros = full((head_dim,), 0.0, vector)
        _, total, weights = unite(lambda w, which: load(refs.held_stats.at[w, which], vector), zeros)
        out = zeros
        for w, weight in enumerate(weights):
            out = out + weight * load(refs.held_sums.at[w], vector)
        _write(refs, pieces, group, total, out)
        if hasattr(refs, "lse"):
            # Once more as single numbers.
            top, total, _ = unite(lambda w, which: refs.held_stats[w, which, 0], jnp.float32(0.0))
            _write_lse(refs, pieces, group, top, total)
