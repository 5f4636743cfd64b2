"""The paged KV cache: one pool of pages a layer, and a table that says which pages a sequence owns.

A pool is a `KVPages`: `data [num_pages, K, page_size, 2H]`, keys in `[..., :H]`, values in `[..., H:]`. Its last B
pages are scratch: row b of a batch writes to page `num_pages − B + b` when it is not active, so that no write needs a
branch.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Int32

from lychee_jax.config import ModelConfig
from pallas_kernels import KVPages

# One pool a layer. Programs get them donated and give them back.
Pools = tuple[KVPages, ...]


def make_pools(config: ModelConfig, num_pages: int, page_size: int, dtype: DTypeLike) -> Pools:
    """Zeroed pools, one a layer."""
    shape = (num_pages, config.num_kv_heads, page_size, 2 * config.head_dim)
    return tuple(KVPages(jnp.zeros(shape, dtype)) for _ in range(config.num_layers))


def append_token(
    pool: KVPages,
    page_table: Int[Array, "B P"],
    positions: Int[Array, " B"],
    active: Bool[Array, " B"],
    kv: Float[Array, "B K HH"],
) -> KVPages:
    """Write one token's keys and values for every active row at `positions[b]`; inactive rows write to scratch."""
    num_pages, kv_heads, page_size, _ = pool.data.shape
    batch = positions.shape[0]
    logical = jnp.minimum(positions // page_size, page_table.shape[1] - 1)
    owned = jnp.take_along_axis(page_table, logical[:, None], axis=1)[:, 0]
    scratch = num_pages - batch + jnp.arange(batch, dtype=jnp.int32)
    page = jnp.where(active, owned, scratch)
    offset = positions % page_size
    # Every leading index is explicit: other forms make XLA copy the whole pool inside a loop.
    heads = jnp.arange(kv_heads, dtype=jnp.int32)
    data = pool.data.at[page[:, None], heads[None, :], offset[:, None]].set(
        kv.astype(pool.data.dtype), unique_indices=True, mode="promise_in_bounds"
    )
    return pool._replace(data=data)


def _past_the_pool(num_pages: int, batch: int, count: int) -> Int32[Array, "B count"]:
    """Ids outside the pool, all different, for writes that are to be dropped."""
    return num_pages + jnp.arange(batch * count, dtype=jnp.int32).reshape(batch, count)


def append_pages(
    pool: KVPages,
    page_table: Int[Array, "B P"],
    starts: Int[Array, " B"],
    counts: Int[Array, " B"],
    kv: Float[Array, "B T K HH"],
) -> KVPages:
    """Write whole pages: `starts` and T are multiples of the page size; pages past `starts + counts` are not written.

    Slots of the last page beyond the row's count receive what `kv` holds there, which no reader looks at.
    """
    num_pages, kv_heads, page_size, width = pool.data.shape
    batch, length = kv.shape[:2]
    pages = length // page_size
    index = jnp.arange(pages, dtype=jnp.int32)
    logical = starts[:, None] // page_size + index
    owned = jnp.take_along_axis(page_table, jnp.minimum(logical, page_table.shape[1] - 1), axis=1)
    page = jnp.where(index * page_size < counts[:, None], owned, _past_the_pool(num_pages, batch, pages))
    tiles = kv.reshape(batch, pages, page_size, kv_heads, width).transpose(0, 1, 3, 2, 4).astype(pool.data.dtype)
    heads = jnp.arange(kv_heads, dtype=jnp.int32)
    data = pool.data.at[page[:, :, None], heads].set(tiles, unique_indices=True, mode="drop")
    return pool._replace(data=data)


def append_tokens(
    pool: KVPages,
    page_table: Int[Array, "B P"],
    starts: Int[Array, " B"],
    counts: Int[Array, " B"],
    kv: Float[Array, "B T K HH"],
) -> KVPages:
    """Write `counts[b]` tokens from position `starts[b]` on, wherever that lies in a page."""
    num_pages, kv_heads, page_size, _ = pool.data.shape
    batch, length = kv.shape[:2]
    index = jnp.arange(length, dtype=jnp.int32)
    position = starts[:, None] + index
    logical = jnp.minimum(position // page_size, page_table.shape[1] - 1)
    owned = jnp.take_along_axis(page_table, logical, axis=1)
    page = jnp.where(index < counts[:, None], owned, _past_the_pool(num_pages, batch, length))
    heads = jnp.arange(kv_heads, dtype=jnp.int32)
    data = pool.data.at[page[:, :, None], heads, (position % page_size)[:, :, None]].set(
        kv.astype(pool.data.dtype), unique_indices=True, mode="drop"
    )
    return pool._replace(data=data)


def copy_pages(pools: Pools, sources: Int[Array, " n"], targets: Int[Array, " n"]) -> Pools:
    """Copy pool page `sources[i]` to `targets[i]` in every layer: a fork's own copy of a partial page.

    A pair with an id outside the pool, such as −1, is dropped; targets differ. All pages are read before one is
    written. Donate the pools, or all of them are copied.
    """
    num_pages = pools[0].num_pages
    real = (sources >= 0) & (sources < num_pages) & (targets >= 0) & (targets < num_pages)
    source = jnp.where(real, sources, 0)
    target = jnp.where(real, targets, _past_the_pool(num_pages, 1, sources.shape[0])[0])
    return jax.tree.map(lambda pool: pool.at[target].set(pool[source], unique_indices=True, mode="drop"), pools)


def cache_bytes(config: ModelConfig, num_pages: int, page_size: int, dtype: DTypeLike) -> int:
    """Device memory of all pools, in bytes."""
    page = config.num_kv_heads * page_size * 2 * config.head_dim * jax.dtypes.canonicalize_dtype(dtype).itemsize
    return config.num_layers * num_pages * page
