"""Exact top pages of one head: forced pages, then the highest scores, ties to the lower page; ascending.

The least score that is taken is found by dividing the range of scores, and in the end that of their bits. Then scores
are looked at as 64 rows of up to 64 pages, and ranks are counted by products with triangular matrices of ones: exact,
as sums of up to 4096 ones are.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.common import (
    WGMMA,
    Refs,
    along_columns,
    along_rows,
    full,
    iota,
    load,
    quotient_up,
    store,
)

SIDE = 64
_SQUARE = (SIDE, SIDE)
# A chunk is counted in slices, whose counts are added before lanes and warps are.
_SLICE = 1024
_LARGEST_CHUNK = SIDE * SIDE
_LOWEST, _HIGHEST = -(2**31), 2**31 - 1
# Four elements a thread, all lanes along one dimension: integers are then summed by one instruction a warp.
_FLAT = plgpu.Layout.TILED(
    plgpu.Tiling(((512,), (128,), (4,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)  # fmt: skip


def chunking(capacity: int) -> tuple[int, int]:
    """How many chunks `capacity` pages are looked at in, and the columns of a chunk's 64 rows.

    A column less is 64 pages less to load, to count and to rank: no more than to the next 1024 pages is rounded up.
    """
    chunks = max(1, -(-capacity // _LARGEST_CHUNK))
    return chunks, max(1, -(-capacity // (chunks * _SLICE))) * (_SLICE // SIDE)


def select_scratch(columns: int, dtype: Any = jnp.bfloat16) -> dict[str, Any]:
    """Shared memory of `Selector`, for chunks of that many columns."""
    # The two sides of a product must be swizzled alike, in tiles that fit both.
    width = next(width for width in (64, 32, 16) if columns % width == 0)
    tiled = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width))  # pyright: ignore[reportAbstractUsage]
    square, chunk = (plgpu.SMEM((SIDE, n), dtype, transforms=tiled) for n in (SIDE, columns))
    return {
        "upper": chunk, "lower": square, "taken": chunk, "ranks": chunk, "which": square,
        "row_ranks": plgpu.SMEM((2, SIDE), jnp.float32),
    }  # fmt: skip


def _multiply(*pairs: tuple[Any, Any]) -> tuple[jax.Array, ...]:
    """Products of pairs of matrices in shared memory, all on their way before the first is waited for."""

    def run(*accs: Any) -> tuple[jax.Array, ...]:
        for acc, (a, b) in zip(accs, pairs, strict=True):
            plgpu.wgmma(acc, a, b)
        return tuple(acc[...] for acc in accs)

    return pl.run_scoped(run, *(plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32) for a, b in pairs))


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
    for ref, above in ((refs.upper, True), (refs.lower, False)):
        row, column, one = iota(ref.shape, 0), iota(ref.shape, 1), full(ref.shape, 1.0, WGMMA)
        store(ref, jnp.where((row <= column) == above, one, 0.0).astype(ref.dtype))


class Selector:
    """Selects for one head of one row; one warpgroup. `budget_pages=None`: `limits` say how many."""

    def __init__(
        self, refs: Refs, *, chunks: int, page_size: int, sink_pages: int, recent_pages: int, budget_pages: int | None
    ):
        self.refs, self.chunks, self.page_size, self.budget_pages = refs, chunks, page_size, budget_pages
        self.sink_pages, self.recent_pages = sink_pages, recent_pages
        self.shape = refs.taken.shape
        self.columns = self.shape[1]
        self.chunk = SIDE * self.columns

    def run(self, row: jax.Array, index: jax.Array, head: jax.Array) -> None:
        """Write pages and count of dense head `index`, which is KV head `head`."""
        refs = self.refs
        self.scores, self.flat_scores = refs.scores.at[row, index], refs.flat_scores.at[row, index]
        self.used = quotient_up(refs.lengths[row], self.page_size)
        limit = refs.limits[row, index] if self.budget_pages is None else jnp.minimum(self.used, self.budget_pages)
        if self.chunks == 1:
            self.held, self.held_flat = self.square_keys(0), self.flat_keys(0)
        sink = jnp.minimum(self.used, self.sink_pages)
        forced = sink + jnp.minimum(self.used - sink, self.recent_pages)
        need = limit - forced
        least, exact, above = self.find_least(need, self.used - forced)
        self.write(row, head, limit, least, exact, need - above)
        refs.new_counts[row, head] = limit

    def free(self, page: jax.Array) -> jax.Array:
        """Which pages compete: those that exist and are not forced."""
        return (page < self.used - self.recent_pages) & (page >= self.sink_pages)

    def flat_keys(self, chunk: Any) -> list[jax.Array]:
        """Integers in the order of a chunk's scores, the least one where a page does not compete."""
        keys = []
        for first in range(0, self.chunk, _SLICE):
            place = chunk * self.chunk + first
            page = place + plgpu.broadcasted_iota(jnp.int32, (_SLICE,), 0, layout=_FLAT)
            key = _ordered(load(self.flat_scores.at[pl.ds(place, _SLICE)], _FLAT))
            keys.append(jnp.where(self.free(page), key, _LOWEST))
        return keys

    def square_keys(self, chunk: Any) -> tuple[jax.Array, jax.Array]:
        """The same as 64 rows, and the pages' numbers."""
        page = chunk * self.chunk + iota(self.shape, 0) * self.columns + iota(self.shape, 1)
        key = _ordered(load(self.scores.at[pl.ds(chunk * SIDE, SIDE)], WGMMA))
        return jnp.where(self.free(page), key, _LOWEST), page

    def over_chunks(self, fold: Any, start: Any) -> Any:
        """Fold `fold(flat keys, state)` over all chunks that hold pages of this row."""
        if self.chunks == 1:
            return fold(self.held_flat, start)
        count = quotient_up(self.used, self.chunk)
        return jax.lax.fori_loop(0, count, lambda c, state: fold(self.flat_keys(c), state), start)

    def count_from(self, keys: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """How many competing pages have at least each of two keys."""

        def fold(held: list[jax.Array], counts: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            # Both in one sum, as sums wait for all warps; neither exceeds the pages of a chunk.
            flags = [jnp.where(key >= keys[0], 1, 0) + jnp.where(key >= keys[1], 1 << 16, 0) for key in held]
            both = jnp.sum(functools.reduce(jnp.add, flags), axis=0)
            return counts[0] + (both & 0xFFFF), counts[1] + (both >> 16)

        return self.over_chunks(fold, (jnp.int32(0), jnp.int32(0)))

    def find_least(self, need: jax.Array, competing: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The highest key with at least `need` competing keys from it on, whether they are just as many, and how many
        lie above it if they are more.

        Ends as soon as exactly `need` are found.
        """

        def highest(keys: list[jax.Array], best: jax.Array) -> jax.Array:
            return jnp.maximum(best, jnp.max(functools.reduce(jnp.maximum, keys), axis=0))

        def lowest(keys: list[jax.Array], best: jax.Array) -> jax.Array:
            # The complement turns the order round: a warp has one instruction for the highest, but not for the lowest.
            # The array comes first: JAX takes a choice between a constant and an array for unsigned.
            return ~highest([jnp.where(key != _LOWEST, ~key, _LOWEST) for key in keys], ~best)

        # Invariant: from `low` on there are enough (`taken`), from `high` on too few (`above`).
        low = self.over_chunks(lowest, jnp.int32(_HIGHEST - 1))
        high = jnp.maximum(jnp.minimum(self.over_chunks(highest, jnp.int32(_LOWEST)), _HIGHEST - 1) + 1, low)

        def more(state: Any) -> jax.Array:
            low, high, taken, _, _ = state
            return (_middle(low, high) > low) & (taken != need)

        def narrow(state: Any) -> Any:
            low, high, taken, above, by_value = state
            # Two keys a round leave a third. Every other time they lie between the values, not between their bits: the
            # exponent is found sooner.
            third = jax.lax.div((high >> 1) - (low >> 1), jnp.int32(3)) * 2
            values = _value(low), _value(high)

            def between(weight: float, bits: jax.Array) -> jax.Array:
                key = _ordered((1.0 - weight) * values[0] + weight * values[1])
                return jnp.where(by_value & (key > low) & (key < high), key, bits)

            ats = (
                between(1 / 3, jnp.maximum(low + third, low + 1)),
                between(2 / 3, jnp.minimum(high - third, high - 1)),
            )
            lows, highs, takens, aboves = [], [], [], []
            for at, count in zip(ats, self.count_from(ats), strict=True):
                enough = count >= need
                lows.append(jnp.where(enough, at, low))
                highs.append(jnp.where(enough, high, at))
                takens.append(jnp.where(enough, count, taken))
                aboves.append(jnp.where(enough, above, count))
            return jnp.maximum(*lows), jnp.minimum(*highs), jnp.minimum(*takens), jnp.maximum(*aboves), ~by_value

        # Nothing needed: the loop would look for a key that no page has.
        high = jnp.where(need > 0, high, low)
        start = low, high, competing, jnp.int32(0), jnp.bool_(True)
        low, _, taken, above, _ = jax.lax.while_loop(more, narrow, start)
        return jnp.where(need > 0, low, jnp.int32(_HIGHEST)), (taken == need) | (need <= 0), above

    def rank(self) -> tuple[jax.Array, jax.Array]:
        """Ranks of the flags in `taken`, from 1, within their row, and how many the rows before hold."""
        refs = self.refs
        plgpu.commit_smem()
        within, before = _multiply((refs.taken, refs.upper.at[pl.ds(0, self.columns)]), (refs.lower, refs.taken))
        return within, jnp.sum(before, axis=1)

    def flag(self, flags: jax.Array) -> None:
        """Put flags where `rank` finds them."""
        store(self.refs.taken, jnp.where(flags, full(self.shape, 1.0, WGMMA), 0.0).astype(self.refs.taken.dtype))

    def write(
        self, row: jax.Array, head: jax.Array, limit: jax.Array, least: jax.Array, exact: jax.Array, ties: jax.Array
    ) -> None:
        """Take what lies above `least`, of equals to it all (`exact`) or the first `ties` ones, and what is forced."""
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
                rank = (within + along_columns(before, self.shape)).astype(jnp.int32)
                # Nobody writes new flags before all have read these.
                plgpu.commit_smem()
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
            # The only chunk holds all that is taken.
            found = limit if self.chunks == 1 else jnp.sum(in_row, axis=0).astype(jnp.int32)
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
            jax.lax.fori_loop(0, quotient_up(self.used, self.chunk), each, start)

    def write_tile(
        self, row: jax.Array, head: jax.Array, chunk: Any, tile: int, done: jax.Array, found: jax.Array,
        row_first: jax.Array, row_count: jax.Array,
    ) -> None:  # fmt: skip
        """Write the pages of this chunk that are numbers `64 · tile …` of the selection.

        Number m lies in the row of the chunk with `first ≤ m < first + count`: a row of a one-hot matrix. Its product
        with the ranks brings that row's ranks, of which those up to m's own are counted.
        """
        refs = self.refs
        if tile:  # nobody writes new numbers before all have found the last ones
            plgpu.commit_smem()
        wanted = iota(_SQUARE, 0) + (tile * SIDE - done)
        first, count = along_rows(row_first, _SQUARE), along_rows(row_count, _SQUARE)
        here = (wanted >= first) & (wanted < first + count)
        store(refs.which, jnp.where(here, full(_SQUARE, 1.0, WGMMA), 0.0).astype(refs.which.dtype))
        plgpu.commit_smem()
        (ranks,) = _multiply((refs.which, refs.ranks))
        ranks = ranks.astype(jnp.int32)
        of_row = jnp.sum(jnp.where(here, iota(_SQUARE, 1), 0), axis=1)
        local = jnp.sum(jnp.where(here, wanted - first, 0), axis=1)
        column = jnp.sum(jnp.where(ranks <= along_columns(local, self.shape), 1, 0), axis=1)
        page = chunk * self.chunk + of_row * self.columns + column
        target = refs.new_pages.at[row, head, pl.ds(tile * SIDE, SIDE)]
        number = jnp.max(wanted, axis=1)
        old = jnp.full_like(page, -1) if self.chunks == 1 else load(target, WGMMA.reduce(1))
        store(target, jnp.where((number >= 0) & (number < found), page, old))
