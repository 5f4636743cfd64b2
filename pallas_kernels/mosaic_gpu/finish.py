"""The second launch: some blocks merge the pieces of the heads, others select pages by the scores of the first."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.common import Refs, compiler_params, interpreter, wait_for_predecessor
from pallas_kernels.mosaic_gpu.merge import WARPGROUPS, find_pieces, merge, merge_scratch
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
    batch = tiling.batch
    names, inputs, outputs, scratch = ["lengths"], [lengths], [], {}
    if order is not None:
        names, inputs = [*names, "order"], [*inputs, order]
    out_names = []
    merges = 0
    groups = 0
    if pieces is not None:
        names += ["sums", "stats"]
        inputs += list(pieces)
        out_names.append("out")
        outputs.append(jax.ShapeDtypeStruct(shape, dtype))
        scratch |= merge_scratch(shape[3])
        groups = shape[2]
        merges = batch * tiling.heads * groups
    selects = 0
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
        selects = batch * heads
    names += out_names
    # A block that only selects is one warpgroup, and may have more registers.
    threads = WARPGROUPS if merges else 1

    def body(*args: Any, **named: Any) -> None:
        refs = Refs(dict(zip(names, args, strict=True)) | named)
        block = jax.lax.axis_index("block").astype(jnp.int32)
        warpgroup = jax.lax.axis_index("warpgroup")
        if selects:

            @pl.when((block < selects) & (warpgroup == 0))
            def _():
                make_triangles(refs)

        if merges:
            # Before waiting: the blocks of `attend`, which comes before every merge, let this launch start only after
            # their own wait, so that lengths and order, which `attend` reads too, were complete by then.
            number = jnp.maximum(block - selects, 0)
            segment = number // groups
            row = segment // tiling.heads
            mine = find_pieces(tiling, refs, row, segment - row * tiling.heads)
            group = number - segment * groups

            wait_for_predecessor()

            @pl.when(block >= selects)
            def _():
                merge(tiling, refs, mine, group)

        else:
            wait_for_predecessor()

        if selects:

            @pl.when((block < selects) & (warpgroup == 0))
            def _():
                row = block // tiling.heads
                index = block - row * tiling.heads
                head = index if order is None else refs.order[index]

                @pl.when(index < tiling.dense)
                def _():
                    Selector(
                        refs, chunks=chunks, page_size=tiling.page_size, sink_pages=sink_pages,
                        recent_pages=recent_pages, budget_pages=None if limits is not None else selected,
                    ).run(row, index, head)  # fmt: skip

                if selection is not None:

                    @pl.when(index >= tiling.dense)
                    def _():
                        hand_on(refs, row, head)

    results = plgpu.kernel(
        body, out_type=outputs, scratch_types=scratch, grid=(selects + merges,), grid_names=("block",),
        num_threads=threads, thread_name="warpgroup", compiler_params=compiler_params(), interpret=interpreter(),
        kernel_name="finish",
    )(*inputs)  # fmt: skip
    found = dict(zip(out_names, results, strict=True))
    pages = found.get("new_pages")
    return found.get("out"), pages if pages is None else pages[:, :, :selected], found.get("new_counts")
