"""Attention of the new token over paged keys and values: every block reads its share of tiles and leaves pieces.

One warpgroup fetches tiles (TMA, by page id, several in flight); two others compute, every other tile each, so that one
waits for its tensor cores while the other has its softmax, and unite what they found at the end of a piece. A tile's
tokens are the rows of a wgmma and the query heads of one KV head its eight columns, so that K·qᵀ and Vᵀ·pᵀ waste no
tensor work on padding. `words` has what is different with 8-bit keys and values.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.common import (
    COLUMNS,
    TILED,
    TILED_32,
    Refs,
    compiler_params,
    interpreter,
    let_successor_start,
    wait_for_predecessor,
)  # fmt: skip
from pallas_kernels.mosaic_gpu.compute import SCORE_ROW, Compute
from pallas_kernels.mosaic_gpu.split import SplitPlan
from pallas_kernels.mosaic_gpu.walk import Fetch
from pallas_kernels.mosaic_gpu.words import NUMBERS, ComputeWords
from pallas_kernels.types import KVPages, PageScore, Selection


@functools.partial(jax.jit, static_argnames=("plan", "scale", "page_scores", "score_rows", "target"))
def attend(
    q: jax.Array,
    kv: KVPages,
    page_table: jax.Array,
    lengths: jax.Array,
    order: jax.Array | None,
    selection: Selection | None,
    *,
    named: jax.Array | None = None,
    dense_rows: jax.Array | None = None,
    plan: SplitPlan,
    scale: float,
    page_scores: PageScore | None,
    score_rows: int,
    target: Any,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Read everything once.

    `order [heads]` names the KV heads, the dense ones first (None: all of them, in order); of `named` and `dense_rows`
    `TileList` tells. Returns, for every piece, its weighted sum of values `[pieces, 8, H]` and the top and the total of
    its weights `[pieces, 2, 8]` (base 2), and page scores `[B, dense_heads, score_rows, 64]`. `target` keeps what was
    traced for other machines apart.
    """
    del target
    batch, _, groups, head_dim = q.shape
    capacity = page_table.shape[1]
    num_pages = kv.num_pages
    q, stride = query_rows(q)
    scored = page_scores is not None and plan.dense_heads > 0
    config = plan.config
    tokens, per_tile = plan.tile_tokens, plan.pages_per_tile
    stages = min(config.max_stages, config.tile_bytes // (tokens * kv.data.shape[3] * kv.data.dtype.itemsize))
    # Larger tiles take one warpgroup all its time, and their slots are few.
    computing = config.compute_warpgroups if tokens == plan.least_tokens else 1
    # A slot is always the same warpgroup's, as whoever waits at a barrier must do so every time.
    stages -= stages % computing

    given = {
        "q": q, "kv_pages": kv.data, "page_table": page_table, "lengths": lengths, "order": order,
        "named": named, "dense_rows": dense_rows,
    }  # fmt: skip
    if plan.selective:
        assert selection is not None
        given |= {"pages": selection.pages, "counts": selection.counts}
    if kv.scales is not None:
        given["kv_scales"] = kv.scales.reshape(*kv.scales.shape[:2], 2, plan.page_size)
    inputs = {name: array for name, array in given.items() if array is not None}
    names = [*inputs, "sums", "stats"]
    outputs = [
        jax.ShapeDtypeStruct((plan.pieces, COLUMNS, head_dim), jnp.float32),
        jax.ShapeDtypeStruct((plan.pieces, 2, COLUMNS), jnp.float32),
    ]
    scratch = {
        "tiles": plgpu.SMEM((stages, tokens, kv.data.shape[3]), kv.data.dtype, transforms=TILED),
        "query": plgpu.SMEM((computing, COLUMNS, head_dim), q.dtype, transforms=TILED),
        "weights": plgpu.SMEM((computing, COLUMNS, tokens), NUMBERS if kv.quantized else q.dtype, transforms=TILED),
        "turned": plgpu.SMEM((COLUMNS, head_dim), jnp.float32, transforms=TILED_32),
        "asked": plgpu.Barrier(num_barriers=computing),
        "full": plgpu.Barrier(num_arrivals=per_tile if kv.scales is None else 3 * per_tile, num_barriers=stages),
        "empty": plgpu.Barrier(num_barriers=stages),
    }
    if kv.quantized:
        scratch["numbers"] = plgpu.SMEM((computing, COLUMNS, head_dim), NUMBERS, transforms=TILED)
    if kv.scales is not None:
        scratch["scales"] = plgpu.SMEM((stages, 2, tokens), jnp.float32)
    if computing > 1:
        scratch |= {
            "other_out": plgpu.SMEM((head_dim, COLUMNS), jnp.float32),
            "other_stats": plgpu.SMEM((2, COLUMNS), jnp.float32),
            "other_done": plgpu.Barrier(),
            "other_read": plgpu.Barrier(),
        }
    if scored:
        names.append("scores")
        outputs.append(jax.ShapeDtypeStruct((batch, plan.dense_heads, score_rows, SCORE_ROW), jnp.float32))
        scratch["ready_scores"] = plgpu.SMEM((computing, COLUMNS), jnp.float32)

    def body(*args: Any, **held: Any) -> None:
        refs = Refs(dict(zip(names, args, strict=True)) | held)
        wait_for_predecessor()
        let_successor_start()
        thread = jax.lax.axis_index("warpgroup")

        def compute(number: int) -> None:
            @pl.when(thread == number)
            def _():
                scoring = page_scores if scored else None
                shared = plan, refs, number, computing, groups, stride, scale, scoring, stages
                (Compute(*shared) if kv.quantized is None else ComputeWords(*shared, kind=kv.quantized)).run()

        if computing > 1:
            # A maximum over a tile's tokens goes through memory that lies behind whatever is allocated around it:
            # without an allocation around one of them, both warpgroups would use the same, which the interpreter does
            # not see. Nobody waits where the allocation ends.
            space = compiler_params().reduction_scratch_bytes
            pl.run_scoped(lambda _: compute(1), plgpu.SMEM((space,), jnp.int8), collective_axes="warpgroup")
        compute(0)

        @pl.when(thread == computing)
        def _():
            Fetch(plan, refs, num_pages, capacity, stages).run()

    out = plgpu.kernel(
        body, out_type=outputs, scratch_types=scratch, grid=(plan.blocks,), grid_names=("block",),
        num_threads=computing + 1, thread_name="warpgroup", compiler_params=compiler_params(),
        interpret=interpreter(), kernel_name="attend",
    )(*inputs.values())  # fmt: skip
    return out[0], out[1], out[2] if scored else None


def query_rows(q: jax.Array) -> tuple[jax.Array, int]:
    """The query heads `[B, K, G, H]` as rows, whole tiles of eight, and how many belong to a KV head.

    A block loads eight rows from its KV head's first on; what is not its own is computed and ignored. Such a copy ends
    with the tile of eight that it begins in: behind it the hardware gives zeros. So no KV head's rows may lie in two
    tiles. The interpreter does not know that.
    """
    batch, kv_heads, groups, head_dim = q.shape
    stride = groups if COLUMNS % groups == 0 else COLUMNS
    q = jnp.pad(q, ((0, 0), (0, 0), (0, stride - groups), (0, 0))).reshape(batch * kv_heads * stride, head_dim)
    # JAX 0.11 refuses to copy from an array of another height.
    return jnp.pad(q, ((0, -q.shape[0] % COLUMNS), (0, 0))), stride
