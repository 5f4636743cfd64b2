"""Merging pieces: the blocks that attended left, for every head, some weighted sums with tops of their own."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.common import WGMMA, Refs, full, load, store
from pallas_kernels.mosaic_gpu.plan import Rows, Tiling
from pallas_kernels.reference import MASKED

# Warpgroups that share the pieces of a head.
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


def merge(tiling: Tiling, refs: Refs, pieces: Pieces, group: jax.Array) -> None:
    """Merge query head `group` of a KV head, and write it to the output; all warpgroups take part."""
    warpgroup = jax.lax.axis_index("warpgroup").astype(jnp.int32)
    first, count = pieces.first, pieces.count
    head_dim = refs.held_sums.shape[1]
    vector = _SPREAD if head_dim == 128 else WGMMA.reduce(1)
    at_once = min(max(-(-tiling.pieces_per_head // WARPGROUPS), _FEWEST), _MOST)

    def several(i: jax.Array, carry: Any) -> Any:
        top, total, out = carry
        base = (i * WARPGROUPS + warpgroup) * at_once
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

    rounds = (count + WARPGROUPS * at_once - 1) // (WARPGROUPS * at_once)
    carry = jnp.float32(MASKED), jnp.float32(0.0), full((head_dim,), 0.0, vector)
    top, total, out = jax.lax.fori_loop(0, rounds, several, carry)
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
        out = out / jnp.maximum(total, 1e-30)
        store(refs.out.at[pieces.row, pieces.head, group], out.astype(refs.out.dtype))
