"""`sparse_decode` on TPU: the pages that a selection names, each fetched by its id."""

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_tpu.attend import attend
from pallas_kernels.mosaic_tpu.config import TpuConfig
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
    dense: jax.Array | None = None,
    config: TpuConfig = TpuConfig(),
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """See `xla.decode.sparse_decode`. Rows in `dense [B]` read all of their pages, whatever the selection says."""
    num_tokens = selected_tokens(lengths, selection.pages, kv.page_size)
    if dense is not None:
        num_tokens = jnp.where(dense[:, None], lengths[:, None], num_tokens)
    out, _, lse = attend(
        q, kv, page_table, num_tokens, selection.pages, heads, scale=scale, return_lse=return_lse, dense=dense,
        config=config,
    )  # fmt: skip
    return out if lse is None else (out, lse)


def selected_tokens(lengths: jax.Array, pages: jax.Array, page_size: int) -> jax.Array:
    """How many tokens the selected `pages [B, K, M]` have: `[B, K]`."""
    used = ((lengths + page_size - 1) // page_size)[:, None, None]
    count = jnp.sum((pages >= 0) & (pages < used), axis=-1, dtype=jnp.int32)
    # Ids ascend, so that only the last one can be the row's last page, which may be partial.
    last = jnp.any(pages == used - 1, axis=-1) & (count > 0)
    missing = used[..., 0] * page_size - lengths[:, None]
    return count * page_size - jnp.where(last, missing, 0)
