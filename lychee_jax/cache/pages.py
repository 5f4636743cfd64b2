"""The paged KV cache: one pool of pages a layer, and a table that says which pages a sequence owns.

A pool is `kv_pages [num_pages, K, page_size, 2H]` (keys in `[..., :H]`, values in `[..., H:]`). Its last B pages are
scratch: row b of a batch writes to page `num_pages − B + b` when it is not active, so that no write needs a branch.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Int32

from lychee_jax.config import ModelConfig


def make_pools(
    config: ModelConfig, num_pages: int, page_size: int, dtype: DTypeLike
) -> tuple[Float[Array, "num_pages K page_size HH"], ...]:
    """Zeroed pools, one a layer."""
    shape = (num_pages, config.num_kv_heads, page_size, 2 * config.head_dim)
    return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))


def append_token(
    kv_pages: Float[Array, "num_pages K page_size HH"],
    page_table: Int[Array, "B P"],
    positions: Int[Array, " B"],
    active: Bool[Array, " B"],
    kv: Float[Array, "B K HH"],
) -> Float[Array, "num_pages K page_size HH"]:
    """Write one token's keys and values for every active row at `positions[b]`; inactive rows write to scratch."""
    num_pages, kv_heads, page_size, _ = kv_pages.shape
    batch = positions.shape[0]
    logical = jnp.minimum(positions // page_size, page_table.shape[1] - 1)
    owned = jnp.take_along_axis(page_table, logical[:, None], axis=1)[:, 0]
    scratch = num_pages - batch + jnp.arange(batch, dtype=jnp.int32)
    page = jnp.where(active, owned, scratch)
    offset = positions % page_size
    # Every leading index is explicit: other forms make XLA copy the whole pool inside a loop.
    heads = jnp.arange(kv_heads, dtype=jnp.int32)
    return kv_pages.at[page[:, None], heads[None, :], offset[:, None]].set(
        kv.astype(kv_pages.dtype), unique_indices=True, mode="promise_in_bounds"
    )


def _past_the_pool(num_pages: int, batch: int, count: int) -> Int32[Array, "B count"]:
    """Ids outside the pool, all different, for writes that are to be dropped."""
    return num_pages + jnp.arange(batch * count, dtype=jnp.int32).reshape(batch, count)


def append_pages(
    kv_pages: Float[Array, "num_pages K page_size HH"],
    page_table: Int[Array, "B P"],
    starts: Int[Array, " B"],
    counts: Int[Array, " B"],
    kv: Float[Array, "B T K HH"],
) -> Float[Array, "num_pages K page_size HH"]:
    """Write whole pages: `starts` and T are multiples of the page size; pages past `starts + counts` are not written.

    Slots of the last page beyond the row's count receive what `kv` holds there, which no reader looks at.
    """
    num_pages, kv_heads, page_size, width = kv_pages.shape
    batch, length = kv.shape[:2]
    pages = length // page_size
    index = jnp.arange(pages, dtype=jnp.int32)
    logical = starts[:, None] // page_size + index
    owned = jnp.take_along_axis(page_table, jnp.minimum(logical, page_table.shape[1] - 1), axis=1)
    page = jnp.where(index * page_size < counts[:, None], owned, _past_the_pool(num_pages, batch, pages))
    tiles = kv.reshape(batch, pages, page_size, kv_heads, width).transpose(0, 1, 3, 2, 4).astype(kv_pages.dtype)
    heads = jnp.arange(kv_heads, dtype=jnp.int32)
    return kv_pages.at[page[:, :, None], heads].set(tiles, unique_indices=True, mode="drop")


def append_tokens(
    kv_pages: Float[Array, "num_pages K page_size HH"],
    page_table: Int[Array, "B P"],
    starts: Int[Array, " B"],
    counts: Int[Array, " B"],
    kv: Float[Array, "B T K HH"],
) -> Float[Array, "num_pages K page_size HH"]:
    """Write `counts[b]` tokens from position `starts[b]` on, wherever that lies in a page."""
    num_pages, kv_heads, page_size, _ = kv_pages.shape
    batch, length = kv.shape[:2]
    index = jnp.arange(length, dtype=jnp.int32)
    position = starts[:, None] + index
    logical = jnp.minimum(position // page_size, page_table.shape[1] - 1)
    owned = jnp.take_along_axis(page_table, logical, axis=1)
    page = jnp.where(index < counts[:, None], owned, _past_the_pool(num_pages, batch, length))
    heads = jnp.arange(kv_heads, dtype=jnp.int32)
    return kv_pages.at[page[:, :, None], heads, (position % page_size)[:, :, None]].set(
        kv.astype(kv_pages.dtype), unique_indices=True, mode="drop"
    )


def cache_bytes(config: ModelConfig, num_pages: int, page_size: int, dtype: DTypeLike) -> int:
    """Device memory of all pools, in bytes."""
    page = config.num_kv_heads * page_size * 2 * config.head_dim * jax.dtypes.canonicalize_dtype(dtype).itemsize
    return config.num_layers * num_pages * page
