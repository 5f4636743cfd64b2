"""`dense_decode` on TPU: every page of a row, with page scores from the same pass."""

import jax

from pallas_kernels.mosaic_tpu.attend import attend
from pallas_kernels.mosaic_tpu.config import TpuConfig
from pallas_kernels.types import Heads, KVPages, PageScore


def dense_decode(
    q: jax.Array,
    kv: KVPages,
    page_table: jax.Array,
    lengths: jax.Array,
    heads: Heads,
    *,
    scale: float,
    page_scores: PageScore | None = None,
    return_lse: bool = False,
    config: TpuConfig = TpuConfig(),
) -> tuple[jax.Array, jax.Array | None] | tuple[jax.Array, jax.Array | None, jax.Array]:
    """See `xla.decode.dense_decode`."""
    out, scores, lse = attend(
        q, kv, page_table, lengths, None, heads, scale=scale, page_scores=page_scores, return_lse=return_lse,
        config=config,
    )  # fmt: skip
    return (out, scores) if lse is None else (out, scores, lse)
