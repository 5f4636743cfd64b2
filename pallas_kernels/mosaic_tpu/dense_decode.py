"""`dense_decode` on TPU: every page of a row, with page scores from the same pass."""

import jax

from pallas_kernels.mosaic_tpu.attend import attend
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
) -> tuple[jax.Array, jax.Array | None]:
    """See `xla.decode.dense_decode`."""
    if return_lse:
        raise NotImplementedError("mosaic_tpu returns no log-sum-exp")
    return attend(q, kv.data, page_table, lengths, None, heads, scale=scale, page_scores=page_scores)
