"""The one attention kernel under `dense_decode` and `sparse_decode`: a query over a list of pages, streamed by hand.

An *item* is one KV head of one row with its list of pages. Items are read in *steps* of a fixed number of tokens; the
pages of the next step are on their way to one of two buffers while a step is computed from the other, across the
borders of items and of rows. A step is cut into *streams* that keep softmax states of their own, so that the compiler
can overlap one's chain of multiply, maximum, exponential and multiply with another's; they are merged by log-sum-exp
when the item ends.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu import chip
from pallas_kernels.types import Heads, PageScore
from pallas_kernels.xla.decode import MASKED

_LANES = 128
_SUBLANES = 8
# Tokens of a stream in a step, at most, and streams: the schedules of v5e, v5p and v6e are shortest with these.
_STREAM_TOKENS = 1024
_STREAMS = 4
# Pages of a stream in a step, at most: every one of them is a copy to start, in code of its own.
_STREAM_PAGES = 32
# Pages that a loop starts at once, where nothing else is there to do meanwhile.
GROUP = 8
# Scalar memory is 1 MiB; the compiler wants some of it.
_SMEM_BYTES = 960 * 1024


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one call."""

    batch: int
    kv_heads: int
    heads: int
    groups: int
    page_size: int
    head_dim: int
    capacity: int  # pages that an item's list can have
    sparse: bool
    cores: int
    scale: float = 1.0
    scores: PageScore | None = None
    exact: bool = False  # float32 products
    ahead: bool = False  # a row's last step fetches the first of the next row, whose pages are known then

    @property
    def parts(self) -> int:
        """2 where the cores share every head's context, 1 where they share the heads."""
        return self.cores if self.heads % self.cores and not self.sparse else 1

    @property
    def items(self) -> int:
        """Heads that one core computes for every row."""
        return self.heads if self.parts > 1 else -(-self.heads // self.cores)

    @property
    def queries(self) -> int:
        """Query rows of a KV head, padded to whole sublanes."""
        return -(-self.groups // _SUBLANES) * _SUBLANES

    @property
    def width(self) -> int:
        """Lanes of a query. With head_dim 64 keys and values share a tile, and both are multiplied whole."""
        return max(_LANES, self.head_dim)

    @property
    def stream_tokens(self) -> int:
        """Tokens of one stream in one step: a power of two of lanes, no more than the longest list needs."""
        tokens, most = _LANES, min(_STREAM_TOKENS, _STREAM_PAGES * self.page_size)
        while tokens < most and tokens * _STREAMS < self.capacity * self.page_size:
            tokens *= 2
        return tokens

    @property
    def stream_pages(self) -> int:
        """Pages of one stream in one step."""
        return self.stream_tokens // self.page_size

    @property
    def step_pages(self) -> int:
        """Pages of one step."""
        return _STREAMS * self.stream_pages

    @property
    def score_rows(self) -> int:
        """Rows of 128 page scores, whole steps."""
        steps = -(-self.capacity // self.step_pages)
        return -(-steps * self.step_pages // _LANES)


class _Row:
    """The items of one row as the kernel sees them: how many tokens each has, and where its pages are in the pool."""

    def __init__(self, plan: Plan, core: Any, row: Any, heads: Any, limits: Any, table: Any, chosen: Any):
        self.plan, self.core, self.row = plan, core, row
        self._heads, self._limits, self._table, self._chosen = heads, limits, table, chosen

    def head(self, item):
        """The KV head of an item; past the last one it is repeated."""
        first = 0 if self.plan.parts > 1 else self.core * self.plan.items
        return self._heads[jnp.minimum(first + item, self.plan.heads - 1)]

    def first_step(self):
        """The step of the whole context at which this core's part begins."""
        if self.plan.parts == 1:
            return 0
        return self.core * self._half()

    def _half(self):
        return pl.cdiv(pl.cdiv(self._limits[self.row], self.plan.step_pages * self.plan.page_size), 2)

    def tokens(self, item):
        """Tokens that an item attends to."""
        if self.plan.sparse:
            return self._limits[self.row, self.head(item)]
        length = self._limits[self.row]
        if self.plan.parts == 1:
            return length
        cut = jnp.minimum(self._half() * (self.plan.step_pages * self.plan.page_size), length)
        return jnp.where(self.core == 0, cut, length - cut)

    def pages(self, item):
        """Pages that hold them."""
        return pl.cdiv(self.tokens(item), self.plan.page_size)

    def steps(self, item):
        """At least one: empty items are written too."""
        return jnp.maximum(pl.cdiv(self.pages(item), self.plan.step_pages), 1)

    def locate(self, item, step):
        """A function from a place in the step to the pool page there."""
        if self.plan.sparse:
            head, first = self.head(item), step * self.plan.step_pages
            return lambda place: self._table[0, 0, self._chosen[0, head, first + place]]
        first = (self.first_step() + step) * self.plan.step_pages
        return lambda place: self._table[0, 0, first + place]


def _kernel(plan: Plan, *refs: Any) -> None:
    refs_in = iter(refs)
    heads, limits, table = (next(refs_in) for _ in range(3))
    next_table = next(refs_in) if plan.ahead else None
    chosen = next(refs_in) if plan.sparse else None
    next_chosen = next(refs_in) if plan.sparse and plan.ahead else None
    q, pool, out = (next(refs_in) for _ in range(3))
    lse = next(refs_in) if plan.parts > 1 else None
    scores = next(refs_in) if plan.scores else None
    *buffers, top, total, mix, parity, arrived = refs_in

    core, row = pl.program_id(0), pl.program_id(1)
    here = _Row(plan, core, row, heads, limits, table, chosen)
    there = _Row(plan, core, jnp.minimum(row + 1, plan.batch - 1), heads, limits, next_table, next_chosen)

    def copy(slot, place, head, page):
        return pltpu.make_async_copy(pool.at[page, head], buffers[slot].at[place], arrived.at[slot])

    def fetch(which: _Row, item, step, slot, count, *, group=plan.step_pages):
        """Start a step of `count` pages, `group` of them in one straight piece of code."""
        locate, head = which.locate(item, step), which.head(item)

        def some(first):
            for place in range(group):

                @pl.when(first + place < count)
                def _(place=first + place):
                    copy(slot, place, head, locate(place)).start()

        if group == plan.step_pages:
            some(0)
        else:
            pl.loop(0, pl.cdiv(jnp.minimum(count, plan.step_pages), group))(lambda i: some(i * group))

    def wait(item, step, slot):
        buffer = buffers[slot]
        count = jnp.minimum(here.pages(item) - step * plan.step_pages, plan.step_pages)

        @pl.when(count == plan.step_pages)
        def _():  # the semaphore counts bytes: one wait for all of them
            pltpu.make_async_copy(buffer, buffer, arrived.at[slot]).wait()

        @pl.when(count < plan.step_pages)
        def _():
            jax.lax.fori_loop(0, count, lambda place, c: (copy(slot, place, 0, 0).wait(), c)[1], 0)

            def clear(place, carry):  # stale values would meet zero weights, and may be NaN
                buffer[place] = jnp.zeros(buffer.shape[1:], buffer.dtype)
                return carry

            jax.lax.fori_loop(count, plan.step_pages, clear, 0)

        tail = here.tokens(item) % plan.page_size

        @pl.when((step + 1 == here.steps(item)) & (tail > 0))
        def _():  # the same holds for slots past the length
            page = buffer[count - 1]
            slots = jax.lax.broadcasted_iota(jnp.int32, page.shape, 0)
            buffer[count - 1] = jnp.where(slots < tail, page, jnp.zeros_like(page))

    def compute(item, step, slot):
        query = q[0, here.head(item)]
        left = here.tokens(item) - step * (plan.step_pages * plan.page_size)
        columns = _attend(plan, query, buffers[slot], left, step == 0, top, total, mix)
        if scores is not None:
            _place_scores(plan, columns, here.first_step() + step, scores.at[0, 0, item])

    def finish(item):
        best = jnp.max(top[...], axis=0)
        weight = jnp.exp2((top[...] - best) * (plan.scale * math.log2(math.e)))
        weight = jnp.where(top[...] > MASKED / 2, weight, 0.0)
        norm = jnp.sum(total[...] * weight, axis=0)
        mixed = jnp.sum(jnp.where(weight > 0.0, mix[...] * weight[..., : plan.width], 0.0), axis=0)
        out[0, 0, item] = mixed / jnp.maximum(norm, 1e-30)
        if lse is not None:
            lse[0, 0, item] = jnp.where(norm > 0.0, best * plan.scale + jnp.log(norm), MASKED)

    @pl.when((row == 0) | (not plan.ahead))
    def _():
        parity[0] = 0
        fetch(here, 0, 0, 0, here.pages(0), group=min(GROUP, plan.step_pages))

    def turn(item, step, slot):
        last = step + 1 == here.steps(item)
        next_item = jnp.where(last, item + 1, item)
        next_step = jnp.where(last, 0, step + 1)
        in_row = next_item < plan.items
        known = jnp.minimum(next_item, plan.items - 1)

        if plan.ahead:

            @pl.when(~in_row & (row + 1 < plan.batch))
            def _():
                fetch(there, 0, 0, 1 - slot, there.pages(0), group=min(GROUP, plan.step_pages))

        wait(item, step, slot)
        # Straight code: its scalar work shares bundles with the vector work below.
        fetch(here, known, next_step, 1 - slot, jnp.where(in_row, here.pages(known) - next_step * plan.step_pages, 0))
        compute(item, step, slot)

        @pl.when(last)
        def _():
            finish(item)

    def body(state: Any) -> Any:
        item, step, slot = state
        for value in range(2):
            pl.when(slot == value)(lambda value=value: turn(item, step, value))
        last = step + 1 == here.steps(item)
        return jnp.where(last, item + 1, item), jnp.where(last, 0, step + 1), 1 - slot

    state: Any = (0, 0, parity[0])
    parity[0] = jax.lax.while_loop(lambda state: state[0] < plan.items, body, state)[2]


def _attend(plan: Plan, query, buffer, left, fresh, top, total, mix) -> list[Any]:
    """Fold a step into the streams' states, all streams at once. Returns columns of page scores, see `_page_scores`."""
    precision = jax.lax.Precision.HIGHEST if plan.exact else jax.lax.Precision.DEFAULT
    # The scale is folded into the exponent: 2^((s − top) · scale · log2 e).
    factor = plan.scale * math.log2(math.e)
    shape = (plan.stream_tokens, plan.width)

    def lanes(stream, first):
        return buffer[pl.ds(stream * plan.stream_pages, plan.stream_pages), :, pl.ds(first, plan.width)].reshape(shape)

    def left_of(stream):
        return left - stream * plan.stream_tokens

    scores = [
        jax.lax.dot_general(
            query, lanes(stream, 0), (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )
        for stream in range(_STREAMS)
    ]
    position = jax.lax.broadcasted_iota(jnp.int32, scores[0].shape, 1)
    masked = [jnp.where(position < left_of(stream), s, MASKED) for stream, s in enumerate(scores)]
    old = [jnp.where(fresh, MASKED, top[stream]) for stream in range(_STREAMS)]
    new = [jnp.maximum(o, jnp.max(s, axis=1, keepdims=True)) for o, s in zip(old, masked, strict=True)]
    columns = [
        column
        for stream in range(_STREAMS)
        for column in ([] if plan.scores is None else _page_scores(plan, scores[stream], left_of(stream)))
    ]
    weights = [jnp.exp2((s - n[:, :1]) * factor) for s, n in zip(masked, new, strict=True)]
    products = [
        jax.lax.dot_general(
            w.astype(buffer.dtype),
            lanes(stream, 2 * plan.head_dim - plan.width),
            (((1,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        for stream, w in enumerate(weights)
    ]
    for stream in range(_STREAMS):
        shrink = jnp.exp2((old[stream] - new[stream]) * factor)
        mass = jnp.sum(weights[stream], axis=1, keepdims=True)
        top[stream] = new[stream]
        total[stream] = jnp.where(fresh, 0.0, total[stream]) * shrink + mass
        mix[stream] = jnp.where(fresh, 0.0, mix[stream]) * shrink[:, : plan.width] + products[stream]
    return columns


def _page_scores(plan: Plan, scores, left) -> list[Any]:
    """Scores of a stream's pages as columns: column h, sublane i is the page of tile i at lanes h · page_size."""
    tiles = plan.stream_tokens // _LANES
    shape = (max(tiles, _SUBLANES), _LANES)
    sublane = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    mean = jnp.zeros(shape, jnp.float32)
    for tile in range(tiles):
        summed = jnp.sum(scores[:, tile * _LANES : (tile + 1) * _LANES], axis=0, keepdims=True)
        mean = jnp.where(sublane == tile, summed, mean)
    mean = mean * (plan.scale / plan.groups)
    mean = jnp.where(sublane * _LANES + lane < left, mean, MASKED)
    columns = []
    for first in range(0, _LANES, plan.page_size):
        inside = (lane >= first) & (lane < first + plan.page_size)
        best = jnp.max(jnp.where(inside, mean, MASKED), axis=1, keepdims=True)
        if plan.scores == "lse":
            mass = jnp.sum(jnp.where(inside, jnp.exp(mean - best), 0.0), axis=1, keepdims=True)
            best = best + jnp.log(mass)
        columns.append(best)
    return columns


def _place_scores(plan: Plan, columns, step, scores) -> None:
    """Turn the columns of a step into lanes of its row, page after page."""
    per_tile = _LANES // plan.page_size
    rows = max(1, plan.step_pages // _LANES)
    shape = columns[0].shape[0], _LANES
    sublane = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    offset = 0 if plan.step_pages >= _LANES else jax.lax.rem(step * plan.step_pages, _LANES)
    first = step * plan.step_pages // _LANES
    used = plan.stream_tokens // _LANES
    for line in range(rows):
        placed = jnp.zeros(shape, jnp.float32)
        for index, column in enumerate(columns):
            stream, part = divmod(index, per_tile)
            page = stream * plan.stream_pages + part - line * _LANES
            if not -plan.stream_pages < page < _LANES:
                continue
            here = (lane - offset == sublane * per_tile + page) & (sublane < used)
            placed = jnp.where(here, column, placed)
        placed = jnp.sum(placed, axis=0, keepdims=True)
        if plan.step_pages < _LANES:
            inside = (lane[:1] >= offset) & (lane[:1] < offset + plan.step_pages)
            placed = jnp.where(inside, placed, scores[pl.ds(first, 1), :])
        scores[pl.ds(first + line, 1), :] = placed


def attend(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    limits: jax.Array,
    chosen: jax.Array | None,
    heads: Heads,
    *,
    scale: float,
    page_scores: PageScore | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Attention `[B, R, G, H]` and page scores `[B, R, P]` of `heads [R]` over the first `limits` tokens of lists.

    The list of an item is the row's page table (`chosen` None, `limits [B]`), or the entries of it that `chosen [B, K,
    M]` names, with `limits [B, K]`.
    """
    batch, kv_heads, groups, head_dim = q.shape
    page_size = kv_pages.shape[2]
    limit_words, row_words = _smem_words(page_table, limits, chosen)
    plan = Plan(
        batch=batch, kv_heads=kv_heads, heads=heads.shape[0], groups=groups, page_size=page_size, head_dim=head_dim,
        capacity=page_table.shape[1] if chosen is None else chosen.shape[2], scale=scale, scores=page_scores,
        sparse=chosen is not None, exact=kv_pages.dtype == jnp.float32, cores=chip.cores(),
        ahead=batch > 1 and 4 * (limit_words + 4 * row_words) <= _SMEM_BYTES,
    )  # fmt: skip
    _check(plan, q, kv_pages, page_table, limits, chosen)
    if plan.heads == 0:
        scores = jnp.zeros((batch, 0, page_table.shape[1]), jnp.float32)
        return q[:, :0], None if page_scores is None else scores
    return _launch(plan, q, kv_pages, page_table, limits, chosen, heads)


@functools.partial(jax.jit, static_argnums=0)  # layers share one trace, which takes longer than the compiler does
def _launch(
    plan: Plan,
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    limits: jax.Array,
    chosen: jax.Array | None,
    heads: Heads,
) -> tuple[jax.Array, jax.Array | None]:
    batch, groups, head_dim = plan.batch, plan.groups, plan.head_dim
    padding = ((0, 0), (0, 0), (0, plan.queries - groups), (0, plan.width - head_dim))
    query = jnp.pad(q.astype(kv_pages.dtype), padding)

    def row(core, row, *_):
        del core
        return row, 0, 0

    def following(core, row, *_):
        del core
        return jnp.minimum(row + 1, batch - 1), 0, 0

    smem: list[tuple[jax.Array, tuple[int, ...]]] = [(page_table[:, None, :], (1, 1, page_table.shape[1]))]
    if chosen is not None:
        smem.append((chosen, (1, *chosen.shape[1:])))
    item_out = (1, 1, plan.items, plan.queries, plan.width)
    outs = [(item_out, jnp.float32)]
    if plan.parts > 1:
        outs.append(((1, 1, plan.items, plan.queries, _LANES), jnp.float32))
    if plan.scores is not None:
        outs.append(((1, 1, plan.items, plan.score_rows, _LANES), jnp.float32))
    state = (_STREAMS, plan.queries)
    buffer = pltpu.VMEM((plan.step_pages, *kv_pages.shape[2:]), kv_pages.dtype)
    # XLA would copy a small pool to the vector memory first.
    pool = pltpu.with_memory_space_constraint(kv_pages, pltpu.HBM)
    result = pl.pallas_call(
        lambda *refs: _kernel(plan, *refs),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(plan.cores, batch),
            in_specs=[
                *(
                    pl.BlockSpec(block, index, memory_space=pltpu.SMEM)
                    for _, block in smem
                    for index in ((row, following) if plan.ahead else (row,))
                ),
                pl.BlockSpec((1, *query.shape[1:]), lambda core, row, *_: (row, 0, 0, 0)),
                pl.BlockSpec(memory_space=pltpu.HBM),
            ],
            out_specs=[pl.BlockSpec(block, lambda core, row, *_: (core, row, 0, 0, 0)) for block, _ in outs],
            scratch_shapes=[
                buffer,
                buffer,
                pltpu.VMEM((*state, _LANES), jnp.float32),
                pltpu.VMEM((*state, _LANES), jnp.float32),
                pltpu.VMEM((*state, plan.width), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((plan.cores, batch, *block[2:]), dtype) for block, dtype in outs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            disable_bounds_checks=True,
            vmem_limit_bytes=_vmem_bytes(plan, query, kv_pages),
        ),
        name="sparse_decode" if plan.sparse else "dense_decode",
    )(heads, limits, *(array for array, _ in smem for _ in range(1 + plan.ahead)), query, pool)
    return _gather(plan, q, page_table, limits, list(result))


def _gather(plan: Plan, q, page_table, limits, results) -> tuple[jax.Array, jax.Array | None]:
    """Join what the cores wrote: their heads, or their parts of the context."""
    out = results.pop(0)
    scores = results.pop() if plan.scores is not None else None
    if plan.parts > 1:
        lse = results.pop()[..., :1]
        weight = jnp.where(lse > MASKED / 2, jnp.exp(lse - jnp.max(lse, axis=0)), 0.0)
        out = jnp.sum(out * weight, axis=0) / jnp.maximum(jnp.sum(weight, axis=0), 1.0)
    else:
        out = out.swapaxes(0, 1).reshape(plan.batch, -1, *out.shape[3:])[:, : plan.heads]
    out = out[:, :, : plan.groups, plan.width - plan.head_dim :].astype(q.dtype)
    if scores is None:
        return out, None
    scores = scores.reshape(plan.cores, plan.batch, plan.items, -1)
    if plan.parts > 1:
        step = plan.step_pages * plan.page_size
        half = (limits + step - 1) // step
        half = (half + 1) // 2 * plan.step_pages
        page = jnp.arange(scores.shape[-1], dtype=jnp.int32)
        scores = jnp.where(page < half[:, None, None], scores[0], scores[1])
    else:
        scores = scores.swapaxes(0, 1).reshape(plan.batch, -1, scores.shape[-1])[:, : plan.heads]
    return out, scores[..., : page_table.shape[1]]


def _vmem_bytes(plan: Plan, query, kv_pages) -> int:
    """What the kernel needs of the vector memory: its buffers, its blocks (twice), and room for values in flight."""
    page = plan.page_size * kv_pages.shape[3] * kv_pages.dtype.itemsize
    buffers = 2 * plan.step_pages * page
    blocks = plan.kv_heads * plan.queries * plan.width * query.dtype.itemsize
    blocks += plan.items * plan.queries * (plan.width + _LANES) * 4
    if plan.scores is not None:
        blocks += plan.items * max(plan.score_rows, _SUBLANES) * _LANES * 4
    return buffers + 2 * blocks + (6 << 20)


def _smem_words(page_table, limits, chosen) -> tuple[int, int]:
    """Words of scalar memory: held throughout, and for the lists of one row (which Pallas buffers twice)."""
    lists = page_table.shape[1] + (0 if chosen is None else math.prod(chosen.shape[1:]))
    return math.prod(limits.shape), lists


def _check(plan: Plan, q, kv_pages, page_table, limits, chosen) -> None:
    if kv_pages.dtype not in (jnp.bfloat16, jnp.float32) or q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"mosaic_tpu reads bfloat16 and float32, not {kv_pages.dtype} with {q.dtype} queries")
    if plan.head_dim not in (64, 128):
        raise NotImplementedError(f"mosaic_tpu covers head_dim 64 and 128, not {plan.head_dim}")
    if plan.page_size not in (16, 32, 64, 128):
        raise NotImplementedError(f"mosaic_tpu covers page sizes 16, 32, 64 and 128, not {plan.page_size}")
    limit_words, row_words = _smem_words(page_table, limits, chosen)
    if 4 * (limit_words + 2 * row_words) > _SMEM_BYTES:
        raise NotImplementedError(f"page tables of {page_table.shape[1]} entries do not fit the scalar memory")
