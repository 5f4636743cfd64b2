"""`extend_attention` in plain JAX against the float64 oracle: every edge of a page, NaN in what is not to be read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from pallas_kernels import KVPages
from pallas_kernels.xla import prefill
from pallas_kernels.xla.config import XlaConfig
from tests.support import oracle
from tests.support.paged_caches import KV_HEADS, Shape, make_cache, run

SHAPE, LENGTH = Shape(4, 16, 2), 8
STARTS, COUNTS = [0, 4, 7, 12, 24], [8, 5, 8, 0, 1]


def make_chunk(padding: float) -> tuple[list[jax.Array | KVPages], list[np.ndarray]]:
    """Arguments of the op, `padding` in all tokens past the counts, and what the oracle makes of the real ones."""
    rng = np.random.default_rng(0)
    ends = [start + count for start, count in zip(STARTS, COUNTS, strict=True)]
    cache = make_cache(SHAPE, lengths=ends)
    q = 2 * rng.standard_normal((len(ends), LENGTH, KV_HEADS, SHAPE.group, SHAPE.head_dim), np.float32)
    kv = np.full((len(ends), LENGTH, KV_HEADS, 2 * SHAPE.head_dim), padding, np.float32)
    for b, (start, count) in enumerate(zip(STARTS, COUNTS, strict=True)):
        q[b, count:] = padding
        for t in range(count):
            page = cache.page_table[b, (start + t) // SHAPE.page_size]
            kv[b, t] = cache.kv_pages[page, :, (start + t) % SHAPE.page_size]
    starts, counts = np.array(STARTS, np.int32), np.array(COUNTS, np.int32)
    want = oracle.extend_attention(q, cache.kv_pages, cache.page_table, starts, counts, scale=SHAPE.scale)
    k, v = np.split(kv, 2, axis=-1)
    pool = KVPages(jnp.asarray(cache.kv_pages))
    return [*map(jnp.asarray, (q, k, v)), pool, *map(jnp.asarray, (cache.page_table, starts, counts))], want


@pytest.mark.parametrize("padding", [0.0, np.nan, np.inf], ids=str)
def test_a_chunk_over_its_past_whatever_the_padding_is(padding: float) -> None:
    args, want = make_chunk(padding)
    out = run(ops.extend_attention, *args, scale=SHAPE.scale)
    assert np.isfinite(out).all()
    for row, got in zip(want, out, strict=True):
        np.testing.assert_allclose(got[: len(row)], row, atol=SHAPE.tolerance)


@pytest.mark.parametrize("block", [1, 9])
def test_the_size_of_a_block_changes_nothing(block: int) -> None:
    args, want = make_chunk(np.nan)
    call = jax.jit(lambda *args: prefill.extend_attention(*args, scale=SHAPE.scale, config=XlaConfig(key_block=block)))
    for row, got in zip(want, call(*args), strict=True):
        np.testing.assert_allclose(got[: len(row)], row, atol=SHAPE.tolerance)


@pytest.mark.parametrize("field", ["decode_block", "key_block", "query_block"])
def test_a_block_of_nothing_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        XlaConfig(**{field: 0})
