"""Exact top pages of one head: forced pages, then the highest scores, ties to the lower page; ascending.

The least score that is taken is found by bisection on the scores' bits. Then scores are looked at as 64 × 64 pages, and
ranks are counted by products with triangular matrices of ones: exact, as sums of up to 4096 ones are.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.common import TILED, WGMMA, Refs, along_columns, along_rows, full, iota, load, store

SIDE = 64
CHUNK = SIDE * SIDE
_SQUARE = (SIDE, SIDE)
# A chunk is counted in slices, whose counts are added before lanes and warps are.
_SLICE = 1024
_LOWEST, _HIGHEST = -(2**31), 2**31 - 1
_ALL = 2**30
# Four elements a thread, all lanes along one dimension: integers are then summed by one instruction a warp.
_FLAT = plgpu.Layout.TILED(
    plgpu.Tiling(((512,), (128,), (4,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)  # fmt: skip


def select_scratch(dtype: Any = jnp.bfloat16) -> dict[str, Any]:
    """Shared memory of `Selector`."""
    square = plgpu.SMEM(_SQUARE, dtype, transforms=TILED)
    return {
        "upper": square, "lower": square, "taken": square, "ranks": square, "which": square,
        "row_ranks": plgpu.SMEM((2, SIDE), jnp.float32),
    }  # fmt: skip


def _multiply(a: Any, b: Any) -> jax.Array:
    def run(acc: Any) -> jax.Array:
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef(_SQUARE, jnp.float32))


def _ordered(scores: jax.Array) -> jax.Array:
    """Integers in the order of scores; −0 and 0 tie."""
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0.0, 0.0, scores), jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _value(key: jax.Array) -> jax.Array:
    """The score that `_ordered` made a key of."""
    return jax.lax.bitcast_convert_type(jnp.where(key < 0, key ^ 0x7FFFFFFF, key), jnp.float32)


def _sum(counts: jax.Array) -> jax.Array:
    for axis in range(counts.ndim - 1, -1, -1):
        counts = jnp.sum(counts, axis=axis)
    return counts


def _middle(low: jax.Array, high: jax.Array) -> jax.Array:
    """Between two integers, rounded down, without overflow."""
    return (low & high) + ((low ^ high) >> 1)


def hand_on(refs: Refs, row: jax.Array, head: jax.Array) -> None:
    """Copy what a head inherited."""
    refs.new_counts[row, head] = refs.old_counts[row, head]
    for tile in range(refs.new_pages.shape[2] // SIDE):
        place = pl.ds(tile * SIDE, SIDE)
        pages = load(refs.old_pages.at[row, head, place], WGMMA.reduce(1))
        store(refs.new_pages.at[row, head, place], pages)


def make_triangles(refs: Refs) -> None:
    """Matrices of ones on and above the diagonal, and below it; depends on nothing."""
    one = full(_SQUARE, 1.0, WGMMA)
    store(refs.upper, jnp.where(iota(_SQUARE, 0) <= iota(_SQUARE, 1), one, 0.0).astype(refs.upper.dtype))
    store(refs.lower, jnp.where(iota(_SQUARE, 0) > iota(_SQUARE, 1), one, 0.0).astype(refs.lower.dtype))


class Selector:
    """Selects for one head of one row; one warpgroup. `budget_pages=None`: `limits` say how many."""

    def __init__(
        self, refs: Refs, *, chunks: int, page_size: int, sink_pages: int, recent_pages: int, budget_pages: int | None
    ):
        self.refs, self.chunks, self.page_size, self.budget_pages = refs, chunks, page_size, budget_pages
        self.sink_pages, self.recent_pages = sink_pages, recent_pages

    def run(self, row: jax.Array, index: jax.Array, head: jax.Array) -> None:
        """Write pages and count of dense head `index`, which is KV head `head`."""
        refs = self.refs
        self.scores, self.flat_scores = refs.scores.at[row, index], refs.flat_scores.at[row, index]
        self.used = (refs.lengths[row] + self.page_size - 1) // self.page_size
        limit = refs.limits[row, index] if self.budget_pages is None else jnp.minimum(self.used, self.budget_pages)
        if self.chunks == 1:
            self.held, self.held_flat = self.square_keys(0), self.flat_keys(0)
        sink = jnp.minimum(self.used, self.sink_pages)
        forced = sink + jnp.minimum(self.used - sink, self.recent_pages)
        need = limit - forced
        least, exact = self.find_least(need, self.used - forced)
        ties = jax.lax.cond(exact, lambda: jnp.int32(_ALL), lambda: need - self.count_from(least + 1))
        self.write(row, head, least, exact, ties)
        refs.new_counts[row, head] = limit

    def free(self, page: jax.Array) -> jax.Array:
        """Which pages compete: those that exist and are not forced."""
        return (page < self.used - self.recent_pages) & (page >= self.sink_pages)

    def flat_keys(self, chunk: Any) -> list[jax.Array]:
        """Integers in the order of a chunk's scores, the least one where a page does not compete."""
        keys = []
        for first in range(0, CHUNK, _SLICE):
            place = chunk * CHUNK + first
            page = place + plgpu.broadcasted_iota(jnp.int32, (_SLICE,), 0, layout=_FLAT)
            key = _ordered(load(self.flat_scores.at[pl.ds(place, _SLICE)], _FLAT))
            keys.append(jnp.where(self.free(page), key, _LOWEST))
        return keys

    def square_keys(self, chunk: Any) -> tuple[jax.Array, jax.Array]:
        """The same as rows of 64, and the pages' numbers."""
        page = chunk * CHUNK + iota(_SQUARE, 0) * SIDE + iota(_SQUARE, 1)
        key = _ordered(load(self.scores.at[pl.ds(chunk * SIDE, SIDE)], WGMMA))
        return jnp.where(self.free(page), key, _LOWEST), page

    def over_chunks(self, fold: Any, start: jax.Array) -> jax.Array:
        """Fold `fold(flat keys, state)` over all chunks that hold pages of this row."""
        if self.chunks == 1:
            return fold(self.held_flat, start)
        count = (self.used + CHUNK - 1) // CHUNK
        return jax.lax.fori_loop(0, count, lambda c, state: fold(self.flat_keys(c), state), start)

    def count_from(self, least: jax.Array) -> jax.Array:
        """How many competing pages have at least this key."""

        def fold(keys: list[jax.Array], count: jax.Array) -> jax.Array:
            flags = [jnp.where(key >= least, 1, 0) for key in keys]
            return count + _sum((flags[0] + flags[1]) + (flags[2] + flags[3]))

        return self.over_chunks(fold, jnp.int32(0))

    def find_least(self, need: jax.Array, competing: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The highest key with at least `need` competing keys from it on, and whether they are just as many.

        Ends as soon as exactly `need` are found.
        """

        def highest(keys: list[jax.Array], best: jax.Array) -> jax.Array:
            key = jnp.maximum(jnp.maximum(keys[0], keys[1]), jnp.maximum(keys[2], keys[3]))
            return jnp.maximum(best, jnp.max(key, axis=0))

        def lowest(keys: list[jax.Array], best: jax.Array) -> jax.Array:
            # The array comes first: JAX takes a choice between a constant and an array for unsigned.
            keys = [jnp.where(key != _LOWEST, key, _HIGHEST) for key in keys]
            key = jnp.minimum(jnp.minimum(keys[0], keys[1]), jnp.minimum(keys[2], keys[3]))
            return jnp.minimum(best, jnp.min(key, axis=0))

        # Invariant: from `low` on there are enough, from `high` on too few.
        low = self.over_chunks(lowest, jnp.int32(_HIGHEST - 1))
        high = jnp.maximum(jnp.minimum(self.over_chunks(highest, jnp.int32(_LOWEST)), _HIGHEST - 1) + 1, low)

        def more(state: Any) -> jax.Array:
            low, high, taken, _ = state
            return (_middle(low, high) > low) & (taken != need)

        def halve(state: Any) -> Any:
            low, high, taken, by_value = state
            # Every other time between the values, not between their bits: the exponent is found sooner.
            between = _ordered(0.5 * _value(low) + 0.5 * _value(high))
            at = jnp.where(by_value & (between > low) & (between < high), between, _middle(low, high))
            count = self.count_from(at)
            enough = count >= need
            low, high = jnp.where(enough, at, low), jnp.where(enough, high, at)
            return low, high, jnp.where(enough, count, taken), ~by_value

        # Nothing needed: the loop would look for a key that no page has.
        high = jnp.where(need > 0, high, low)
        low, _, taken, _ = jax.lax.while_loop(more, halve, (low, high, competing, jnp.bool_(True)))
        return jnp.where(need > 0, low, jnp.int32(_HIGHEST)), (taken == need) | (need <= 0)

    def rank(self) -> tuple[jax.Array, jax.Array]:
        """Ranks of the flags in `taken`, from 1, within their row, and how many the rows before hold."""
        refs = self.refs
        plgpu.commit_smem()
        within = _multiply(refs.taken, refs.upper)
        before = jnp.sum(_multiply(refs.lower, refs.taken), axis=1)
        # Nobody writes new flags before all have read these.
        plgpu.commit_smem()
        return within, before

    def flag(self, flags: jax.Array) -> None:
        """Put flags where `rank` finds them."""
        store(self.refs.taken, jnp.where(flags, full(_SQUARE, 1.0, WGMMA), 0.0).astype(self.refs.taken.dtype))

    def write(self, row: jax.Array, head: jax.Array, least: jax.Array, exact: jax.Array, ties: jax.Array) -> None:
        """Take what lies above `least`, of equals to it the first `ties` ones, and what is forced."""
        refs = self.refs
        tiles = refs.new_pages.shape[2] // SIDE

        def each(chunk: Any, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            done, ties = state
            keys, page = self.held if self.chunks == 1 else self.square_keys(chunk)
            forced = ((page < self.sink_pages) | (page >= self.used - self.recent_pages)) & (page < self.used)

            def all_equals() -> jax.Array:
                self.flag((keys >= least) | forced)
                return ties

            def first_equals() -> jax.Array:
                equal = keys == least
                self.flag(equal)
                within, before = self.rank()
                rank = (within + along_columns(before, _SQUARE)).astype(jnp.int32)
                self.flag((keys > least) | forced | (equal & (rank <= ties)))
                return jnp.maximum(ties - _sum(jnp.where(equal, 1, 0)), 0)

            ties = jax.lax.cond(exact, all_equals, first_equals)
            within, before = self.rank()
            store(refs.ranks, within.astype(refs.ranks.dtype))
            in_row = jnp.max(within, axis=1)
            store(refs.row_ranks.at[0], before)
            store(refs.row_ranks.at[1], in_row)
            plgpu.commit_smem()
            row_first = load(refs.row_ranks.at[0], WGMMA.reduce(0)).astype(jnp.int32)
            row_count = load(refs.row_ranks.at[1], WGMMA.reduce(0)).astype(jnp.int32)
            found = jnp.sum(in_row, axis=0).astype(jnp.int32)
            for tile in range(tiles):
                self.write_tile(row, head, chunk, tile, done, found, row_first, row_count)
            return done + found, ties

        start = (jnp.int32(0), ties)
        if self.chunks == 1:
            each(0, start)
        else:
            empty = full((SIDE,), -1, WGMMA.reduce(1), jnp.int32)
            for tile in range(tiles):
                store(refs.new_pages.at[row, head, pl.ds(tile * SIDE, SIDE)], empty)
            jax.lax.fori_loop(0, (self.used + CHUNK - 1) // CHUNK, each, start)

    def write_tile(
        self, row: jax.Array, head: jax.Array, chunk: Any, tile: int, done: jax.Array, found: jax.Array,
        row_first: jax.Array, row_count: jax.Array,
    ) -> None:  # fmt: skip
        """Write the pages of this chunk that are numbers `64 · tile …` of the selection.

        Number m lies in the row of the chunk with `first ≤ m < first + count`: a row of a one-hot matrix. Its product
        with the ranks brings that row's ranks, of which those up to m's own are counted.
        """
        refs = self.refs
        wanted = iota(_SQUARE, 0) + (tile * SIDE - done)
        first, count = along_rows(row_first, _SQUARE), along_rows(row_count, _SQUARE)
        here = (wanted >= first) & (wanted < first + count)
        store(refs.which, jnp.where(here, full(_SQUARE, 1.0, WGMMA), 0.0).astype(refs.which.dtype))
        plgpu.commit_smem()
        ranks = _multiply(refs.which, refs.ranks).astype(jnp.int32)
        of_row = jnp.sum(jnp.where(here, iota(_SQUARE, 1), 0), axis=1)
        local = jnp.sum(jnp.where(here, wanted - first, 0), axis=1)
        column = jnp.sum(jnp.where(ranks <= along_columns(local, _SQUARE), 1, 0), axis=1)
        page = chunk * CHUNK + of_row * SIDE + column
        target = refs.new_pages.at[row, head, pl.ds(tile * SIDE, SIDE)]
        number = jnp.max(wanted, axis=1)
        old = jnp.full_like(page, -1) if self.chunks == 1 else load(target, WGMMA.reduce(1))
        store(target, jnp.where((number >= 0) & (number < found), page, old))
        plgpu.commit_smem()
