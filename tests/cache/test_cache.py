"""The paged cache: layouts, appends at every page edge, scratch pages."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lychee_jax.cache.allocator import pages_for
from lychee_jax.cache.pages import append_pages, append_token, append_tokens, cache_bytes, copy_pages, make_pools
from lychee_jax.config import ModelConfig
from pallas_kernels import KVPages
from tests.support import quantized

KV_HEADS, PAGE, WIDTH = 2, 4, 8


def _pool(num_pages):
    return KVPages(jnp.full((num_pages, KV_HEADS, PAGE, WIDTH), jnp.nan, jnp.float32))


def _rows(pool, table, row, count):
    """Positions 0 … count−1 of a row, read back `[count, K, 2H]`."""
    pages = np.asarray(pool.data)[np.asarray(table)[row, : pages_for(count, PAGE)]]
    return pages.transpose(0, 2, 1, 3).reshape(-1, KV_HEADS, WIDTH)[:count]


def _table(*pages):
    """Rows of pages; entries past a row's own are never followed."""
    table = np.zeros((len(pages), 4), np.int32)
    for row, owned in enumerate(pages):
        table[row, : len(owned)] = owned
    return table


@pytest.mark.parametrize("append", ["token", "tokens"])
def test_tokens_land_where_the_table_says(append):
    rng = np.random.default_rng(0)
    # Pages in no order; the last three are the rows' scratch pages.
    table = jnp.asarray(_table([5, 0, 3], [1, 7], [6, 2, 4]))
    pool = _pool(11)
    counts = np.asarray([9, 0, 12])
    kv = rng.normal(size=(3, 12, KV_HEADS, WIDTH)).astype(np.float32)
    if append == "token":
        for t in range(12):
            active = jnp.asarray(t < counts)
            positions = jnp.asarray(np.minimum(t, np.maximum(counts - 1, 0)), jnp.int32)
            pool = jax.jit(append_token)(pool, table, positions, active, jnp.asarray(kv[:, t]))
    else:
        for first, size in ((0, 5), (5, 2), (7, 5)):
            many = np.clip(counts - first, 0, size).astype(np.int32)
            starts = np.full(3, first, np.int32)
            pool = jax.jit(append_tokens)(
                pool, table, jnp.asarray(starts), jnp.asarray(many), jnp.asarray(kv[:, first : first + size])
            )
    for row in (0, 2):
        np.testing.assert_array_equal(_rows(pool, table, row, int(counts[row])), kv[row, : counts[row]])
    assert np.isnan(np.asarray(pool.data)[[1, 7]]).all(), "an inactive row's own pages stay untouched"


def test_whole_pages_are_written_up_to_the_count_only():
    rng = np.random.default_rng(1)
    owned = _table([0, 1, 2, 3], [11, 10, 9, 8], [4, 6, 5, 7])
    table = jnp.asarray(owned)
    counts = np.asarray([8, 1, 0], np.int32)
    kv = rng.normal(size=(3, 8, KV_HEADS, WIDTH)).astype(np.float32)
    starts = jnp.asarray([4, 8, 0], jnp.int32)
    pool = jax.jit(append_pages)(_pool(15), table, starts, jnp.asarray(counts), jnp.asarray(kv))
    np.testing.assert_array_equal(_rows(pool, table, 0, 12)[4:], kv[0])
    np.testing.assert_array_equal(_rows(pool, table, 1, 9)[8:], kv[1, :1])
    written = {0: [1, 2], 1: [2], 2: []}
    for row, pages in written.items():
        others = [page for index, page in enumerate(owned[row]) if index not in pages]
        assert np.isnan(np.asarray(pool.data)[others]).all()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("append", ["token", "tokens", "pages"])
def test_quantised_tokens_land_there_too_with_their_scales(append, kind):
    rng = np.random.default_rng(4)
    table, counts = jnp.asarray(_table([5, 0, 3], [1, 7], [6, 2, 4])), np.asarray([9, 0, 12], np.int32)
    config = ModelConfig("llama", 8, 8, 8, 1, KV_HEADS, KV_HEADS, WIDTH // 2, 64)
    (pool,) = make_pools(config, 11, PAGE, jnp.bfloat16, kind)
    untouched = jax.tree.map(np.array, pool)
    kv = rng.normal(size=(3, 12, KV_HEADS, WIDTH)).astype(jnp.bfloat16)
    starts = np.zeros(3, np.int32)
    if append == "token":
        for t in range(12):
            positions = jnp.asarray(np.minimum(t, np.maximum(counts - 1, 0)), jnp.int32)
            pool = jax.jit(append_token)(pool, table, positions, jnp.asarray(t < counts), jnp.asarray(kv[:, t]))
    else:
        write = jax.jit(append_pages if append == "pages" else append_tokens)
        pool = write(pool, table, jnp.asarray(starts), jnp.asarray(counts), jnp.asarray(kv))
    assert pool.quantized == kind
    for row in (0, 2):
        count = int(counts[row])
        keys, values = (quantized.store(half, kind) for half in np.split(kv[row, :count], 2, axis=-1))
        pages = np.asarray(table)[row, : pages_for(count, PAGE)]
        words = np.asarray(pool.data)[pages].transpose(0, 2, 1, 3).reshape(-1, KV_HEADS, WIDTH // 2)[:count]
        np.testing.assert_array_equal(words, keys.bytes + 256 * values.bytes.astype(np.uint16))
        if pool.scales is not None:
            scales = np.asarray(pool.scales)[pages].reshape(-1, KV_HEADS, 2, PAGE)
            scales = scales.transpose(2, 0, 3, 1).reshape(2, -1, KV_HEADS)[:, :count]
            np.testing.assert_array_equal(scales, [keys.scales, values.scales])
    for was, now in zip(jax.tree.leaves(untouched), jax.tree.leaves(pool), strict=True):
        np.testing.assert_array_equal(now[jnp.asarray([1, 7])], was[[1, 7]])


def test_a_quantised_cache_takes_half_the_memory_and_its_scales():
    config = ModelConfig("llama", 64, 64, 64, 3, 4, 2, 128, 64)
    plain = cache_bytes(config, 10, 64, "bfloat16")
    assert plain == 3 * 10 * 2 * 64 * 256 * 2
    assert cache_bytes(config, 10, 64, "float32", "fp8") == plain // 2
    assert cache_bytes(config, 10, 64, "bfloat16", "int8") == plain // 2 + 3 * 10 * 2 * 2 * 64 * 4


def _random_pools(num_pages, layers=2):
    rng = np.random.default_rng(2)
    return tuple(
        KVPages(
            jnp.asarray(rng.normal(size=(num_pages, KV_HEADS, PAGE, WIDTH)), jnp.float32),
            jnp.asarray(rng.normal(size=(num_pages, KV_HEADS, 2 * PAGE)), jnp.float32),
        )
        for _ in range(layers)
    )


@pytest.mark.parametrize(
    ("pairs", "copied"),
    [
        ([(2, 4), (1, 6)], {4: 2, 6: 1}),
        ([(2, 4), (-1, 0), (5, -1), (3, 8), (8, 3), (0, 7)], {4: 2, 7: 0}),  # only ids of the pool count
        ([(0, 1), (1, 0)], {0: 1, 1: 0}),  # all are read before one is written
        ([(3, 3), (3, 5)], {5: 3}),
        ([(-1, -1)], {}),
    ],
    ids=str,
)
def test_copied_pages_and_no_others_change(pairs, copied):
    before = [jax.tree.map(np.array, pool) for pool in _random_pools(8)]
    sources, targets = (jnp.asarray(ids, jnp.int32) for ids in zip(*pairs, strict=True))
    after = jax.jit(copy_pages, donate_argnums=0)(_random_pools(8), sources, targets)
    for old, new in zip(before, after, strict=True):
        for index in range(8):
            for was, now in zip(old, new, strict=True):
                np.testing.assert_array_equal(now[index], was[copied.get(index, index)])


def test_pages_are_copied_in_place():
    pools = _random_pools(512)
    ids = jax.ShapeDtypeStruct((3,), jnp.int32)
    compiled = jax.jit(copy_pages, donate_argnums=0).lower(pools, ids, ids).compile()
    memory: Any = compiled.memory_analysis()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(pools))
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size // 8
