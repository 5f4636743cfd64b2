"""The launch of the attention kernel, and what remains to be done with its results."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu import chip
from pallas_kernels.mosaic_tpu.chip import LANES
from pallas_kernels.mosaic_tpu.config import TpuConfig
from pallas_kernels.mosaic_tpu.kernel import attention_kernel
from pallas_kernels.mosaic_tpu.launch import Launch, check, fits_smem, smem_words, vmem_bytes
from pallas_kernels.mosaic_tpu.words import unit
from pallas_kernels.types import Heads, KVPages, PageScore
from pallas_kernels.xla.decode import MASKED


def attend(
    q: jax.Array,
    kv: KVPages,
    page_table: jax.Array,
    num_tokens: jax.Array,
    selected: jax.Array | None,
    heads: Heads,
    *,
    scale: float,
    page_scores: PageScore | None = None,
    return_lse: bool = False,
    dense: jax.Array | None = None,
    config: TpuConfig = TpuConfig(),
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Attention `[B, R, G, H]`, page scores `[B, R, P]` and log-sum-exps `[B, R, G]` of `heads [R]`.

    A head reads the first `num_tokens` tokens of a list of pages: of the row's page table (`selected` None,
    `num_tokens [B]`), or of the entries that `selected [B, K, M]` names (`num_tokens [B, K]`). With selections, rows
    in `dense [B]` read the page table all the same.
    """
    batch, kv_heads, groups, head_dim = q.shape
    held, lists = smem_words(page_table, num_tokens, selected)
    launch = Launch(
        batch=batch, kv_heads=kv_heads, heads=heads.shape[0], groups=groups, page_size=kv.page_size, head_dim=head_dim,
        max_pages=page_table.shape[1] if selected is None else selected.shape[2], sparse=selected is not None,
        cores=chip.cores(), scale=scale, scores=page_scores, return_lse=return_lse, dense_rows=dense is not None,
        exact=(q if kv.quantized else kv.data).dtype == jnp.float32, quantized=kv.quantized,
        prefetch_rows=batch > 1 and fits_smem(held, lists, buffers=4), config=config,
    )  # fmt: skip
    check(launch, q, kv.data, page_table, num_tokens, selected)
    if launch.heads == 0:
        return (
            q[:, :0],
            None if page_scores is None else jnp.zeros((batch, 0, page_table.shape[1]), jnp.float32),
            jnp.zeros((batch, 0, groups), jnp.float32) if return_lse else None,
        )
    return _call(launch, q, kv, page_table, num_tokens, selected, heads, dense)


@functools.partial(jax.jit, static_argnums=0)  # layers share one trace, which takes longer than the compiler does
def _call(
    launch: Launch,
    q: jax.Array,
    kv: KVPages,
    page_table: jax.Array,
    num_tokens: jax.Array,
    selected: jax.Array | None,
    heads: Heads,
    dense: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    padding = ((0, 0), (0, 0), (0, launch.queries - launch.groups), (0, launch.width - launch.head_dim))
    query = jnp.pad(q * unit(launch) if launch.quantized else q.astype(kv.data.dtype), padding)
    if launch.kv_splits == 1:  # as many for every core
        heads = jnp.pad(heads, (0, launch.core_heads * launch.cores - launch.heads), constant_values=-1)
    if selected is None:
        tokens = jnp.where(heads >= 0, num_tokens[:, None], 0)
    else:  # a gather, as a sum that fuses
        named = heads[:, None] == jnp.arange(launch.kv_heads, dtype=jnp.int32)
        tokens = jnp.sum(jnp.where(named, num_tokens[:, None, :], 0), axis=-1, dtype=jnp.int32)
        if launch.dense_rows:  # the kernel looks at whole steps of it, also where it means nothing
            unused = -launch.max_pages % launch.step_pages
            selected = jnp.pad(selected, ((0, 0), (0, 0), (0, unused)), constant_values=-1)

    def row(core, row, *_):
        del core
        return row, 0, 0

    def following(core, row, *_):
        del core
        return jnp.minimum(row + 1, launch.batch - 1), 0, 0

    prefetched = [jnp.maximum(heads, 0), tokens, *([] if dense is None else [dense.astype(jnp.int32)])]
    lists = [page_table[:, None, :], *([] if selected is None else [selected])]
    per_head = (1, 1, launch.core_heads)
    outs = [(*per_head, launch.queries, launch.width)]
    if launch.writes_lse:
        outs.append((*per_head, launch.queries, LANES))
    if launch.scores is not None:
        outs.append((*per_head, launch.score_rows, LANES))
    pools = [pool for pool in kv if pool is not None]
    buffers = [pltpu.VMEM((launch.step_pages, *pool.shape[2:]), pool.dtype) for pool in pools]
    state = (launch.config.step_blocks, launch.queries)
    results = pl.pallas_call(
        lambda *refs: attention_kernel(launch, *refs),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(launch.cores, launch.batch),
            in_specs=[
                *(
                    pl.BlockSpec((1, *array.shape[1:]), index, memory_space=pltpu.SMEM)
                    for array in lists
                    for index in ((row, following) if launch.prefetch_rows else (row,))
                ),
                pl.BlockSpec((1, *query.shape[1:]), lambda core, row, *_: (row, 0, 0, 0)),
                *(pl.BlockSpec(memory_space=pltpu.HBM) for _ in pools),
            ],
            out_specs=[pl.BlockSpec(block, lambda core, row, *_: (core, row, 0, 0, 0)) for block in outs],
            scratch_shapes=[
                *buffers,
                *buffers,
                pltpu.VMEM((*state, LANES), jnp.float32),
                pltpu.VMEM((*state, LANES), jnp.float32),
                pltpu.VMEM((*state, launch.width), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((launch.cores, launch.batch, *block[2:]), jnp.float32) for block in outs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            disable_bounds_checks=True,
            vmem_limit_bytes=vmem_bytes(launch, query, kv),
        ),
        interpret=chip.interpreter(),
        name="sparse_decode" if launch.sparse else "dense_decode",
    )(
        *prefetched,
        *(array for array in lists for _ in range(1 + launch.prefetch_rows)),
        query,
        # XLA would copy a small pool to the vector memory first.
        *(pltpu.with_memory_space_constraint(pool, pltpu.HBM) for pool in pools),
    )
    return _gather(launch, q, page_table, num_tokens, list(results))


def _gather(launch: Launch, q, page_table, num_tokens, results) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Join what the cores wrote: their heads, or their splits of the context."""
    out = results.pop(0)
    lse = results.pop(0)[..., :1] if launch.writes_lse else None
    scores = results.pop(0).reshape(*out.shape[:3], -1) if launch.scores is not None else None
    if launch.kv_splits == 1:
        out, lse, scores = (None if x is None else _join_heads(launch, x) for x in (out, lse, scores))
    else:
        assert lse is not None
        out, lse = _merge_splits(out, lse)
        if scores is not None:
            steps = (num_tokens + launch.step_tokens - 1) // launch.step_tokens
            cut = (steps + 1) // 2 * launch.step_pages
            page = jnp.arange(scores.shape[-1], dtype=jnp.int32)
            scores = jnp.where(page < cut[:, None, None], scores[0], scores[1])
    assert out is not None
    out = out[:, :, : launch.groups, launch.width - launch.head_dim :].astype(q.dtype)
    return (
        out,
        None if scores is None else scores[..., : page_table.shape[1]],
        lse[:, :, : launch.groups, 0] if launch.return_lse and lse is not None else None,
    )


def _join_heads(launch: Launch, x: jax.Array) -> jax.Array:
    """`[cores, B, heads of a core, …]` to `[B, R, …]`; cores take turns with the heads."""
    return jnp.moveaxis(x, 0, 2).reshape(launch.batch, -1, *x.shape[3:])[:, : launch.heads]


def _merge_splits(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Outputs `[splits, …, H]` and log-sum-exps `[splits, …, 1]` of split-KV as one."""
    best = jnp.max(lse, axis=0)
    weight = jnp.where(lse > MASKED / 2, jnp.exp(lse - best), 0.0)
    total = jnp.maximum(jnp.sum(weight, axis=0), 1.0)  # the largest weight is 1, unless nothing was read
    return jnp.sum(out * weight, axis=0) / total, best + jnp.log(total)
