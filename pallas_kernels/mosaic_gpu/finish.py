"""The second launch: some blocks merge the pieces of the heads, others select pages by the scores of the first.

Blocks come in three kinds, in this order: those that select for a dense head; those that merge a dense head or, where
its pieces are many, one of its query heads; those that merge a sparse head and hand on its pages.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.common import (
    Refs,
    compiler_params,
    interpreter,
    let_successor_start,
    quotient,
    wait_for_predecessor,
)
from pallas_kernels.mosaic_gpu.merge import find_pieces, merge_heads, merge_scratch, merge_together, together
from pallas_kernels.mosaic_gpu.select import SIDE, Selector, chunking, hand_on, make_triangles, select_scratch
from pallas_kernels.mosaic_gpu.split import SplitPlan
from pallas_kernels.types import Selection, SelectionSpec


class Finished(NamedTuple):
    """What was asked for: output `[B, K, G, H]`, log-sum-exp `[B, K, G]`, pages `[B, K, M]`, counts `[B, K]`."""

    out: jax.Array | None
    lse: jax.Array | None
    pages: jax.Array | None
    counts: jax.Array | None


@functools.partial(jax.jit, static_argnames=("plan", "shape", "dtype", "return_lse", "spec", "target"))
def finish(
    lengths: jax.Array,
    order: jax.Array | None,
    *,
    plan: SplitPlan,
    named: jax.Array | None = None,
    dense_rows: jax.Array | None = None,
    pieces: tuple[jax.Array, jax.Array] | None = None,
    shape: tuple[int, ...] = (),
    dtype: Any = None,
    return_lse: bool = False,
    spec: SelectionSpec | None = None,
    scores: jax.Array | None = None,
    limits: jax.Array | None = None,
    selection: Selection | None = None,
    target: Any = None,
) -> Finished:
    """Merge `pieces` (sums, stats) to an output of `shape` and `dtype`, select by `scores`, or both.

    Selects by `scores [B, dense_heads, pages]`, whole chunks of them: `spec.budget_pages` where they exist, or
    `limits [B, dense_heads]`. Heads that do not select hand on their entry of `selection`, and so do dense rows.
    `order` says where in the output a head lies; `named` and `dense_rows`: see `TileList`.
    """
    del target
    batch, dense, sparse = plan.batch, plan.dense_heads, plan.sparse_heads
    given = {"lengths": lengths, "order": order, "named": named, "dense_rows": dense_rows}
    outputs, scratch = {}, {}
    selects = merges = groups = 0
    warpgroups = plan.config.merge_warpgroups
    if pieces is not None:
        given |= dict(zip(("sums", "stats"), pieces, strict=True))
        outputs["out"] = jax.ShapeDtypeStruct(shape, dtype)
        if return_lse:
            outputs["lse"] = jax.ShapeDtypeStruct(shape[:3], jnp.float32)
        scratch |= merge_scratch(warpgroups, shape[3])
        groups = shape[2]
        merges = batch * (dense * groups if together(plan) else dense)
    blocks_a_head = groups if together(plan) else 1
    chunks = 1
    if scores is not None:
        assert spec is not None
        chunks, columns = chunking(scores.shape[2])
        given |= {"scores": scores.reshape(batch, dense, chunks * SIDE, columns), "flat_scores": scores}
        given["limits"] = limits
        padded = -(-spec.budget_pages // SIDE) * SIDE
        if selection is not None:
            old, counts = selection
            if old.shape[2] < padded:
                old = jnp.pad(old, ((0, 0), (0, 0), (0, padded - old.shape[2])), constant_values=-1)
            given |= {"old_pages": old, "old_counts": counts}
        outputs["new_pages"] = jax.ShapeDtypeStruct((batch, plan.heads, padded), jnp.int32)
        outputs["new_counts"] = jax.ShapeDtypeStruct((batch, plan.heads), jnp.int32)
        scratch |= select_scratch(columns)
        selects = batch * dense
    inputs = {name: array for name, array in given.items() if array is not None}
    names = [*inputs, *outputs]
    # A block that only selects is one warpgroup, and may have more registers.
    threads = 1 if pieces is None else warpgroups

    def body(*args: Any, **held: Any) -> None:
        refs = Refs(dict(zip(names, args, strict=True)) | held)
        block = jax.lax.axis_index("block").astype(jnp.int32)
        warpgroup = jax.lax.axis_index("warpgroup")
        selecting, reads_all = block < selects, block < selects + merges
        number = jnp.where(reads_all, quotient(block - selects, blocks_a_head), block - selects - merges)
        group = block - selects - number * blocks_a_head
        number = jnp.where(selecting, block, number)
        row = quotient(number, jnp.where(reads_all, max(dense, 1), max(sparse, 1)))
        index = number - jnp.where(reads_all, row * dense, row * sparse - dense)

        if selects:

            @pl.when(selecting & (warpgroup == 0))
            def _():
                make_triangles(refs)

        # Before waiting: the blocks of `attend`, which comes before every merge, let this launch start only after
        # their own wait, so that what `find_pieces` reads, which `attend` reads too, was complete by then.
        found = None if pieces is None else find_pieces(plan, refs, row, index)
        wait_for_predecessor()
        let_successor_start()

        if selects:

            def select() -> None:
                assert spec is not None
                Selector(
                    refs, chunks=chunks, page_size=plan.page_size, sink_pages=spec.sink_pages,
                    recent_pages=spec.recent_pages, budget_pages=spec.budget_pages if limits is None else None,
                ).run(row, index, index if found is None else found.head)  # fmt: skip

            mine = selecting & (warpgroup == 0)
            if found is None or found.selects is None:
                pl.when(mine)(select)
            else:
                pl.when(mine & found.selects)(select)
                pl.when(mine & ~found.selects)(lambda: hand_on(refs, row, found.head))

        if found is None:
            return

        @pl.when(reads_all & ~selecting)
        def _():
            if together(plan):
                merge_together(plan, refs, found, group)
            elif dense:
                merge_heads(plan, refs, found, True, groups)

        @pl.when(~reads_all)
        def _():
            merge_heads(plan, refs, found, False, groups)
            if selection is not None:
                pl.when(warpgroup == warpgroups - 1)(lambda: hand_on(refs, row, found.head))

    blocks = selects + merges + (0 if pieces is None else batch * sparse)
    results = plgpu.kernel(
        body, out_type=list(outputs.values()), scratch_types=scratch, grid=(blocks,), grid_names=("block",),
        num_threads=threads, thread_name="warpgroup", compiler_params=compiler_params(), interpret=interpreter(),
        kernel_name="finish",
    )(*inputs.values())  # fmt: skip
    made = dict(zip(outputs, results, strict=True))
    pages = made.get("new_pages")
    if pages is not None and spec is not None:
        pages = pages[:, :, : spec.budget_pages]
    return Finished(made.get("out"), made.get("lse"), pages, made.get("new_counts"))
