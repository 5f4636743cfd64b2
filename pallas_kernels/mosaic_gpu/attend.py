"""Attention of the new token over paged keys and values: every block reads its share of tiles and leaves pieces.

One warpgroup fetches tiles (TMA, by page id, several in flight); two others compute, every other tile each, so that one
waits for its tensor cores while the other has its softmax, and unite what they found at the end of a piece. A tile's
tokens are the rows of a wgmma and the query heads of one KV head its eight columns, so that K·qᵀ and Vᵀ·pᵀ waste no
tensor work on padding.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.common import (
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
    remainder,
    store,
    wait_for_predecessor,
)  # fmt: skip
from pallas_kernels.mosaic_gpu.plan import TILE_TOKENS, Rows, Tiling
from pallas_kernels.types import PageScore
from pallas_kernels.xla.decode import MASKED

# Warpgroups that compute tiles of the usual size; larger ones take one of them all its time, and its slots are few.
COMPUTING = 2
# Shared memory for tiles in flight, and how many of them there may be: their page ids are held in registers.
_TILE_BYTES = 192 * 1024
_MOST_STAGES = 8
# Scores of pages come as rows of this many.
SCORE_ROW = 64


@dataclasses.dataclass(frozen=True)
class _Piece:
    """What a block does for one head: `steps` tiles from `first`."""

    row: Any
    index: Any
    head: Any
    dense: Any
    first: Any
    steps: Any
    length: Any
    number: Any


@functools.partial(jax.jit, static_argnames=("tiling", "scale", "page_scores", "score_rows", "target"))
def attend(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    order: jax.Array | None,
    pages: jax.Array | None,
    counts: jax.Array | None,
    *,
    tiling: Tiling,
    scale: float,
    page_scores: PageScore | None,
    score_rows: int,
    target: Any,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Read everything once.

    `order [heads]` names the KV heads, the dense ones first (None: all of them, in order). Returns, for every piece,
    its weighted sum of values `[pieces, 8, H]` and the top and the total of its weights `[pieces, 2, 8]` (base 2), and
    page scores `[B, dense, score_rows, 64]`. `target` keeps what was traced for other machines apart.
    """
    del target
    batch, _, groups, head_dim = q.shape
    capacity = page_table.shape[1]
    num_pages = kv_pages.shape[0]
    q, stride = query_rows(q)
    scored = page_scores is not None and tiling.dense > 0
    tokens, per_tile = tiling.tile_tokens, tiling.pages_per_tile
    stages = min(_MOST_STAGES, _TILE_BYTES // (tokens * 2 * head_dim * kv_pages.dtype.itemsize))
    computing = COMPUTING if tokens == TILE_TOKENS else 1
    # A slot is always the same warpgroup's, as whoever waits at a barrier must do so every time.
    stages -= stages % computing

    names = ["q", "kv_pages", "page_table", "lengths"]
    inputs = [q, kv_pages, page_table, lengths]
    if order is not None:
        names, inputs = [*names, "order"], [*inputs, order]
    if tiling.sparse:
        assert pages is not None
        assert counts is not None
        names, inputs = [*names, "pages", "counts"], [*inputs, pages, counts]
    names += ["sums", "stats"]
    outputs = [
        jax.ShapeDtypeStruct((tiling.pieces, COLUMNS, head_dim), jnp.float32),
        jax.ShapeDtypeStruct((tiling.pieces, 2, COLUMNS), jnp.float32),
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
        outputs.append(jax.ShapeDtypeStruct((batch, tiling.dense, score_rows, SCORE_ROW), jnp.float32))
        scratch["ready_scores"] = plgpu.SMEM((computing, COLUMNS), jnp.float32)

    def body(*args: Any, **named: Any) -> None:
        refs = Refs(dict(zip(names, args, strict=True)) | named)
        wait_for_predecessor()
        let_successor_start()
        thread = jax.lax.axis_index("warpgroup")

        def compute(number: int) -> None:
            @pl.when(thread == number)
            def _():
                scoring = page_scores if scored else None
                _Compute(tiling, refs, number, computing, groups, stride, scale, scoring, stages).run()

        if computing > 1:
            # A maximum over a tile's tokens goes through memory that lies behind whatever is allocated around it:
            # without an allocation around one of them, both warpgroups would use the same, which the interpreter does
            # not see. Nobody waits where the allocation ends.
            space = compiler_params().reduction_scratch_bytes
            pl.run_scoped(lambda _: compute(1), plgpu.SMEM((space,), jnp.int8), collective_axes="warpgroup")
        compute(0)

        @pl.when(thread == computing)
        def _():
            _Fetch(tiling, refs, num_pages, capacity, stages).run()

    out = plgpu.kernel(
        body, out_type=outputs, scratch_types=scratch, grid=(tiling.blocks,), grid_names=("block",),
        num_threads=computing + 1, thread_name="warpgroup", compiler_params=compiler_params(),
        interpret=interpreter(), kernel_name="attend",
    )(*inputs)  # fmt: skip
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


class _Walk:
    """A block's walk over its pieces; all warpgroups take the same one."""

    def __init__(self, tiling: Tiling, refs: Refs, stages: int):
        self.tiling, self.refs, self.stages = tiling, refs, stages

    def piece(self, piece: _Piece, count: jax.Array, pieces: jax.Array) -> None:
        """Work on a piece, which may have no steps; `count` tiles in `pieces` pieces came before it."""
        raise NotImplementedError

    def run(self) -> tuple[jax.Array, jax.Array]:
        """Take all pieces of this block in turn; returns the numbers of tiles and of pieces."""
        tiling, refs = self.tiling, self.refs
        # Loaded before they are needed, so that no load waits for another.
        order = [refs.order[j] for j in range(tiling.heads)] if hasattr(refs, "order") else None
        rows = Rows(tiling, refs.lengths)
        block = jax.lax.axis_index("block").astype(jnp.int32)
        start = block * rows.share
        end = jnp.minimum(start + rows.share, rows.total)

        def step(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            tile, count, pieces = carry
            row, row_start, length = rows.locate(tile)
            offset = tile - row_start
            dense_tiles, sparse_tiles = tiling.dense_tiles(length), tiling.sparse_tiles(length)
            beyond = offset - tiling.dense * dense_tiles
            dense = beyond < 0
            whole = jnp.where(dense, dense_tiles, sparse_tiles)
            within = jnp.where(dense, offset, beyond)
            index = within // whole
            first = within - index * whole
            index = jnp.where(dense, index, index + tiling.dense)
            head = index
            for j, named in enumerate(order or ()):
                head = jnp.where(index == j, named, head)
            planned = jnp.minimum(whole - first, end - tile)
            steps = planned
            if tiling.sparse:
                chosen = (refs.counts[row, head] + tiling.pages_per_tile - 1) // tiling.pages_per_tile
                steps = jnp.where(dense, planned, jnp.clip(chosen - first, 0, planned))
            piece = _Piece(row, index, head, dense, first, steps, length, row * tiling.heads + index + block)
            self.piece(piece, count, pieces)
            return tile + planned, count + steps, pieces + 1

        none = jnp.int32(0)
        _, count, pieces = jax.lax.while_loop(lambda carry: carry[0] < end, step, (start, none, none))
        return count, pieces

    def logical(self, piece: _Piece, tile: jax.Array) -> list[jax.Array]:
        """The logical pages of a tile, −1 where there is none."""
        tiling = self.tiling
        used = (piece.length + tiling.page_size - 1) // tiling.page_size
        pages = []
        for k in range(tiling.pages_per_tile):
            index = tile * tiling.pages_per_tile + k
            page = index
            if tiling.sparse:
                inside = jnp.minimum(index, tiling.selected - 1)
                # A dense head has no pages here; what is read instead is thrown away.
                page = self.refs.pages[piece.row, piece.head, inside]
                page = jnp.where(piece.dense, index, jnp.where(index < tiling.selected, page, -1))
            pages.append(jnp.where(page < used, page, -1))
        return pages


class _Fetch(_Walk):
    """Copy tiles to shared memory, as far ahead of the computing warpgroups as there are slots."""

    def __init__(self, tiling: Tiling, refs: Refs, num_pages: int, capacity: int, stages: int):
        super().__init__(tiling, refs, stages)
        self.num_pages, self.capacity = num_pages, capacity

    def physical(self, piece: _Piece, pages: list[jax.Array]) -> list[jax.Array]:
        """The pool pages of a tile. Wrong ids are never followed: every one of these lies inside the pool."""
        # An empty place repeats a page that is read anyway.
        pages = [jnp.where(page < 0, jnp.maximum(pages[0], 0), page) for page in pages]
        ids = [self.refs.page_table[piece.row, jnp.clip(page, 0, self.capacity - 1)] for page in pages]
        return [jnp.clip(i, 0, self.num_pages - 1) for i in ids]

    def piece(self, piece: _Piece, count: jax.Array, pieces: jax.Array) -> None:
        """One round after the other, each of as many tiles as there are slots.

        A tile's ids take two loads, the second of which waits for the first. Those of a round are all on their way at
        once, and those of the next round while this one's tiles wait for their slots.
        """
        tiling, refs, stages, last = self.tiling, self.refs, self.stages, piece.steps - 1

        def logical(turn: Any) -> list[list[jax.Array]]:
            tiles = [piece.first + jnp.minimum(turn * stages + k, jnp.maximum(last, 0)) for k in range(stages)]
            return [self.logical(piece, tile) for tile in tiles]

        def physical(pages: list[list[jax.Array]]) -> list[list[jax.Array]]:
            return [self.physical(piece, pages_of_tile) for pages_of_tile in pages]

        def fetch(i: jax.Array, ids: list[jax.Array]) -> None:
            slot = remainder(count + i, stages)

            @pl.when(count + i >= stages)
            def _():
                plgpu.barrier_wait(refs.empty.at[slot])

            for k, page in enumerate(ids):
                target = refs.tiles.at[slot]
                if len(ids) > 1:
                    target = target.at[pl.ds(k * tiling.page_size, tiling.page_size)]
                plgpu.copy_gmem_to_smem(refs.kv_pages.at[page, piece.head], target, refs.full.at[slot])

        def round_of(turn: jax.Array, ids: list[list[jax.Array]]) -> list[list[jax.Array]]:
            ahead = logical(turn + 1)
            for k in range(stages):
                i = turn * stages + k
                pl.when(i < piece.steps)(functools.partial(fetch, i, ids[k]))
            return physical(ahead)

        # Before it is known whether there is any: loads must not wait for each other.
        first = physical(logical(0))

        @pl.when(piece.steps > 0)
        def _():
            jax.lax.fori_loop(0, (piece.steps + stages - 1) // stages, round_of, first)

    def run(self) -> tuple[jax.Array, jax.Array]:
        count, pieces = super().run()

        # Every slot was given back before its barrier goes.
        def drain(i: jax.Array, _: None) -> None:
            plgpu.barrier_wait(self.refs.empty.at[remainder(i, self.stages)])

        jax.lax.fori_loop(jnp.maximum(count - self.stages, 0), count, drain, None)
        return count, pieces


class _Compute(_Walk):
    """Running top, total and weighted sum of values of each piece, rescaled from tile to tile.

    Warpgroup `number` of two takes every other tile of all that the block has, and with it every other slot. A lone one
    takes all of them.
    """

    def __init__(
        self, tiling: Tiling, refs: Refs, number: int, computing: int, groups: int, stride: int, scale: float,
        page_scores: PageScore | None, stages: int,
    ):  # fmt: skip
        super().__init__(tiling, refs, stages)
        self.number, self.computing, self.groups, self.stride = number, computing, groups, stride
        self.scale, self.page_scores = scale, page_scores
        self.head_dim = refs.query.shape[2]
        self.query, self.weights, self.asked = (ref.at[number] for ref in (refs.query, refs.weights, refs.asked))

    def real(self, piece: _Piece, tile: jax.Array) -> tuple[jax.Array, ...]:
        """How many tokens of each page of a tile are real."""
        size = self.tiling.page_size
        pages = self.logical(piece, tile)
        return tuple(jnp.where(page >= 0, jnp.minimum(piece.length - page * size, size), 0) for page in pages)

    def inside(self, real: tuple[jax.Array, ...], shape: tuple[int, int]) -> jax.Array:
        """Which rows of a tile are real."""
        token, size = iota(shape, 0), self.tiling.page_size
        inside = token < real[0]
        for k in range(1, len(real)):
            inside = jnp.where(token < k * size, inside, token < k * size + real[k])
        return inside

    def piece(self, piece: _Piece, count: jax.Array, pieces: jax.Array) -> None:
        tiling, refs, last = self.tiling, self.refs, piece.steps - 1
        tokens, head_dim = tiling.tile_tokens, self.head_dim
        query = (piece.row * tiling.kv_heads + piece.head) * self.stride
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

            @pl.when(least < tiling.page_size)
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
        turns = (jnp.maximum(piece.steps - mine, 0) + self.computing - 1) // self.computing
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
        count, pieces = super().run()
        if self.number:
            # Everything was read before the barrier goes.
            @pl.when(pieces > 0)
            def _():
                plgpu.barrier_wait(self.refs.other_read)

        return count, pieces

    def score_pages(self, scores: jax.Array, inside: jax.Array) -> None:
        """Score the pages of a tile: one column for each of them, in which only its own tokens count."""
        shape, size = scores.shape, self.tiling.page_size
        if self.groups < COLUMNS:
            scores = jnp.where(iota(shape, 1) < self.groups, scores, 0.0)
        mean = along_columns(jnp.sum(scores, axis=1) * (self.scale / self.groups), shape)
        own = inside & (iota(shape, 0) // size == iota(shape, 1))
        best = jnp.max(jnp.where(own, mean, MASKED), axis=0)
        if self.page_scores == "lse":
            shifted = jnp.where(own, jnp.exp2((mean - along_rows(best, shape)) * LOG2E), 0.0)
            best = best + jnp.log2(jnp.sum(shifted, axis=0)) * (1.0 / LOG2E)
        store(self.refs.ready_scores.at[self.number], best)

    def write_scores(self, piece: _Piece, i: jax.Array) -> None:
        """Write the scores that `score_pages` left; pages past the length get some, too."""
        refs, per_tile = self.refs, self.tiling.pages_per_tile

        @pl.when(piece.dense)
        def _():
            for k in range(per_tile):
                page = (piece.first + i) * per_tile + k
                refs.scores[piece.row, piece.index, page // SCORE_ROW, remainder(page, SCORE_ROW)] = refs.ready_scores[
                    self.number, k
                ]
