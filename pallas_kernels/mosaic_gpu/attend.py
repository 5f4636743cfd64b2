"""Attention of the new token over paged keys and values: every block reads its share of tiles and leaves pieces.

One warpgroup fetches tiles (TMA, by page id, several in flight); two others compute, every other tile each, so that one
waits for its tensor cores while the other has its softmax, and unite what they found at the end of a piece. A tile's
tokens are the rows of a wgmma and the query heads of one KV head its eight columns, so that K·qᵀ and Vᵀ·pᵀ waste no
tensor work on padding.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.common import (  # fmt: skip
    COLUMNS,
    LOG2E,
    TILED,
    TILED_32,
    WGMMA,
    WGMMA_SINGLE,
    Refs,
    along_columns,
    along_rows,
    compiler_params,
    full,
    interpreter,
    iota,
    let_successor_start,
    load,
    quotient,
    quotient_up,
    remainder,
    store,
    wait_for_predecessor,
)
from pallas_kernels.mosaic_gpu.split import TILE_TOKENS, SplitPlan
from pallas_kernels.mosaic_gpu.walk import Fetch, Piece, Walk
from pallas_kernels.types import PageScore, Selection
from pallas_kernels.xla.decode import MASKED

# Scores of pages come as rows of this many.
SCORE_ROW = 64


@functools.partial(jax.jit, static_argnames=("plan", "scale", "page_scores", "score_rows", "target"))
def attend(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    order: jax.Array | None,
    selection: Selection | None,
    *,
    named: jax.Array | None = None,
    dense_rows: jax.Array | None = None,
    plan: SplitPlan,
    scale: float,
    page_scores: PageScore | None,
    score_rows: int,
    target: Any,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Read everything once.

    `order [heads]` names the KV heads, the dense ones first (None: all of them, in order); of `named` and `dense_rows`
    `TileList` tells. Returns, for every piece, its weighted sum of values `[pieces, 8, H]` and the top and the total of
    its weights `[pieces, 2, 8]` (base 2), and page scores `[B, dense_heads, score_rows, 64]`. `target` keeps what was
    traced for other machines apart.
    """
    del target
    batch, _, groups, head_dim = q.shape
    capacity = page_table.shape[1]
    num_pages = kv_pages.shape[0]
    q, stride = query_rows(q)
    scored = page_scores is not None and plan.dense_heads > 0
    config = plan.config
    tokens, per_tile = plan.tile_tokens, plan.pages_per_tile
    stages = min(config.max_stages, config.tile_bytes // (tokens * 2 * head_dim * kv_pages.dtype.itemsize))
    # Larger tiles take one warpgroup all its time, and their slots are few.
    computing = config.compute_warpgroups if tokens == TILE_TOKENS else 1
    # A slot is always the same warpgroup's, as whoever waits at a barrier must do so every time.
    stages -= stages % computing

    given = {
        "q": q, "kv_pages": kv_pages, "page_table": page_table, "lengths": lengths, "order": order,
        "named": named, "dense_rows": dense_rows,
    }  # fmt: skip
    if plan.selective:
        assert selection is not None
        given |= {"pages": selection.pages, "counts": selection.counts}
    inputs = {name: array for name, array in given.items() if array is not None}
    names = [*inputs, "sums", "stats"]
    outputs = [
        jax.ShapeDtypeStruct((plan.pieces, COLUMNS, head_dim), jnp.float32),
        jax.ShapeDtypeStruct((plan.pieces, 2, COLUMNS), jnp.float32),
    ]
    scratch = {
        "tiles": plgpu.SMEM((stages, tokens, 2 * head_dim), kv_pages.dtype, transforms=TILED),
        "query": plgpu.SMEM((computing, COLUMNS, head_dim), kv_pages.dtype, transforms=TILED),
        "weights": plgpu.SMEM((computing, COLUMNS, tokens), kv_pages.dtype, transforms=TILED),
        "turned": plgpu.SMEM((COLUMNS, head_dim), jnp.float32, transforms=TILED_32),
        "asked": plgpu.Barrier(num_barriers=computing),
        "full": plgpu.Barrier(num_arrivals=per_tile, num_barriers=stages),
        "empty": plgpu.Barrier(num_barriers=stages),
    }
    if computing > 1:
        scratch |= {
            "other_out": plgpu.SMEM((head_dim, COLUMNS), jnp.float32),
            "other_stats": plgpu.SMEM((2, COLUMNS), jnp.float32),
            "other_done": plgpu.Barrier(),
            "other_read": plgpu.Barrier(),
        }
    if scored:
        names.append("scores")
        outputs.append(jax.ShapeDtypeStruct((batch, plan.dense_heads, score_rows, SCORE_ROW), jnp.float32))
        scratch["ready_scores"] = plgpu.SMEM((computing, COLUMNS), jnp.float32)

    def body(*args: Any, **held: Any) -> None:
        refs = Refs(dict(zip(names, args, strict=True)) | held)
        wait_for_predecessor()
        let_successor_start()
        thread = jax.lax.axis_index("warpgroup")

        def compute(number: int) -> None:
            @pl.when(thread == number)
            def _():
                scoring = page_scores if scored else None
                Compute(plan, refs, number, computing, groups, stride, scale, scoring, stages).run()

        if computing > 1:
            # A maximum over a tile's tokens goes through memory that lies behind whatever is allocated around it:
            # without an allocation around one of them, both warpgroups would use the same, which the interpreter does
            # not see. Nobody waits where the allocation ends.
            space = compiler_params().reduction_scratch_bytes
            pl.run_scoped(lambda _: compute(1), plgpu.SMEM((space,), jnp.int8), collective_axes="warpgroup")
        compute(0)

        @pl.when(thread == computing)
        def _():
            Fetch(plan, refs, num_pages, capacity, stages).run()

    out = plgpu.kernel(
        body, out_type=outputs, scratch_types=scratch, grid=(plan.blocks,), grid_names=("block",),
        num_threads=computing + 1, thread_name="warpgroup", compiler_params=compiler_params(),
        interpret=interpreter(), kernel_name="attend",
    )(*inputs.values())  # fmt: skip
    return out[0], out[1], out[2] if scored else None


def query_rows(q: jax.Array) -> tuple[jax.Array, int]:
    """The query heads `[B, K, G, H]` as rows, whole tiles of eight, and how many belong to a KV head.

    A block loads eight rows from its KV head's first on; what is not its own is computed and ignored. Such a copy ends
    with the tile of eight that it begins in: behind it the hardware gives zeros. So no KV head's rows may lie in two
    tiles. The interpreter does not know that.
    """
    batch, kv_heads, groups, head_dim = q.shape
    stride = groups if COLUMNS % groups == 0 else COLUMNS
    q = jnp.pad(q, ((0, 0), (0, 0), (0, stride - groups), (0, 0))).reshape(batch * kv_heads * stride, head_dim)
    # JAX 0.11 refuses to copy from an array of another height.
    return jnp.pad(q, ((0, -q.shape[0] % COLUMNS), (0, 0))), stride


class Compute(Walk):
    """Running top, total and weighted sum of values of each piece, rescaled from tile to tile.

    Warpgroup `number` of two takes every other tile of all that the block has, and with it every other slot. A lone one
    takes all of them.
    """

    def __init__(
        self, plan: SplitPlan, refs: Refs, number: int, computing: int, groups: int, stride: int, scale: float,
        page_scores: PageScore | None, stages: int,
    ):  # fmt: skip
        super().__init__(plan, refs, stages)
        self.number, self.computing, self.groups, self.stride = number, computing, groups, stride
        self.scale, self.page_scores = scale, page_scores
        self.head_dim = refs.query.shape[2]
        self.query, self.weights, self.asked = (ref.at[number] for ref in (refs.query, refs.weights, refs.asked))

    def real(self, piece: Piece, tile: jax.Array) -> tuple[jax.Array, ...]:
        """How many tokens of each page of a tile are real."""
        size = self.plan.page_size
        pages = self.logical(piece, tile)
        return tuple(jnp.where(page >= 0, jnp.minimum(piece.length - page * size, size), 0) for page in pages)

    def inside(self, real: tuple[jax.Array, ...], shape: tuple[int, int]) -> jax.Array:
        """Which rows of a tile are real."""
        token, size = iota(shape, 0), self.plan.page_size
        inside = token < real[0]
        for k in range(1, len(real)):
            inside = jnp.where(token < k * size, inside, token < k * size + real[k])
        return inside

    def piece(self, piece: Piece, count: jax.Array, pieces: jax.Array) -> None:
        """Attend to this warpgroup's tiles; the first one writes what both found."""
        plan, refs, last = self.plan, self.refs, piece.steps - 1
        tokens, head_dim = plan.tile_tokens, self.head_dim
        query = (piece.row * plan.kv_heads + piece.head) * self.stride
        plgpu.copy_gmem_to_smem(refs.q.at[pl.ds(query, COLUMNS)], self.query, self.asked)
        mine = remainder(count + self.number, self.computing)

        def step(turn: jax.Array, carry: Any) -> Any:
            top, total, out, real = carry
            i = mine + turn * self.computing
            slot = remainder(count + i, self.stages)
            ahead = self.real(piece, piece.first + jnp.minimum(i + self.computing, last))
            keys = refs.tiles.at[slot, :, pl.ds(0, head_dim)]
            values = refs.tiles.at[slot, :, pl.ds(head_dim, head_dim)]
            plgpu.barrier_wait(refs.full.at[slot])

            def multiply_keys(acc: Any) -> jax.Array:
                plgpu.wgmma(acc, keys, self.query.transpose((1, 0)))
                return acc[...]

            scores = pl.run_scoped(multiply_keys, plgpu.WGMMAAccumulatorRef((tokens, COLUMNS), jnp.float32))
            inside = self.inside(real, (tokens, COLUMNS))
            if self.page_scores is not None:
                self.score_pages(scores, inside)
            scores = jnp.where(inside, scores * (self.scale * LOG2E), MASKED)
            new_top = jnp.maximum(top, jnp.max(scores, axis=0))
            weights = jnp.where(inside, jnp.exp2(scores - along_rows(new_top, scores.shape)), 0.0)
            shrink = jnp.exp2(top - new_top)
            store(self.weights.transpose((1, 0)), weights.astype(self.weights.dtype))
            least = real[0]
            for other in real[1:]:
                least = jnp.minimum(least, other)

            @pl.when(least < plan.page_size)
            def _():
                # What lies behind the last token may be NaN, and 0 · NaN is NaN.
                held = load(values, WGMMA)
                kept = self.inside(real, (tokens, head_dim))
                store(values, jnp.where(kept, held, jnp.zeros_like(held)))

            plgpu.commit_smem()
            if self.page_scores is not None:
                self.write_scores(piece, i)

            def multiply_values(acc: Any) -> jax.Array:
                plgpu.wgmma(acc, values.transpose((1, 0)), self.weights.transpose((1, 0)))
                return acc[...]

            added = pl.run_scoped(multiply_values, plgpu.WGMMAAccumulatorRef((head_dim, COLUMNS), jnp.float32))
            plgpu.barrier_arrive(refs.empty.at[slot])
            total = total * along_rows(shrink, total.shape) + weights
            out = out * along_rows(shrink, out.shape) + added
            return new_top, total, out, ahead

        start = (
            full((COLUMNS,), MASKED, WGMMA.reduce(0)),
            full((tokens, COLUMNS), 0.0, WGMMA),
            full((head_dim, COLUMNS), 0.0, WGMMA),
            self.real(piece, piece.first + jnp.minimum(mine, jnp.maximum(last, 0))),
        )
        plgpu.barrier_wait(self.asked)
        turns = quotient_up(jnp.maximum(piece.steps - mine, 0), self.computing)
        top, total, out, _ = jax.lax.fori_loop(0, turns, step, start)
        total = jnp.sum(total, axis=0)
        if self.number:
            self.hand_over(top, total, out, pieces)
            return
        if self.computing > 1:
            top, total, out = self.unite(top, total, out)
        store(refs.turned.transpose((1, 0)), plgpu.layout_cast(out, WGMMA_SINGLE))
        store(refs.stats.at[piece.number, 0], top)
        store(refs.stats.at[piece.number, 1], total)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(refs.turned, refs.sums.at[piece.number])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def hand_over(self, top: jax.Array, total: jax.Array, out: jax.Array, pieces: jax.Array) -> None:
        """Leave what the second warpgroup found in a piece for the first one."""
        refs = self.refs

        @pl.when(pieces > 0)
        def _():
            plgpu.barrier_wait(refs.other_read)

        store(refs.other_out, out)
        store(refs.other_stats.at[0], top)
        store(refs.other_stats.at[1], total)
        plgpu.commit_smem()
        plgpu.barrier_arrive(refs.other_done)

    def unite(self, top: jax.Array, total: jax.Array, out: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What both warpgroups found in a piece."""
        refs, column = self.refs, WGMMA.reduce(0)
        plgpu.barrier_wait(refs.other_done)
        other_top, other_total = load(refs.other_stats.at[0], column), load(refs.other_stats.at[1], column)
        other_out = load(refs.other_out, WGMMA)
        plgpu.commit_smem()
        plgpu.barrier_arrive(refs.other_read)
        united = jnp.maximum(top, other_top)
        kept, added = jnp.exp2(top - united), jnp.exp2(other_top - united)
        out = out * along_rows(kept, out.shape) + other_out * along_rows(added, out.shape)
        return united, total * kept + other_total * added, out

    def run(self) -> tuple[jax.Array, jax.Array]:
        """Take all pieces; the second warpgroup stays until the first has read what it left."""
        count, pieces = super().run()
        if self.number:

            @pl.when(pieces > 0)
            def _():
                plgpu.barrier_wait(self.refs.other_read)

        return count, pieces

    def score_pages(self, scores: jax.Array, inside: jax.Array) -> None:
        """Score the pages of a tile: one column for each of them, in which only its own tokens count."""
        shape, size = scores.shape, self.plan.page_size
        if self.groups < COLUMNS:
            scores = jnp.where(iota(shape, 1) < self.groups, scores, 0.0)
        mean = along_columns(jnp.sum(scores, axis=1) * (self.scale / self.groups), shape)
        own = inside & (quotient(iota(shape, 0), size) == iota(shape, 1))
        best = jnp.max(jnp.where(own, mean, MASKED), axis=0)
        if self.page_scores == "lse":
            shifted = jnp.where(own, jnp.exp2((mean - along_rows(best, shape)) * LOG2E), 0.0)
            best = best + jnp.log2(jnp.sum(shifted, axis=0)) * (1.0 / LOG2E)
        store(self.refs.ready_scores.at[self.number], best)

    def write_scores(self, piece: Piece, i: jax.Array) -> None:
        """Write the scores that `score_pages` left; pages past the length get some, too."""
        refs, per_tile = self.refs, self.plan.pages_per_tile

        @pl.when(piece.scored)
        def _():
            for k in range(per_tile):
                page = (piece.first + i) * per_tile + k
                place = quotient(page, SCORE_ROW), remainder(page, SCORE_ROW)
                refs.scores[piece.row, piece.index, *place] = refs.ready_scores[self.number, k]
