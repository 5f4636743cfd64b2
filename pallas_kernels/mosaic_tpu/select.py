"""`select_pages` on TPU: the exact k-th largest score by bisection of its bits, places by prefix counts, no sort.

Eight rows (a row of a batch and a head) share the sublanes of one program; their pages lie along the lanes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu import chip
from pallas_kernels.mosaic_tpu.chip import LANES, SUBLANES
from pallas_kernels.mosaic_tpu.config import TpuConfig
from pallas_kernels.types import SelectionSpec
from pallas_kernels.xla.decode import forced_pages, page_limits

_LOWEST, _HIGHEST = np.iinfo(np.int32).min, np.iinfo(np.int32).max


def _kernel(spec: SelectionSpec, config: TpuConfig, scores: Any, limits: Any, used: Any, pages: Any, keys: Any) -> None:
    chunks, _, chunk = keys.shape
    bits_a_round = config.select_bits
    limit, end = limits[:, :1], used[:, :1]
    lane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, chunk), 1)

    def order(index, carry):
        """Scores as integers of the same order; forced pages above all, pages past the end below all."""
        score = scores[:, pl.ds(pl.multiple_of(index * chunk, chunk), chunk)]
        bits = jax.lax.bitcast_convert_type(jnp.where(score == 0.0, 0.0, score), jnp.int32)  # −0.0 ties with 0.0
        key = jnp.where(bits < 0, bits ^ _HIGHEST, bits)
        page = index * chunk + lane
        key = jnp.where((page < spec.sink_pages) | (page >= end - spec.recent_pages), _HIGHEST, key)
        keys[index] = jnp.where(page < end, key, _LOWEST)
        return carry

    _each(chunks, order, 0)

    def count(candidates):
        """For every candidate, how many keys of each row reach it: `[8, 1]` float32."""

        def add(index, sums):
            key = keys[index]
            return tuple(s + _tile_sum(jnp.where(key >= c, 1.0, 0.0)) for s, c in zip(sums, candidates, strict=True))

        zeros = tuple(jnp.zeros((SUBLANES, LANES), jnp.float32) for _ in candidates)
        return [jnp.sum(s, axis=1, keepdims=True) for s in _each(chunks, add, zeros)]

    wanted = limit.astype(jnp.float32)

    def narrow(turn, threshold):
        unit = jnp.left_shift(jnp.int32(1), 32 - bits_a_round * (1 + turn))
        candidates = [threshold + digit * unit for digit in range(1, 1 << bits_a_round)]
        enough = [reached >= wanted for reached in count(candidates)]
        for candidate, reached in zip(candidates, enough, strict=True):  # monotone: the last one that is reached stays
            threshold = jnp.where(reached, candidate, threshold)
        return threshold

    # Counted up from the lowest integer, wrapping round: the order of unsigned numbers.
    threshold = jax.lax.fori_loop(0, 32 // bits_a_round, narrow, jnp.full((SUBLANES, 1), _LOWEST, jnp.int32))
    (above,) = count([threshold + 1])
    # No key is above the highest integer; adding one to it wrapped.
    above = jnp.where(threshold == _HIGHEST, 0.0, above)
    ties = wanted - above

    # How many pages up to each are chosen. A product with a triangle counts inside a tile, one with ones the tile.
    row = jax.lax.broadcasted_iota(jnp.int32, (LANES, 2 * LANES), 0)
    column = jax.lax.broadcasted_iota(jnp.int32, (LANES, 2 * LANES), 1)
    triangle = jnp.where((column >= LANES) | (row <= column), 1.0, 0.0).astype(jnp.bfloat16)

    def rank(index, before):
        key = keys[index]
        over, level = (key > threshold).astype(jnp.float32), (key == threshold).astype(jnp.float32)
        tiles = []
        for first in range(0, chunk, LANES):
            tiles += [over[:, first : first + LANES], level[:, first : first + LANES]]
        both = jnp.concatenate(tiles, axis=0).astype(jnp.bfloat16)
        counts = jax.lax.dot_general(
            both, triangle, (((1,), (0,)), ((), ())), precision=jax.lax.Precision.DEFAULT,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        over_before, level_before = before
        ranks = []
        for tile in range(chunk // LANES):
            first = 2 * tile * SUBLANES
            of_over, of_level = counts[first : first + SUBLANES], counts[first + SUBLANES : first + 2 * SUBLANES]
            inside = over_before + of_over[:, :LANES]
            ranks.append(inside + jnp.minimum(level_before + of_level[:, :LANES], ties))
            over_before, level_before = over_before + of_over[:, LANES:], level_before + of_level[:, LANES:]
        keys[index] = jax.lax.bitcast_convert_type(jnp.concatenate(ranks, axis=1), jnp.int32)
        return over_before, level_before

    zero = jnp.zeros((SUBLANES, LANES), jnp.float32)
    _each(chunks, rank, (zero, zero))

    # The page at a place is the number of pages whose rank has not passed it.
    line = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
    places = min(config.select_places, pages.shape[1])

    def place(group, filled):
        first = jax.lax.rem(group * places, LANES)

        def add(index, sums):
            ranks = jax.lax.bitcast_convert_type(keys[index], jnp.float32)
            start = (group * places).astype(jnp.float32)
            return tuple(s + _tile_sum(jnp.where(ranks <= start + i, 1.0, 0.0)) for i, s in enumerate(sums))

        sums = _each(chunks, add, tuple(zero for _ in range(places)))
        filled = jnp.where(first == 0, -1, filled)
        for i, s in enumerate(sums):
            page = jnp.sum(s, axis=1, keepdims=True).astype(jnp.int32)
            real = (line == first + i) & (group * places + i < limit)
            filled = jnp.where(real, page, filled)
        lanes = pl.multiple_of(group * places // LANES * LANES, LANES)
        pages[:, pl.ds(lanes, LANES)] = filled
        return filled

    jax.lax.fori_loop(0, -(-spec.budget_pages // places), place, jnp.full((SUBLANES, LANES), -1, jnp.int32))


def trips(budget_pages: int, config: TpuConfig = TpuConfig()) -> list[int]:
    """How often the kernel's loops run, in their order, where the pages are one chunk."""
    return [32 // config.select_bits, -(-budget_pages // config.select_places)]


def _tile_sum(values):
    """Sum `[8, n · 128]` over its tiles, pairwise, so that the additions do not wait for each other."""
    parts = [values[:, first : first + LANES] for first in range(0, values.shape[1], LANES)]
    while len(parts) > 1:
        parts = [sum(parts[i : i + 2][1:], parts[i]) for i in range(0, len(parts), 2)]
    return parts[0]


def _each(chunks: int, step: Any, carry: Any) -> Any:
    """Run `step` on every chunk; without a loop where there is only one."""
    return step(0, carry) if chunks == 1 else jax.lax.fori_loop(0, chunks, step, carry)


def select_pages(
    page_scores: jax.Array,
    lengths: jax.Array,
    spec: SelectionSpec,
    *,
    page_size: int,
    config: TpuConfig = TpuConfig(),
) -> tuple[jax.Array, jax.Array]:
    """See `xla.decode.select_pages`."""
    chip.cores()  # refuse where there is no TPU
    batch, heads, capacity = page_scores.shape
    used = ((lengths + page_size - 1) // page_size).astype(jnp.int32)
    if spec.rule == "budget":
        limits = jnp.broadcast_to(jnp.minimum(spec.budget_pages, used)[:, None], (batch, heads))
    else:
        limits = page_limits(page_scores, used, forced_pages(used, capacity, spec), spec)
    return _launch(page_scores, limits, used, spec, config), limits


@functools.partial(jax.jit, static_argnums=(3, 4))  # layers share one trace
def _launch(
    page_scores: jax.Array, limits: jax.Array, used: jax.Array, spec: SelectionSpec, config: TpuConfig
) -> jax.Array:
    batch, heads, capacity = page_scores.shape
    rows = batch * heads
    padding = -rows % SUBLANES
    chunk = min(config.select_chunk, -(-capacity // LANES) * LANES)
    chunks = -(-capacity // chunk)
    scores = jnp.pad(page_scores.reshape(rows, capacity), ((0, padding), (0, chunks * chunk - capacity)))

    def column(values):
        values = jnp.pad(values.reshape(rows), (0, padding))
        return jnp.broadcast_to(values[:, None], (rows + padding, LANES))

    width = -(-spec.budget_pages // LANES) * LANES
    pages = pl.pallas_call(
        lambda *refs: _kernel(spec, config, *refs),
        grid=((rows + padding) // SUBLANES,),
        in_specs=[
            pl.BlockSpec((SUBLANES, chunks * chunk), lambda i: (i, 0)),
            pl.BlockSpec((SUBLANES, LANES), lambda i: (i, 0)),
            pl.BlockSpec((SUBLANES, LANES), lambda i: (i, 0)),
        ],
        out_specs=pl.BlockSpec((SUBLANES, width), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((rows + padding, width), jnp.int32),
        scratch_shapes=[pltpu.VMEM((chunks, SUBLANES, chunk), jnp.int32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            disable_bounds_checks=True,
            vmem_limit_bytes=(3 * chunks * chunk + 2 * width) * SUBLANES * 4 + (8 << 20),
        ),
        interpret=chip.interpreter(),
        name="select_pages",
    )(scores, column(limits), column(jnp.broadcast_to(used[:, None], (batch, heads))))
    return pages[:rows, : spec.budget_pages].reshape(batch, heads, spec.budget_pages)
