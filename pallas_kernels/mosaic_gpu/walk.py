"""How a block of `attend` goes through its share of tiles, and the warpgroup that fetches them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.common import Refs, quotient, quotient_up, remainder
from pallas_kernels.mosaic_gpu.split import SplitPlan, TileList


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a block does for one head: `steps` tiles from `first`.

    `index` is the head's place in the call, `head` its place in the pool; `dense`: it reads all pages; `scored`: they
    are given scores.
    """

    row: Any
    index: Any
    head: Any
    dense: Any
    scored: Any
    first: Any
    steps: Any
    length: Any
    number: Any


class Walk:
    """A block's walk over its pieces; all warpgroups take the same one."""

    def __init__(self, plan: SplitPlan, refs: Refs, stages: int):
        self.plan, self.refs, self.stages = plan, refs, stages

    def piece(self, piece: Piece, count: jax.Array, pieces: jax.Array) -> None:
        """Work on a piece, which may have no steps; `count` tiles in `pieces` pieces came before it."""
        raise NotImplementedError

    def run(self) -> tuple[jax.Array, jax.Array]:
        """Take all pieces of this block in turn; returns the numbers of tiles and of pieces."""
        plan, refs = self.plan, self.refs
        # Loaded before they are needed, so that no load waits for another.
        order = [refs.order[j] for j in range(plan.heads)] if hasattr(refs, "order") else None
        tiles = TileList(plan, refs)
        block = jax.lax.axis_index("block").astype(jnp.int32)
        start = block * tiles.share
        end = jnp.minimum(start + tiles.share, tiles.total)

        def step(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            tile, count, pieces = carry
            row = tiles.locate(tile)
            offset = tile - row.start
            dense_tiles, sparse_tiles = plan.dense_tiles(row.length), plan.sparse_tiles(row.length)
            beyond = offset - row.dense_heads * dense_tiles
            dense = beyond < 0
            whole = jnp.where(dense, dense_tiles, sparse_tiles)
            within = jnp.where(dense, offset, beyond)
            index = quotient(within, whole)
            first = within - index * whole
            index = jnp.where(dense, index, index + row.dense_heads)
            head = index
            for j, named in enumerate(order or ()):
                head = jnp.where(index == j, named, head)
            planned = jnp.minimum(whole - first, end - tile)
            steps = planned
            if plan.selective:
                chosen = quotient_up(refs.counts[row.number, head], plan.pages_per_tile)
                steps = jnp.where(dense, planned, jnp.clip(chosen - first, 0, planned))
            # Nobody selects pages in a dense row.
            scored = dense if row.flag is None else dense & ~row.flag
            number = row.number * plan.heads + index + block
            self.piece(Piece(row.number, index, head, dense, scored, first, steps, row.length, number), count, pieces)
            return tile + planned, count + steps, pieces + 1

        none = jnp.int32(0)
        _, count, pieces = jax.lax.while_loop(lambda carry: carry[0] < end, step, (start, none, none))
        return count, pieces

    def logical(self, piece: Piece, tile: jax.Array) -> list[jax.Array]:
        """The logical pages of a tile, −1 where there is none."""
        plan = self.plan
        used = quotient_up(piece.length, plan.page_size)
        pages = []
        for k in range(plan.pages_per_tile):
            index = tile * plan.pages_per_tile + k
            page = index
            if plan.selective:
                inside = jnp.minimum(index, plan.selected - 1)
                # A dense head has no pages here; what is read instead is thrown away.
                page = self.refs.pages[piece.row, piece.head, inside]
                page = jnp.where(piece.dense, index, jnp.where(index < plan.selected, page, -1))
            pages.append(jnp.where(page < used, page, -1))
        return pages


class Fetch(Walk):
    """Copy tiles to shared memory, as far ahead of the computing warpgroups as there are slots."""

    def __init__(self, plan: SplitPlan, refs: Refs, num_pages: int, capacity: int, stages: int):
        super().__init__(plan, refs, stages)
        self.num_pages, self.capacity = num_pages, capacity

    def physical(self, piece: Piece, pages: list[jax.Array]) -> list[jax.Array]:
        """The pool pages of a tile. Wrong ids are never followed: every one of these lies inside the pool."""
        # An empty place repeats a page that is read anyway.
        pages = [jnp.where(page < 0, jnp.maximum(pages[0], 0), page) for page in pages]
        ids = [self.refs.page_table[piece.row, jnp.clip(page, 0, self.capacity - 1)] for page in pages]
        return [jnp.clip(i, 0, self.num_pages - 1) for i in ids]

    def piece(self, piece: Piece, count: jax.Array, pieces: jax.Array) -> None:
        """One round after the other, each of as many tiles as there are slots.

        A tile's ids take two loads, the second of which waits for the first. Those of a round are all on their way at
        once, and those of the next round while this one's tiles wait for their slots.
        """
        plan, refs, stages, last = self.plan, self.refs, self.stages, piece.steps - 1

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
                part = pl.ds(k * plan.page_size, plan.page_size)
                if len(ids) > 1:
                    target = target.at[part]
                plgpu.copy_gmem_to_smem(refs.kv_pages.at[page, piece.head], target, refs.full.at[slot])
                if hasattr(refs, "kv_scales"):
                    for half in range(2):
                        source = refs.kv_scales.at[page, piece.head, half]
                        plgpu.copy_gmem_to_smem(source, refs.scales.at[slot, half, part], refs.full.at[slot])

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
            jax.lax.fori_loop(0, quotient_up(piece.steps, stages), round_of, first)

    def run(self) -> tuple[jax.Array, jax.Array]:
        """Take all pieces; every slot was given back before its barrier goes."""
        count, pieces = super().run()

        def drain(i: jax.Array, _: None) -> None:
            plgpu.barrier_wait(self.refs.empty.at[remainder(i, self.stages)])

        jax.lax.fori_loop(jnp.maximum(count - self.stages, 0), count, drain, None)
        return count, pieces
