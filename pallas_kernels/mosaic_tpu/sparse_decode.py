"""`sparse_decode` on TPU: the pages that a selection names, each fetched by its id."""

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_tpu.attend import attend
from pallas_kernels.types import Heads, KVPages, Selection


def sparse_decode(
    q: jax.Array,
    kv: KVPages,
    page_table: jax.Array,
    lengths: jax.Array,
    selection: Selection,
    heads: Heads,
    *,
    scale: float,
    return_lse: bool = False,
) -> jax.Array:
    """See `xla.decode.sparse_decode`."""
    if return_lse:
        raise NotImplementedError("mosaic_tpu returns no log-sum-exp")
    page_size = kv.page_size
    used = (lengths + page_size - 1) // page_size
    inside = (selection.pages >= 0) & (selection.pages < used[:, None, None])
    count = jnp.sum(inside, axis=-1, dtype=jnp.int32)
    # Ids ascend, so that only the last one can be the row's last page, which may be partial.
    last = jnp.any(selection.pages == used[:, None, None] - 1, axis=-1) & (count > 0)
    missing = (used * page_size - lengths)[:, None]
    tokens = count * page_size - jnp.where(last, missing, 0)
    return attend(q, kv.data, page_table, tokens, selection.pages, heads, scale=scale, page_scores=None)[0]
