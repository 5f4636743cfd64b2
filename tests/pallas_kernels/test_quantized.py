"""Quantised caches in plain JAX: what is stored, and that every op attends to exactly that."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from pallas_kernels import KVPages
from pallas_kernels.types import KVDtype
from pallas_kernels.xla.quantized import keys_and_values, quantize_kv
from tests.support import oracle, quantized
from tests.support.paged_caches import (
    BUDGET,
    KV_HEADS,
    SHAPES,
    Cache,
    Shape,
    make_cache,
    padded,
    run,
    some_pages,
    spec_of,
)

KINDS = ("int8", "fp8")
kinds = pytest.mark.parametrize("kind", KINDS)


def make_quantized(shape: Shape, kind: KVDtype, **options: Any) -> tuple[tuple[Any, ...], Cache]:
    """Arguments of the ops, and the cache of floats that these are to read."""
    cache = make_cache(dataclasses.replace(shape, kv=kind), **options)
    return cache.arrays, cache


@kinds
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_are_rounded_as_the_formats_say(kind: KVDtype, dtype: str) -> None:
    rng = np.random.default_rng(0)
    kv = rng.standard_normal((40, 3, 16)) * 10.0 ** rng.integers(-6, 3, (40, 3, 1))
    kv[:5] = [[[0.0]], [[-0.0]], [[1e-30]], [[448.0]], [[3e4]]]
    kv[5, 0] = [0.5, 1.5, 2.5, 127, -127, 126.5, 0.49, -0.5, 464, 465, 2**-10, 3 * 2**-10, 2**-9, 17, 19, -21]
    kv = np.asarray(kv, jnp.dtype(dtype))
    words, scales = jax.jit(functools.partial(quantize_kv, dtype=kind))(kv)
    assert (scales is None) == (kind == "fp8")
    for index, half in enumerate(np.split(kv, 2, axis=-1)):
        want = quantized.store(half, kind)
        np.testing.assert_array_equal(np.asarray(words) >> 8 * index & 255, want.bytes)
        if scales is not None:
            np.testing.assert_array_equal(scales[..., index], want.scales)
        wide = keys_and_values(words, kind, jnp.dtype(dtype))[index]
        assert wide.dtype == dtype, "a type of 16 bits holds them exactly"
        read = np.asarray(wide, np.float64) * (
            1.0 if scales is None else np.asarray(scales, np.float64)[..., index, None]
        )
        np.testing.assert_array_equal(read, want.read)


@kinds
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_what_is_not_finite_does_not_become_a_number(kind: KVDtype, bad: float) -> None:
    """So that it is an error of the logits, as without quantisation."""
    kv = np.ones((2, 8), np.float32)
    kv[0, 1] = kv[1, 5] = bad
    words, scales = quantize_kv(jnp.asarray(kv), kind)
    key, value = keys_and_values(words, kind, jnp.float32)
    if scales is not None:
        key, value = key * scales[:, :1], value * scales[:, 1:]
    assert np.isnan(key[0, 1])
    assert np.isnan(value[1, 1])
    np.testing.assert_array_equal(key[1], 1.0)
    np.testing.assert_array_equal(value[0], 1.0)


@kinds
@pytest.mark.parametrize(("shape", "score"), [(SHAPES[1], "max"), (SHAPES[5], "lse")], ids=str)
def test_dense_and_sparse_decode(kind: KVDtype, shape: Shape, score: str) -> None:
    arrays, cache = make_quantized(shape, kind)
    heads, named = [2, 0], jnp.array([2, -1, 0], jnp.int32)
    out, scores, lse = run(ops.dense_decode, *arrays, named, scale=shape.scale, page_scores=score, return_lse=True)
    want, want_scores = oracle.dense_decode(
        cache.q, cache.kv_pages, cache.page_table, cache.lengths, heads, scale=shape.scale, score=score
    )
    np.testing.assert_array_equal(out[:, 1], 0.0)
    np.testing.assert_allclose(np.asarray(out, np.float64)[:, ::2], want, atol=shape.tolerance)
    for b, length in enumerate(cache.lengths.tolist()):
        for r, head in enumerate(heads):
            found = want_scores[b][r]
            np.testing.assert_allclose(scores[b, 2 * r, : len(found)], found, atol=5e-5, rtol=1e-5)
            k, _ = oracle.read_cache(cache.kv_pages, cache.page_table, b, length, head)
            total = oracle.log_sum_exp(cache.q[b, head].astype(np.float64), k, shape.scale)
            np.testing.assert_allclose(lse[b, 2 * r], np.maximum(total, ops.MASKED), atol=5e-5)
    pages = some_pages(cache, shape.page_size)
    got = run(ops.sparse_decode, *arrays, padded(pages, BUDGET), jnp.array(heads, jnp.int32), scale=shape.scale)
    want = oracle.sparse_decode(
        cache.q, cache.kv_pages, cache.page_table, cache.lengths, pages, heads, scale=shape.scale
    )
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=shape.tolerance)


@kinds
def test_hybrid_decode_picks_by_what_is_stored(kind: KVDtype) -> None:
    shape, rule = SHAPES[2], oracle.Rule(BUDGET, 1, 1)
    arrays, cache = make_quantized(shape, kind, seed=3)
    pages, retrieval = some_pages(cache, shape.page_size), [1]
    dense = np.arange(len(cache.lengths)) == 2
    out, selection = run(
        ops.hybrid_decode, *arrays, padded(pages, BUDGET), jnp.array(retrieval, jnp.int32), spec=spec_of(rule),
        scale=shape.scale, dense=jnp.asarray(dense),
    )  # fmt: skip
    want, handed, margin = oracle.hybrid_decode(
        cache.q, cache.kv_pages, cache.page_table, cache.lengths, pages, retrieval, rule, scale=shape.scale
    )
    every, _ = oracle.dense_decode(
        cache.q, cache.kv_pages, cache.page_table, cache.lengths, range(KV_HEADS), scale=shape.scale
    )
    assert margin > 1e-4, "another seed: rounding may decide a page"
    for b in np.flatnonzero(~dense):
        np.testing.assert_allclose(out[b], want[b], atol=shape.tolerance)
        for k in range(KV_HEADS):
            count = int(selection.counts[b, k])
            assert selection.pages[b, k, :count].tolist() == handed[b][k]
    np.testing.assert_allclose(out[2], every[2], atol=shape.tolerance)


@kinds
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_chunk_attends_to_what_was_stored_of_it(kind: KVDtype, dtype: str) -> None:
    """Its own keys and values are not looked at, nor is what lies behind it."""
    shape, length = Shape(4, 16, 2, dtype), 8
    starts, counts = np.array([0, 4, 7, 12, 24], np.int32), np.array([8, 5, 8, 0, 1], np.int32)
    (_, kv, table, _), cache = make_quantized(shape, kind, lengths=(starts + counts).tolist())
    q = np.random.default_rng(0).standard_normal((len(starts), length, KV_HEADS, shape.group, shape.head_dim))
    q[np.arange(length) >= counts[:, None]] = np.nan
    q = np.asarray(2 * q, jnp.dtype(dtype))
    unread = jnp.full((len(starts), length, KV_HEADS, shape.head_dim), jnp.nan, jnp.dtype(dtype))
    out = run(ops.extend_attention, jnp.asarray(q), unread, unread, kv, table, starts, counts, scale=shape.scale)
    assert out.dtype == dtype
    assert np.isfinite(np.asarray(out, np.float32)).all()
    want = oracle.extend_attention(q, cache.kv_pages, cache.page_table, starts, counts, scale=shape.scale)
    for row, got in zip(want, np.asarray(out, np.float64), strict=True):
        np.testing.assert_allclose(got[: len(row)], row, atol=shape.tolerance)


def test_scales_belong_to_words_and_fit_them() -> None:
    (q, kv, table, lengths), _ = make_quantized(SHAPES[1], "int8")
    heads = np.array([0], np.int32)
    assert kv.scales is not None
    for wrong in (kv._replace(scales=kv.scales[:, :, 1:]), KVPages(jnp.zeros((*kv.data.shape[:3], 32)), kv.scales)):
        with pytest.raises(ValueError, match="only words of 8-bit numbers"):
            ops.dense_decode(q, wrong, table, lengths, heads, scale=1.0)
