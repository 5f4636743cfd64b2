"""The second launch: some blocks merge the pieces of the heads, others select pages by the scores of the first.

Blocks come in three kinds, in this order: those that select for a dense head; those that merge a dense head or, where
its pieces are many, one of its query heads; those that merge a sparse head and hand on its pages.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.common import (
    Refs,
    compiler_params,
    interpreter,
    let_successor_start,
    wait_for_predecessor,
)
from pallas_kernels.mosaic_gpu.merge import (
    WARPGROUPS,
    find_pieces,
    merge_heads,
    merge_scratch,
    merge_together,
    together,
)
from pallas_kernels.mosaic_gpu.plan import Tiling
from pallas_kernels.mosaic_gpu.select import SIDE, Selector, chunking, hand_on, make_triangles, select_scratch


@functools.partial(
    jax.jit,
    static_argnames=("tiling", "shape", "dtype", "selected", "sink_pages", "recent_pages", "target"),
)
def finish(
    lengths: jax.Array,
    order: jax.Array | None,
    *,
    tiling: Tiling,
    pieces: tuple[jax.Array, jax.Array] | None = None,
    shape: tuple[int, ...] = (),
    dtype: Any = None,
    scores: jax.Array | None = None,
    limits: jax.Array | None = None,
    selection: tuple[jax.Array, jax.Array] | None = None,
    selected: int = 0,
    sink_pages: int = 0,
    recent_pages: int = 0,
    target: Any = None,
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
    """Merge `pieces` (sums, stats) to an output of `shape` and `dtype`, select by `scores`, or both.

    Selects by `scores [B, dense, pages]`, whole chunks of them: `selected` pages where they exist, or
    `limits [B, dense]`. Heads that do not select hand on their entry of `selection`.
    Returns the attention's output `[B, K, G, H]`, pages `[B, K, selected]` and counts `[B, K]`.
    """
    del target
    batch, dense, sparse = tiling.batch, tiling.dense, tiling.sparse
    names, inputs, outputs, scratch = ["lengths"], [lengths], [], {}
    if order is not None:
        names, inputs = [*names, "order"], [*inputs, order]
    out_names = []
    selects = merges = groups = 0
    if pieces is not None:
        names += ["sums", "stats"]
        inputs += list(pieces)
        out_names.append("out")
        outputs.append(jax.ShapeDtypeStruct(shape, dtype))
        scratch |= merge_scratch(shape[3])
        groups = shape[2]
        merges = batch * (dense * groups if together(tiling) else dense)
    blocks_a_head = groups if together(tiling) else 1
    chunks = 1
    if scores is not None:
        chunks, columns = chunking(scores.shape[2])
        names += ["scores", "flat_scores"]
        inputs += [scores.reshape(batch, tiling.dense, chunks * SIDE, columns), scores]
        if limits is not None:
            names.append("limits")
            inputs.append(limits)
        padded = -(-selected // SIDE) * SIDE
        if selection is not None:
            names += ["old_pages", "old_counts"]
            old, counts = selection
            if old.shape[2] < padded:
                old = jnp.pad(old, ((0, 0), (0, 0), (0, padded - old.shape[2])), constant_values=-1)
            inputs += [old, counts]
        out_names += ["new_pages", "new_counts"]
        heads = tiling.heads
        outputs += [
            jax.ShapeDtypeStruct((batch, heads, padded), jnp.int32),
            jax.ShapeDtypeStruct((batch, heads), jnp.int32),
        ]
        scratch |= select_scratch(columns)
        selects = batch * dense
    names += out_names
    # A block that only selects is one warpgroup, and may have more registers.
    threads = 1 if pieces is None else WARPGROUPS

    def body(*args: Any, **named: Any) -> None:
        refs = Refs(dict(zip(names, args, strict=True)) | named)
        block = jax.lax.axis_index("block").astype(jnp.int32)
        warpgroup = jax.lax.axis_index("warpgroup")
        selecting, reads_all = block < selects, block < selects + merges
        number = jnp.where(reads_all, (block - selects) // blocks_a_head, block - selects - merges)
        group = block - selects - number * blocks_a_head
        number = jnp.where(selecting, block, number)
        row = number // jnp.where(reads_all, max(dense, 1), max(sparse, 1))
        index = number - jnp.where(reads_all, row * dense, row * sparse - dense)

        if selects:

            @pl.when(selecting & (warpgroup == 0))
            def _():
                make_triangles(refs)

        # Before waiting: the blocks of `attend`, which comes before every merge, let this launch start only after
        # their own wait, so that lengths and order, which `attend` reads too, were complete by then.
        found = None if pieces is None else find_pieces(tiling, refs, row, index)
        wait_for_predecessor()
        let_successor_start()

        if selects:

            @pl.when(selecting & (warpgroup == 0))
            def _():
                Selector(
                    refs, chunks=chunks, page_size=tiling.page_size, sink_pages=sink_pages,
                    recent_pages=recent_pages, budget_pages=None if limits is not None else selected,
                ).run(row, index, index if found is None else found.head)  # fmt: skip

        if found is None:
            return

        @pl.when(reads_all & ~selecting)
        def _():
            if together(tiling):
                merge_together(tiling, refs, found, group)
            elif dense:
                merge_heads(tiling, refs, found, True, groups)

        @pl.when(~reads_all)
        def _():
            merge_heads(tiling, refs, found, False, groups)
            if selection is not None:
                pl.when(warpgroup == WARPGROUPS - 1)(lambda: hand_on(refs, row, found.head))

    blocks = selects + merges + (0 if pieces is None else batch * sparse)
    results = plgpu.kernel(
        body, out_type=outputs, scratch_types=scratch, grid=(blocks,), grid_names=("block",), num_threads=threads,
        thread_name="warpgroup", compiler_params=compiler_params(), interpret=interpreter(), kernel_name="finish",
    )(*inputs)  # fmt: skip
    named = dict(zip(out_names, results, strict=True))
    new_pages = named.get("new_pages")
    return named.get("out"), new_pages if new_pages is None else new_pages[:, :, :selected], named.get("new_counts")
