"""The second launch: some blocks merge the pieces of the heads, others select pages by the scores of the first."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.common import Refs, compiler_params, interpreter, wait_for_predecessor
from pallas_kernels.mosaic_gpu.merge import WARPGROUPS, merge, merge_scratch
from pallas_kernels.mosaic_gpu.plan import Tiling
from pallas_kernels.mosaic_gpu.select import SIDE, Selector, hand_on, make_triangles, select_scratch


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

    Selects by `scores [B, dense, rows, 64]`: `selected` pages where they exist, or `limits [B, dense]`. Heads that do
    not select hand on their entry of `selection`.
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
        chunks = scores.shape[2] // SIDE
        names += ["scores", "flat_scores"]
        inputs += [scores, scores.reshape(batch, tiling.dense, -1)]
        if limits is not None:
            names.append("limits")
            inputs.append(limits)
        padded = -(-selected // SIDE) * SIDE
        if selection is not None:
            names += ["old_pages", "old_counts"]
            old, counts = selection
            inputs += [jnp.pad(old, ((0, 0), (0, 0), (0, padded - old.shape[2])), constant_values=-1), counts]
        out_names += ["new_pages", "new_counts"]
        heads = tiling.heads
        outputs += [
            jax.ShapeDtypeStruct((batch, heads, padded), jnp.int32),
            jax.ShapeDtypeStruct((batch, heads), jnp.int32),
        ]
        scratch |= select_scratch()
        selects = batch * heads
    names += out_names

    def body(*args: Any, **named: Any) -> None:
        refs = Refs(dict(zip(names, args, strict=True)) | named)
        block = jax.lax.axis_index("block").astype(jnp.int32)
        warpgroup = jax.lax.axis_index("warpgroup")
        if selects:

            @pl.when((block < selects) & (warpgroup == 0))
            def _():
                make_triangles(refs)

        wait_for_predecessor()

        if merges:

            @pl.when(block >= selects)
            def _():
                number = block - selects
                segment = number // groups
                row = segment // tiling.heads
                merge(tiling, refs, row, segment - row * tiling.heads, number - segment * groups)

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
        num_threads=WARPGROUPS, thread_name="warpgroup", compiler_params=compiler_params(), interpret=interpreter(),
        kernel_name="finish",
    )(*inputs)  # fmt: skip
    found = dict(zip(out_names, results, strict=True))
    pages = found.get("new_pages")
    return found.get("out"), pages if pages is None else pages[:, :, :selected], found.get("new_counts")
