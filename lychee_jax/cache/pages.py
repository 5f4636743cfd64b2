"""The paged KV cache: one pool of pages a layer, and a table that says which pages a sequence owns.

A pool is a `KVPages`: `data [num_pages, K, page_size, 2H]`, keys in `[..., :H]`, values in `[..., H:]`, or words of
8-bit keys and values. Its last B pages are scratch: row b of a batch writes to page `num_pages − B + b` when it is not
active, so that no write needs a branch.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Int32

from lychee_jax.config import ModelConfig
from pallas_kernels import KVPages
from pallas_kernels.types import KVDtype
from pallas_kernels.xla.quantized import quantize_kv

# One pool a layer. Programs get them donated and give them back.
Pools = tuple[KVPages, ...]


def make_pools(
    config: ModelConfig, num_pages: int, page_size: int, dtype: DTypeLike, kv_dtype: KVDtype | None = None
) -> Pools:
    """Zeroed pools, one a layer: of numbers in `dtype`, or of 8-bit numbers."""

    def pool() -> KVPages:
        shape = (num_pages, config.num_kv_heads, page_size)
        if kv_dtype is None:
            return KVPages(jnp.zeros((*shape, 2 * config.head_dim), dtype))
        scales = jnp.zeros((*shape[:2], 2 * page_size), jnp.float32) if kv_dtype == "int8" else None
        return KVPages(jnp.zeros((*shape, config.head_dim), jnp.uint16), scales)

    return tuple(pool() for _ in range(config.num_layers))


def _stored(pool: KVPages, kv: Float[Array, "*lead HH"]) -> tuple[jax.Array, jax.Array | None]:
    """Keys and values as the pool holds them, and their scales `[*lead, 2]` if it has any."""
    return (kv.astype(pool.data.dtype), None) if pool.quantized is None else quantize_kv(kv, pool.quantized)


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
    where = page[:, None], heads[None, :], offset[:, None]
    return _write(pool, where, *_stored(pool, kv), mode="promise_in_bounds")


def _write(
    pool: KVPages,
    where: tuple[Int[Array, "..."], Int[Array, "..."], Int[Array, "..."]],
    data: jax.Array,
    scales: jax.Array | None,
    mode: Literal["promise_in_bounds", "drop"],
) -> KVPages:
    """Write tokens at `where`: page, head and offset of each."""
    written = pool.data.at[where].set(data, unique_indices=True, mode=mode)
    if pool.scales is None:
        return KVPages(written)
    page, head, offset = (index[..., None] for index in where)
    both = offset + pool.page_size * jnp.arange(2, dtype=jnp.int32)
    return KVPages(written, pool.scales.at[page, head, both].set(scales, unique_indices=True, mode=mode))


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
    stored, scales = _stored(pool, kv)
    tiles = stored.reshape(batch, pages, page_size, kv_heads, width).transpose(0, 1, 3, 2, 4)
    heads = jnp.arange(kv_heads, dtype=jnp.int32)
    data = pool.data.at[page[:, :, None], heads].set(tiles, unique_indices=True, mode="drop")
    if pool.scales is None or scales is None:
        return KVPages(data)
    rows = scales.reshape(batch, pages, page_size, kv_heads, 2).transpose(0, 1, 3, 4, 2)
    rows = rows.reshape(batch, pages, kv_heads, 2 * page_size)
    return KVPages(data, pool.scales.at[page[:, :, None], heads].set(rows, unique_indices=True, mode="drop"))


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
    where = page[:, :, None], heads, (position % page_size)[:, :, None]
    return _write(pool, where, *_stored(pool, kv), mode="drop")


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


def cache_bytes(
    config: ModelConfig, num_pages: int, page_size: int, dtype: DTypeLike, kv_dtype: KVDtype | None = None
) -> int:
    """Device memory of all pools, in bytes."""
    pools = jax.eval_shape(lambda: make_pools(config, num_pages, page_size, dtype, kv_dtype))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pools))
