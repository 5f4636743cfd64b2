"""What a warpgroup of `attend` computes: scores, weights and sums of the tiles of 16-bit keys and values it takes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.common import (  # fmt: skip
    COLUMNS,
    LOG2E,
    WGMMA,
    WGMMA_SINGLE,
    Refs,
    along_columns,
    along_rows,
    full,
    iota,
    load,
    quotient,
    quotient_up,
    remainder,
    store,
)
from pallas_kernels.mosaic_gpu.split import SplitPlan
from pallas_kernels.mosaic_gpu.walk import Piece, Walk
from pallas_kernels.types import PageScore
from pallas_kernels.xla.decode import MASKED

# Scores of pages come as rows of this many.
SCORE_ROW = 64


class Compute(Walk):
    """Running top, total and weighted sum of values of each piece, rescaled from tile to tile.

    Warpgroup `number` of two takes every other tile of all that the block has, and with it every other slot. A lone one
    takes all of them.
    """

    # What a sum of values is to be multiplied by in the end.
    unit = 1.0

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
            plgpu.barrier_wait(refs.full.at[slot])
            scores, held = self.multiply_keys(slot, real)
            inside = self.inside(real, (tokens, COLUMNS))
            if self.page_scores is not None:
                self.score_pages(scores, inside)
            scores = jnp.where(inside, scores * (self.scale * LOG2E), MASKED)
            new_top = jnp.maximum(top, jnp.max(scores, axis=0))
            weights = jnp.where(inside, jnp.exp2(scores - along_rows(new_top, scores.shape)), 0.0)
            shrink = jnp.exp2(top - new_top)
            self.store_weights(slot, real, weights, inside, held)
            plgpu.commit_smem()
            if self.page_scores is not None:
                self.write_scores(piece, i)
            added = self.multiply_values(slot, held)
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
        self.take_query()
        turns = quotient_up(jnp.maximum(piece.steps - mine, 0), self.computing)
        top, total, out, _ = jax.lax.fori_loop(0, turns, step, start)
        total = jnp.sum(total, axis=0)
        if self.unit != 1.0:
            out = out * self.unit
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

    def take_query(self) -> None:
        """Make of the query what is multiplied."""

    def multiply_keys(self, slot: jax.Array, real: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
        """Products of the keys of a tile with the query, to be multiplied by `scale`; and what later steps need."""
        keys = self.refs.tiles.at[slot, :, pl.ds(0, self.head_dim)]

        def multiply(acc: Any) -> jax.Array:
            plgpu.wgmma(acc, keys, self.query.transpose((1, 0)))
            return acc[...]

        shape = self.plan.tile_tokens, COLUMNS
        return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32)), None

    def store_weights(
        self, slot: jax.Array, real: tuple[jax.Array, ...], weights: jax.Array, inside: jax.Array, held: Any
    ) -> None:
        """Leave the weights where the values will be multiplied with them."""
        del inside, held
        store(self.weights.transpose((1, 0)), weights.astype(self.weights.dtype))
        self.clear(self.refs.tiles.at[slot, :, pl.ds(self.head_dim, self.head_dim)], real)

    def clear(self, tile: Any, real: tuple[jax.Array, ...]) -> None:
        """Zeros behind the last token: what lies there may be NaN, and 0 · NaN is NaN."""
        least = functools.reduce(jnp.minimum, real)

        @pl.when(least < self.plan.page_size)
        def _():
            held = load(tile, WGMMA)
            kept = self.inside(real, tile.shape)
            store(tile, jnp.where(kept, held, jnp.zeros_like(held)))
            plgpu.commit_smem()

    def multiply_values(self, slot: jax.Array, held: Any) -> jax.Array:
        """The weighted sum of the values of a tile, in units of `unit`; the slot is given back."""
        del held
        refs, head_dim = self.refs, self.head_dim
        values = refs.tiles.at[slot, :, pl.ds(head_dim, head_dim)]

        def multiply(acc: Any) -> jax.Array:
            plgpu.wgmma(acc, values.transpose((1, 0)), self.weights.transpose((1, 0)))
            return acc[...]

        added = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((head_dim, COLUMNS), jnp.float32))
        plgpu.barrier_arrive(refs.empty.at[slot])
        return added

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
