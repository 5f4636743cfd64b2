"""Attention of a chunk of new tokens over the paged cache that holds them already: flash attention for Hopper.

A block computes one query head for a few consecutive tiles of queries, one a warpgroup; another warpgroup fetches keys
and values (TMA, by page id) into a ring of tiles. The computing warpgroups take turns: while one of them multiplies,
the other one is at its softmax, as in FlashAttention-3 (arXiv 2407.08608, section 3.1). Weights go from registers
straight into the second product. Only tiles that some query must not see in full are masked.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.common import (
    LOG2E,
    TILED,
    WGMMA,
    Refs,
    along_columns,
    compiler_params,
    full,
    interpreter,
    iota,
    load,
    multiply_add,
    remainder,
    store,
)  # fmt: skip
from pallas_kernels.mosaic_gpu.config import ExtendConfig
from pallas_kernels.xla.decode import MASKED

# Warpgroups that compute, and the queries of each: more of either do not fit into the registers at head_dim 128.
WARPGROUPS = 2
ROWS = 64
# Queries of a block.
BLOCK = WARPGROUPS * ROWS
# Tokens of a tile of keys and values.
TILE = 128


@functools.partial(jax.jit, static_argnames=("scale", "config", "target"))
def extend(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    *,
    scale: float,
    config: ExtendConfig,
    target: Any,
) -> jax.Array:
    """Attend with `q [B, T, N, H]`, T whole blocks → `[B, T, N, H]`.

    Query t of row b sees the positions ≤ `starts[b] + t`; of the queries from `counts[b]` on, blocks that have no
    other ones give zeros, and the rest something finite. `target` keeps what was traced for other machines apart.
    """
    del target
    batch, length, heads, head_dim = q.shape
    num_pages, kv_heads, page_size, _ = kv_pages.shape
    stages = min(config.max_stages, config.tile_bytes // (TILE * 2 * head_dim * kv_pages.dtype.itemsize))
    shape = ChunkShape(
        blocks=length // BLOCK, kv_heads=kv_heads, groups=heads // kv_heads, head_dim=head_dim, page_size=page_size,
        num_pages=num_pages, capacity=page_table.shape[1], stages=stages,
    )  # fmt: skip
    names = ["q", "kv_pages", "page_table", "starts", "counts", "out"]
    scratch = {
        # Of the queries, and in the end of the output.
        "rows": plgpu.SMEM((WARPGROUPS, ROWS, head_dim), q.dtype, transforms=TILED),
        "tiles": plgpu.SMEM((stages, TILE, 2 * head_dim), q.dtype, transforms=TILED),
        "asked": plgpu.Barrier(num_barriers=WARPGROUPS),
        "full": plgpu.Barrier(num_arrivals=TILE // page_size, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        "turn": plgpu.Barrier(num_arrivals=WARPGROUPS),
        "clean": plgpu.Barrier(),
    }

    def body(*args: Any, **named: Any) -> None:
        refs = Refs(dict(zip(names, args, strict=True)) | named)
        work = BlockWork.of(shape, refs, jax.lax.axis_index("block").astype(jnp.int32))
        thread = jax.lax.axis_index("warpgroup")

        @pl.when(thread < WARPGROUPS)
        def _():
            plgpu.set_max_registers(config.compute_registers, action="increase")
            _compute(shape, refs, work, thread, scale)

        @pl.when(thread == WARPGROUPS)
        def _():
            plgpu.set_max_registers(config.fetch_registers, action="decrease")
            _fetch(shape, refs, work)

    return plgpu.kernel(
        body, out_type=jax.ShapeDtypeStruct(q.shape, q.dtype), scratch_types=scratch,
        grid=(batch * heads * shape.blocks,), grid_names=("block",), num_threads=WARPGROUPS + 1,
        thread_name="warpgroup", compiler_params=compiler_params(), interpret=interpreter(), kernel_name="extend",
    )(q, kv_pages, page_table, starts, counts)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ChunkShape:
    """What is static about a prefill call."""

    blocks: int
    kv_heads: int
    groups: int
    head_dim: int
    page_size: int
    num_pages: int
    capacity: int
    stages: int

    @property
    def pages_per_tile(self) -> int:
        """Pages of a tile."""
        return TILE // self.page_size


@dataclasses.dataclass(frozen=True)
class BlockWork:
    """What a block does: the queries from `first` on of one query head, over `steps` tiles.

    `position` is the place of query `first` in the row; from `seen` on no query of the block sees anything.
    """

    row: jax.Array
    kv_head: jax.Array
    head: jax.Array
    first: jax.Array
    position: jax.Array
    seen: jax.Array
    steps: jax.Array

    @classmethod
    def of(cls, shape: ChunkShape, refs: Refs, rest: jax.Array) -> "BlockWork":
        """The work of a block by its number.

        Blocks that run side by side should read the same keys, so that they come from the second-level cache: all
        those of a KV head follow each other. The longest come first, so that the short ones fill the gaps at the end.
        """
        rest, group = jax.lax.div(rest, jnp.int32(shape.groups)), remainder(rest, shape.groups)
        rest, block = jax.lax.div(rest, jnp.int32(shape.blocks)), remainder(rest, shape.blocks)
        row, kv_head = jax.lax.div(rest, jnp.int32(shape.kv_heads)), remainder(rest, shape.kv_heads)
        first = (shape.blocks - 1 - block) * BLOCK
        start, count = refs.starts[row], refs.counts[row]
        seen = start + jnp.minimum(first + BLOCK, count)
        steps = jnp.where(first < count, _tiles(seen + TILE - 1), 0)
        return cls(row, kv_head, kv_head * shape.groups + group, first, start + first, seen, steps)


def _tiles(tokens: jax.Array) -> jax.Array:
    """Whole tiles in so many tokens."""
    return jax.lax.div(tokens, jnp.int32(TILE))


def physical_pages(shape: ChunkShape, page_table: Any, work: BlockWork, tile: jax.Array) -> tuple[jax.Array, ...]:
    """The pool pages of a tile. Wrong ids are never followed: every one of these lies inside the pool."""
    first = tile * shape.pages_per_tile
    pages = [first + k for k in range(shape.pages_per_tile)]
    # Pages that nobody sees may be nobody's: one that is read anyway stands in for them.
    pages = [jnp.where(page * shape.page_size < work.seen, page, first) for page in pages]
    ids = [page_table[work.row, jnp.clip(page, 0, shape.capacity - 1)] for page in pages]
    return tuple(jnp.clip(i, 0, shape.num_pages - 1) for i in ids)


def _fetch(shape: ChunkShape, refs: Refs, work: BlockWork) -> None:
    """Copy tiles to shared memory, as far ahead of the computing warpgroups as there are slots."""
    last = work.steps - 1

    def step(i: jax.Array, ids: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        # The ids of the next tile are on their way while this one waits for its slot.
        ahead = physical_pages(shape, refs.page_table, work, jnp.minimum(i + 1, last))
        slot = remainder(i, shape.stages)

        @pl.when(i >= shape.stages)
        def _():
            plgpu.barrier_wait(refs.empty.at[slot])

        for k, page in enumerate(ids):
            target = refs.tiles.at[slot]
            if len(ids) > 1:
                target = target.at[pl.ds(k * shape.page_size, shape.page_size)]
            plgpu.copy_gmem_to_smem(refs.kv_pages.at[page, work.kv_head], target, refs.full.at[slot])
        return ahead

    # Every slot was given back before its barrier goes.
    def drain(i: jax.Array, _: None) -> None:
        plgpu.barrier_wait(refs.empty.at[remainder(i, shape.stages)])

    @pl.when(work.steps > 0)
    def _():
        jax.lax.fori_loop(0, work.steps, step, physical_pages(shape, refs.page_table, work, jnp.int32(0)))
        jax.lax.fori_loop(jnp.maximum(work.steps - shape.stages, 0), work.steps, drain, None)


def _compute(shape: ChunkShape, refs: Refs, work: BlockWork, thread: jax.Array, scale: float) -> None:
    """Running top, total and weighted sum of values of one warpgroup's queries."""
    head_dim, factor = shape.head_dim, scale * LOG2E
    rows = refs.rows.at[thread]
    first, position = work.first + thread * ROWS, work.position + thread * ROWS
    plgpu.copy_gmem_to_smem(refs.q.at[work.row, pl.ds(first, ROWS), work.head], rows, refs.asked.at[thread])

    def hand_over() -> None:
        plgpu.barrier_arrive(refs.turn)
        plgpu.barrier_wait(refs.turn)

    def step(i: jax.Array, carry: Any, *, whole: bool) -> Any:
        top, total, out = carry
        slot = remainder(i, shape.stages)
        keys = refs.tiles.at[slot, :, pl.ds(0, head_dim)]
        values = refs.tiles.at[slot, :, pl.ds(head_dim, head_dim)]
        ragged = (i + 1) * TILE > work.seen
        if not whole:

            @pl.when(ragged & (thread == 0))
            def _():
                # What lies behind the last token may be NaN, and 0 · NaN is NaN. Once for all warpgroups.
                for half in range(0, TILE, ROWS):
                    part = refs.tiles.at[slot, pl.ds(half, ROWS), pl.ds(head_dim, head_dim)]
                    held = load(part, WGMMA)
                    kept = iota((ROWS, head_dim), 0) < work.seen - i * TILE - half
                    store(part, jnp.where(kept, held, jnp.zeros_like(held)))
                plgpu.commit_smem()
                plgpu.barrier_arrive(refs.clean)

        def multiply_keys(acc: Any) -> jax.Array:
            plgpu.wgmma(acc, rows, keys.transpose((1, 0)))
            hand_over()
            return acc[...]

        scores = pl.run_scoped(multiply_keys, plgpu.WGMMAAccumulatorRef((ROWS, TILE), jnp.float32))
        if not whole:
            token = iota(scores.shape, 1)
            inside = (token <= iota(scores.shape, 0) + (position - i * TILE)) & (token < work.seen - i * TILE)
            scores = jnp.where(inside, scores, MASKED)
        # Every query sees the first token, so that from the first tile on masked weights are 0, not 1.
        new_top = jnp.maximum(top, jnp.max(scores, axis=1) * factor)
        shrink = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores * factor - along_columns(new_top, scores.shape))
        total = total * shrink + jnp.sum(weights, axis=1)
        out = out * along_columns(shrink, out.shape)
        # All of it before the tensor cores are claimed: the compiler would move some behind.
        new_top, total, out, weights = jax.lax.optimization_barrier((new_top, total, out, weights.astype(rows.dtype)))
        hand_over()
        if not whole:

            @pl.when(ragged)
            def _():
                plgpu.barrier_wait(refs.clean)

        def wait_for_next() -> None:
            @pl.when(i + 1 < work.steps)
            def _():
                plgpu.barrier_wait(refs.full.at[remainder(i + 1, shape.stages)])

        out = multiply_add(out, weights, values, wait_for_next)
        plgpu.barrier_arrive(refs.empty.at[slot])
        return new_top, total, out

    carry = (
        full((ROWS,), MASKED, WGMMA.reduce(1)),
        full((ROWS,), 0.0, WGMMA.reduce(1)),
        full((ROWS, head_dim), 0.0, WGMMA),
    )
    plgpu.barrier_wait(refs.asked.at[thread])

    @pl.when(work.steps > 0)
    def _():
        plgpu.barrier_wait(refs.full.at[0])

    # The second warpgroup is half a step behind the first.
    pl.when(thread == 1)(hand_over)
    wholly_seen = jnp.clip(_tiles(jnp.minimum(position + 1, work.seen)), 0, work.steps)
    carry = jax.lax.fori_loop(0, wholly_seen, functools.partial(step, whole=True), carry)
    _, total, out = jax.lax.fori_loop(wholly_seen, work.steps, functools.partial(step, whole=False), carry)
    pl.when(thread == 0)(hand_over)
    inverse = jnp.where(total > 0.0, 1.0 / total, 0.0)
    rows[...] = (out * along_columns(inverse, out.shape)).astype(rows.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(rows, refs.out.at[work.row, pl.ds(first, ROWS), work.head])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
