"""Whether an implementation that was asked for by name covers a model, before anything is read or printed."""

from typing import Any

import jax
import numpy as np

from lychee_jax.attention.selection import Selection, SelectionPolicy
from lychee_jax.cache.pages import make_pools
from lychee_jax.config import ModelConfig
from pallas_kernels import KVPages, hybrid_decode
from pallas_kernels.types import KVDtype


def refuse_uncovered(
    implementation: str,
    config: ModelConfig,
    dtype: np.dtype,
    policy: SelectionPolicy,
    *,
    batch: int,
    pages: int,
    page_size: int,
    kv_dtype: KVDtype | None = None,
) -> None:
    """Trace the op with the model's shapes: what it refuses, it refuses now, not after the first token.

    Raises:
        NotImplementedError: the implementation does not cover the case, or not on this machine.
    """
    if implementation == "xla":  # covers everything
        return
    kv_heads, selecting = config.num_kv_heads, policy.spec(page_size)
    shapes = [
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in (
            ((batch, kv_heads, config.groups, config.head_dim), dtype),
            ((batch, pages), np.int32), ((batch,), np.int32),
            ((batch, kv_heads, selecting.budget_pages), np.int32), ((batch, kv_heads), np.int32),
        )
    ]  # fmt: skip

    kv = jax.eval_shape(lambda: make_pools(config, batch + 1, page_size, dtype, kv_dtype)[0])

    def call(kv: KVPages, q: jax.Array, table: jax.Array, lengths: jax.Array, *chosen: jax.Array) -> Any:
        return hybrid_decode(
            q, kv, table, lengths, Selection(*chosen), np.arange(1, dtype=np.int32), selecting, scale=1.0,
            implementation=implementation,
        )  # fmt: skip

    jax.eval_shape(call, kv, *shapes)
