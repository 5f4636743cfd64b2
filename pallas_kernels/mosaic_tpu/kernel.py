"""The one attention kernel under `dense_decode` and `sparse_decode`: a query over a list of pages, double-buffered.

A program of the grid is one row on one core. It reads the row's KV heads one after the other, each in *steps* of a
fixed number of tokens; the DMAs of the next step fill one of two buffers while a step is computed from the other,
across the borders of heads and of rows.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu.launch import Launch
from pallas_kernels.mosaic_tpu.online_softmax import accumulate, merge_blocks
from pallas_kernels.mosaic_tpu.page_scores import store_page_scores
from pallas_kernels.xla.decode import MASKED


class _Row:
    """The work of one core on one row: how many tokens each of its heads has, and where their pages are in the pool.

    `index` counts the heads that the core computes.
    """

    def __init__(self, launch: Launch, core: Any, row: Any, held: tuple[Any, Any, Any], table: Any, selected: Any):
        self.launch, self.core, self.row = launch, core, row
        self._heads, self._num_tokens, self._dense = held
        self._table, self._selected = table, selected

    def _entry(self, index):
        """Which of the launch's heads it is: cores take turns with them, or share every one."""
        return index if self.launch.kv_splits > 1 else index * self.launch.cores + self.core

    def head(self, index):
        """The KV head."""
        return self._heads[self._entry(index)]

    def first_step(self, index):
        """The step of the whole context at which this core's split begins."""
        return 0 if self.launch.kv_splits == 1 else self.core * self._half(index)

    def _half(self, index):
        return pl.cdiv(pl.cdiv(self._num_tokens[self.row, self._entry(index)], self.launch.step_tokens), 2)

    def tokens(self, index):
        """Tokens that a head attends to."""
        tokens = self._num_tokens[self.row, self._entry(index)]
        if self.launch.kv_splits == 1:
            return tokens
        cut = jnp.minimum(self._half(index) * self.launch.step_tokens, tokens)
        return jnp.where(self.core == 0, cut, tokens - cut)

    def pages(self, index):
        """Pages that hold them."""
        return pl.cdiv(self.tokens(index), self.launch.page_size)

    def steps(self, index):
        """Steps that read them; a head without tokens takes a turn, too."""
        return jnp.maximum(pl.cdiv(self.pages(index), self.launch.step_pages), 1)

    def locate(self, index, step):
        """A function from a place in the step to the pool page there."""
        first = step * self.launch.step_pages
        if not self.launch.sparse:
            first = self.first_step(index) * self.launch.step_pages + first
            return lambda place: self._table[0, 0, first + place]
        head = self.head(index)
        if not self.launch.dense_rows:
            return lambda place: self._table[0, 0, self._selected[0, head, first + place]]
        dense = self._dense[self.row] != 0
        inside = jnp.where(dense, 0, first)  # a place in the selection, whatever the step

        def page(place):
            return self._table[0, 0, jnp.where(dense, first + place, self._selected[0, head, inside + place])]

        return page


def attention_kernel(launch: Launch, *refs: Any) -> None:
    """Attention over lists of pages; the operands are those of `attend`'s launch, in its order."""
    refs_in = iter(refs)
    heads, num_tokens = next(refs_in), next(refs_in)
    held = heads, num_tokens, next(refs_in) if launch.dense_rows else None
    table = next(refs_in)
    next_table = next(refs_in) if launch.prefetch_rows else None
    selected = next(refs_in) if launch.sparse else None
    next_selected = next(refs_in) if launch.sparse and launch.prefetch_rows else None
    q = next(refs_in)
    pools = [next(refs_in) for _ in range(1 + launch.scaled)]
    out = next(refs_in)
    lse = next(refs_in) if launch.writes_lse else None
    scores = next(refs_in) if launch.scores else None
    *held_pages, running_max, normalizer, acc, first_slot, arrived = refs_in
    buffers = held_pages[: len(pools)], held_pages[len(pools) :]

    core, row = pl.program_id(0), pl.program_id(1)
    here = _Row(launch, core, row, held, table, selected)
    there = _Row(launch, core, jnp.minimum(row + 1, launch.batch - 1), held, next_table, next_selected)
    unroll = min(launch.config.dma_unroll, launch.step_pages)

    def copies(slot, place, head, page):
        """Of a page, and of its scales."""
        return [
            pltpu.make_async_copy(pool.at[page, head], buffer.at[place], arrived.at[slot])
            for pool, buffer in zip(pools, buffers[slot], strict=True)
        ]

    def fetch(which: _Row, index, step, slot, count, *, unroll=unroll):
        """Start the DMAs of a step of `count` pages, `unroll` of them in one straight piece of code."""
        locate, head = which.locate(index, step), which.head(index)

        def some(first):
            for place in range(unroll):

                @pl.when(first + place < count)
                def _(place=first + place):
                    for copy in copies(slot, place, head, locate(place)):
                        copy.start()

        if unroll == launch.step_pages:
            some(0)
        else:
            pl.loop(0, pl.cdiv(jnp.minimum(count, launch.step_pages), unroll))(lambda i: some(i * unroll))

    def fetch_first_of_next_row(slot):
        if launch.prefetch_rows:

            @pl.when(row + 1 < launch.batch)
            def _():
                fetch(there, 0, 0, slot, there.pages(0))

    def wait(index, step, slot):
        buffer = buffers[slot][0]
        count = jnp.minimum(here.pages(index) - step * launch.step_pages, launch.step_pages)

        @pl.when(count == launch.step_pages)
        def _():  # the semaphore counts bytes: one wait for all of them
            for whole in buffers[slot]:
                pltpu.make_async_copy(whole, whole, arrived.at[slot]).wait()

        @pl.when(count < launch.step_pages)
        def _():
            def arrive(place, carry):
                for copy in copies(slot, place, 0, 0):
                    copy.wait()
                return carry

            jax.lax.fori_loop(0, count, arrive, 0)

            def clear(place, carry):  # stale values would meet zero weights, and may be NaN
                buffer[place] = jnp.zeros(buffer.shape[1:], buffer.dtype)
                return carry

            jax.lax.fori_loop(count, launch.step_pages, clear, 0)

        tail = here.tokens(index) % launch.page_size

        @pl.when((step + 1 == here.steps(index)) & (tail > 0))
        def _():  # the same holds for slots past the length
            page = buffer[count - 1]
            slots = jax.lax.broadcasted_iota(jnp.int32, page.shape, 0)
            buffer[count - 1] = jnp.where(slots < tail, page, jnp.zeros_like(page))

    def compute(index, step, slot):
        query = q[0, here.head(index)]
        left = here.tokens(index) - step * launch.step_tokens
        columns = accumulate(launch, query, buffers[slot], left, step == 0, running_max, normalizer, acc)
        if scores is not None:
            store_page_scores(launch, columns, here.first_step(index) + step, scores.at[0, 0, index])

    def finish(index):
        merged, merged_lse = merge_blocks(launch, running_max, normalizer, acc)
        out[0, 0, index] = merged
        if lse is not None:
            lse[0, 0, index] = merged_lse

    @pl.when((row == 0) | (not launch.prefetch_rows))
    def _():
        first_slot[0] = 0
        fetch(here, 0, 0, 0, here.pages(0))

    def read(index, step, slot):
        """A step of a head: start the next one's DMAs, compute."""
        last = step + 1 == here.steps(index)
        next_index = jnp.where(last, index + 1, index)
        next_step = jnp.where(last, 0, step + 1)
        in_row = next_index < launch.core_heads
        known = jnp.minimum(next_index, launch.core_heads - 1)
        pl.when(~in_row)(lambda: fetch_first_of_next_row(1 - slot))
        wait(index, step, slot)
        # Straight code: its scalar work shares bundles with the vector work below.
        left = jnp.where(in_row, here.pages(known) - next_step * launch.step_pages, 0)
        fetch(here, known, next_step, 1 - slot, left, unroll=launch.step_pages)
        compute(index, step, slot)
        pl.when(last)(lambda: finish(index))

    def skip(index, slot):
        """A head without tokens: zeros, and the next one's DMAs."""
        in_row = index + 1 < launch.core_heads
        pl.when(~in_row)(lambda: fetch_first_of_next_row(1 - slot))

        @pl.when(in_row)
        def _():
            fetch(here, index + 1, 0, 1 - slot, here.pages(index + 1))

        out[0, 0, index] = jnp.zeros(out.shape[3:], out.dtype)
        if lse is not None:
            lse[0, 0, index] = jnp.full(lse.shape[3:], MASKED, lse.dtype)

    def body(state: Any) -> Any:
        index, step, slot = state

        def for_slot(turn: Any) -> None:
            for value in range(2):  # buffers are told apart while compiling: loads then need not wait for copies
                pl.when(slot == value)(lambda value=value: turn(value))

        jax.lax.cond(
            here.tokens(index) > 0,
            lambda: for_slot(lambda value: read(index, step, value)),
            lambda: for_slot(lambda value: skip(index, value)),
        )
        last = step + 1 == here.steps(index)
        return jnp.where(last, index + 1, index), jnp.where(last, 0, step + 1), 1 - slot

    state: Any = (0, 0, first_slot[0])
    first_slot[0] = jax.lax.while_loop(lambda state: state[0] < launch.core_heads, body, state)[2]
