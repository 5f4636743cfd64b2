"""Merging pieces: the blocks that attended left, for every head, some weighted sums with tops of their own.

The few pieces of a query head are one warpgroup's, so that a block merges several; where one head's are spread over the
whole chip, all warpgroups of a block share them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.common import WGMMA, Refs, full, load, store
from pallas_kernels.mosaic_gpu.plan import Rows, Tiling
from pallas_kernels.xla.decode import MASKED

# Warpgroups of a block.
WARPGROUPS = 4
# Pieces that a warpgroup loads at once, bounded by what a head has in rows of one length. A load takes long, but many
# take hardly longer, as long as registers hold them. Fewer would make the long row among short ones wait.
_FEWEST, _MOST = 8, 36
# One element a thread: a piece's sum is one load of every warp and takes one register. Only for head_dim 128.
_SPREAD = plgpu.Layout.TILED(
    plgpu.Tiling(((128,), (32,), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)  # fmt: skip


def merge_scratch(head_dim: int) -> dict[str, Any]:
    """Shared memory of `merge`."""
    return {
        "held_sums": plgpu.SMEM((WARPGROUPS, head_dim), jnp.float32),
        "held_stats": plgpu.SMEM((WARPGROUPS, 2, head_dim), jnp.float32),
        "merged": plgpu.Barrier(num_arrivals=WARPGROUPS),
    }


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The pieces of KV head `head` of `row`: `count` of them, numbered from `first`."""

    row: Any
    head: Any
    first: Any
    count: Any


def find_pieces(tiling: Tiling, refs: Refs, row: jax.Array, index: jax.Array) -> Pieces:
    """The pieces of head `index` of `row`; reads lengths and order alone."""
    length, head = refs.lengths[row], refs.order[index] if hasattr(refs, "order") else index
    rows = Rows(tiling, refs.lengths)
    dense_tiles, sparse_tiles = tiling.dense_tiles(length), tiling.sparse_tiles(length)
    dense = index < tiling.dense
    tiles = jnp.where(dense, dense_tiles, sparse_tiles)
    before = jnp.where(dense, index * dense_tiles, tiling.dense * dense_tiles + (index - tiling.dense) * sparse_tiles)
    start = rows.start(row) + before
    first = start // rows.share
    # A row without tokens has no pieces.
    count = jnp.where(tiles > 0, (start + tiles - 1) // rows.share - first + 1, 0)
    return Pieces(row, head, first + row * tiling.heads + index, count)


def together(tiling: Tiling) -> bool:
    """Whether all warpgroups of a block share the pieces of one query head of a dense head: one could not hold them."""
    return tiling.dense > 0 and tiling.pieces_of(dense=True) > _MOST


def _gather(
    tiling: Tiling, refs: Refs, pieces: Pieces, group: jax.Array, dense: bool, part: Any, parts: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Top, total and weighted sum of part `part` of `parts` of a query head's pieces."""
    first, count = pieces.first, pieces.count
    head_dim = refs.held_sums.shape[1]
    at_once = min(max(-(-tiling.pieces_of(dense) // parts), _FEWEST), _MOST)
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

    rounds = (count + parts * at_once - 1) // (parts * at_once)
    carry = jnp.float32(MASKED), jnp.float32(0.0), full((head_dim,), 0.0, vector)
    return jax.lax.fori_loop(0, rounds, several, carry)


def _vector(head_dim: int) -> Any:
    return _SPREAD if head_dim == 128 else WGMMA.reduce(1)


def _write(refs: Refs, pieces: Pieces, group: jax.Array, total: jax.Array, out: jax.Array) -> None:
    out = out / jnp.maximum(total, 1e-30)
    store(refs.out.at[pieces.row, pieces.head, group], out.astype(refs.out.dtype))


def merge_heads(tiling: Tiling, refs: Refs, pieces: Pieces, dense: bool, groups: int) -> None:
    """Merge the query heads of a KV head, each by one warpgroup, and write them to the output."""
    warpgroup = jax.lax.axis_index("warpgroup").astype(jnp.int32)
    for first in range(0, groups, WARPGROUPS):
        group = first + warpgroup

        @pl.when(group < groups)
        def _(group: jax.Array = group) -> None:
            _, total, out = _gather(tiling, refs, pieces, group, dense, 0, 1)
            _write(refs, pieces, group, total, out)


def merge_together(tiling: Tiling, refs: Refs, pieces: Pieces, group: jax.Array) -> None:
    """Merge one query head of a dense head, and write it to the output; all warpgroups take part."""
    warpgroup = jax.lax.axis_index("warpgroup").astype(jnp.int32)
    head_dim = refs.held_sums.shape[1]
    vector = _vector(head_dim)
    top, total, out = _gather(tiling, refs, pieces, group, True, warpgroup, WARPGROUPS)
    store(refs.held_sums.at[warpgroup], out)
    # As vectors: every thread later finds what it needs where it looks for its sums.
    store(refs.held_stats.at[warpgroup, 0], full((head_dim,), 0.0, vector) + top)
    store(refs.held_stats.at[warpgroup, 1], full((head_dim,), 0.0, vector) + total)
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.merged)

    @pl.when(warpgroup == 0)
    def _():
        plgpu.barrier_wait(refs.merged)
        tops = [load(refs.held_stats.at[w, 0], vector) for w in range(WARPGROUPS)]
        new_top = tops[0]
        for t in tops[1:]:
            new_top = jnp.maximum(new_top, t)
        total = out = full((head_dim,), 0.0, vector)
        for w in range(WARPGROUPS):
            weight = jnp.exp2(tops[w] - new_top)
            total = total + weight * load(refs.held_stats.at[w, 1], vector)
            out = out + weight * load(refs.held_sums.at[w], vector)
        _write(refs, pieces, group, total, out)
