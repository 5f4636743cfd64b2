"""`dense_decode` on TPU: every page of a row, with page scores from the same pass."""

import jax

from pallas_kernels.mosaic_tpu.attend import attend
from pallas_kernels.types import Heads, PageScore


def dense_decode(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    heads: Heads,
    *,
    scale: float,
    page_scores: PageScore | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """See `reference.dense_decode`."""
    return attend(q, kv_pages, page_table, lengths, None, heads, scale=scale, page_scores=page_scores)
