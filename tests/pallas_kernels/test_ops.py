"""The ops against the float64 oracle, over pools that hold NaN wherever nothing was ever written."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import pallas_kernels as ops
from pallas_kernels import KVPages, Selection, SelectionSpec, dispatch
from pallas_kernels.xla import decode
from pallas_kernels.xla.config import XlaConfig
from tests.support import oracle
from tests.support.paged_caches import (
    BUDGET,
    KV_HEADS,
    PAGES,
    SHAPES,
    Cache,
    Shape,
    make_cache,
    padded,
    run,
    some_pages,
    spec_of,
)


@pytest.mark.parametrize(
    ("shape", "kind"), [(SHAPES[0], "max"), (SHAPES[2], "lse"), (SHAPES[4], "max"), (SHAPES[5], "lse")], ids=str
)
def test_dense_decode_and_its_page_scores(shape: Shape, kind: str) -> None:
    heads = [2, 0] if kind == "max" else [1]
    cache = make_cache(shape)
    out, scores = run(ops.dense_decode, *cache.arrays, jnp.array(heads, jnp.int32), scale=shape.scale, page_scores=kind)
    want, want_scores = oracle.dense_decode(
        cache.q, cache.kv_pages, cache.page_table, cache.lengths, heads, scale=shape.scale, score=kind
    )
    assert out.dtype == cache.q.dtype
    assert scores.dtype == jnp.float32
    assert scores.shape == (len(cache.lengths), len(heads), PAGES)
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=shape.tolerance)
    for b, row in enumerate(want_scores):
        for r, head in enumerate(row):
            np.testing.assert_allclose(scores[b, r, : len(head)], head, atol=5e-5, rtol=1e-5)


def test_dense_decode_without_scores_and_sparse_decode_of_all_pages_are_the_same_attention() -> None:
    shape = SHAPES[2]
    cache = make_cache(shape)
    heads = jnp.array([0, 2], jnp.int32)
    scored, _ = run(ops.dense_decode, *cache.arrays, heads, scale=shape.scale, page_scores="max")
    plain, nothing = run(ops.dense_decode, *cache.arrays, heads, scale=shape.scale)
    assert nothing is None
    np.testing.assert_allclose(plain, scored, atol=1e-6)
    every = [[list(range(oracle.page_count(int(n), shape.page_size)))] * KV_HEADS for n in cache.lengths]
    sparse = run(ops.sparse_decode, *cache.arrays, padded(every, PAGES), heads, scale=shape.scale)
    np.testing.assert_allclose(sparse, scored, atol=1e-6)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[5]], ids=str)
def test_sparse_decode_reads_the_selected_pages_only(shape: Shape) -> None:
    heads = [1, 2]
    cache = make_cache(shape)
    pages = some_pages(cache, shape.page_size)
    got = run(ops.sparse_decode, *cache.arrays, padded(pages, BUDGET), jnp.array(heads, jnp.int32), scale=shape.scale)
    want = oracle.sparse_decode(
        cache.q, cache.kv_pages, cache.page_table, cache.lengths, pages, heads, scale=shape.scale
    )
    assert got.dtype == cache.q.dtype
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=shape.tolerance)


def check_lse(lse: np.ndarray, cache: Cache, shape: Shape, b: int, head: int, pages: list[int]) -> None:
    """Of the query heads of one KV head over some pages; MASKED where there are no positions."""
    length = int(cache.lengths[b])
    k, _ = oracle.read_cache(cache.kv_pages, cache.page_table, b, length, head)
    k = k[[j for j in range(length) if j // shape.page_size in pages]]
    if len(k) == 0:
        np.testing.assert_array_equal(lse, np.float32(ops.MASKED))
    else:
        np.testing.assert_allclose(
            lse, oracle.log_sum_exp(cache.q[b, head].astype(np.float64), k, shape.scale), atol=5e-5
        )


@pytest.mark.parametrize("heads", [[2, -1, 0], [-1, 1, -1]], ids=str)
def test_log_sum_exps_and_heads_of_nothing(heads: list[int]) -> None:
    """At length 0, at every edge of a page, for the whole cache and for selected pages."""
    shape = SHAPES[1]
    cache = make_cache(shape, seed=2)
    pages, named = some_pages(cache, shape.page_size), jnp.array(heads, jnp.int32)
    out, scores, lse = run(
        ops.dense_decode, *cache.arrays, named, scale=shape.scale, page_scores="max", return_lse=True
    )
    assert lse.dtype == jnp.float32
    assert lse.shape == out.shape[:3]
    real = [head for head in heads if head >= 0]
    want, want_scores = oracle.dense_decode(
        cache.q, cache.kv_pages, cache.page_table, cache.lengths, real, scale=shape.scale
    )
    picked, picked_lse = run(
        ops.sparse_decode, *cache.arrays, padded(pages, BUDGET), named, scale=shape.scale, return_lse=True
    )
    want_picked = oracle.sparse_decode(
        cache.q, cache.kv_pages, cache.page_table, cache.lengths, pages, real, scale=shape.scale
    )
    for r, head in enumerate(heads):
        if head < 0:
            for zero in (out[:, r], picked[:, r]):
                np.testing.assert_array_equal(zero, 0.0)
            for nothing in (lse[:, r], picked_lse[:, r]):
                np.testing.assert_array_equal(nothing, np.float32(ops.MASKED))
            continue
        index = real.index(head)
        np.testing.assert_allclose(out[:, r], want[:, index], atol=shape.tolerance)
        np.testing.assert_allclose(picked[:, r], want_picked[:, index], atol=shape.tolerance)
        for b in range(len(cache.lengths)):
            found = want_scores[b][index]
            np.testing.assert_allclose(scores[b, r, : len(found)], found, atol=5e-5, rtol=1e-5)
            check_lse(lse[b, r], cache, shape, b, head, list(range(PAGES)))
            check_lse(picked_lse[b, r], cache, shape, b, head, pages[b][head])


def test_two_halves_of_a_cache_merge_to_the_whole() -> None:
    shape, half = SHAPES[1], PAGES // 2
    q, kv, table, lengths = make_cache(shape, seed=3).arrays
    heads, first = np.arange(KV_HEADS, dtype=np.int32), half * shape.page_size
    call = functools.partial(ops.dense_decode, heads=heads, scale=shape.scale, return_lse=True, implementation="xla")
    dense = functools.partial(jax.jit(call), q, kv)
    whole, _, whole_lse = dense(table, lengths)
    parts = [
        dense(table[:, :half], jnp.minimum(lengths, first)),
        dense(table[:, half:], jnp.maximum(lengths - first, 0)),
    ]
    lse = jnp.logaddexp(parts[0][2], parts[1][2])
    merged = sum(out * jnp.exp(part - lse)[..., None] for out, _, part in parts)
    np.testing.assert_allclose(merged, whole, atol=1e-5)
    np.testing.assert_allclose(lse, whole_lse, rtol=1e-6)


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_the_size_of_a_block_changes_nothing(block: int) -> None:
    shape = SHAPES[1]
    cache, heads = make_cache(shape, seed=4), np.array([2, 0], np.int32)
    want, want_scores = oracle.dense_decode(
        cache.q, cache.kv_pages, cache.page_table, cache.lengths, heads.tolist(), scale=shape.scale
    )
    result: Any = decode.dense_decode(
        *cache.arrays, heads, scale=shape.scale, page_scores="max", config=XlaConfig(decode_block=block)
    )
    out, scores = result
    np.testing.assert_allclose(out, want, atol=shape.tolerance)
    for b, row in enumerate(want_scores):
        np.testing.assert_allclose(scores[b, :, : len(row[0])], np.array(row), atol=5e-5, rtol=1e-5)


def check_hybrid(shape: Shape, cache: Cache, heads: list[int], rule: oracle.Rule) -> None:
    pages = some_pages(cache, shape.page_size, rule.budget)
    out, selection = run(
        ops.hybrid_decode,
        *cache.arrays,
        padded(pages, rule.budget),
        jnp.array(heads, jnp.int32),
        spec=spec_of(rule),
        scale=shape.scale,
    )
    want, handed, margin = oracle.hybrid_decode(
        cache.q, cache.kv_pages, cache.page_table, cache.lengths, pages, heads, rule, scale=shape.scale
    )
    assert margin > 1e-4, "another seed: this one decides by rounding"
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=shape.tolerance)
    expected = padded(handed, rule.budget)
    np.testing.assert_array_equal(selection.pages, expected.pages)
    np.testing.assert_array_equal(selection.counts, expected.counts)


@pytest.mark.parametrize(
    ("shape", "heads"),
    list(zip(SHAPES, [[0], [2, 1], [1], [2], [0, 2], [1], [2, 0]], strict=True)),
    ids=str,
)
def test_hybrid_decode_mixes_the_roles_of_a_layer(shape: Shape, heads: list[int]) -> None:
    check_hybrid(shape, make_cache(shape, seed=1), heads, oracle.Rule(BUDGET, 1, 1))


@pytest.mark.parametrize("heads", [[], [0, 1, 2]], ids=["none retrieves", "all retrieve"])
def test_hybrid_decode_of_one_role_alone(heads: list[int]) -> None:
    check_hybrid(SHAPES[1], make_cache(SHAPES[1]), heads, oracle.Rule(BUDGET, 1, 1))


@pytest.mark.parametrize(
    "rule",
    [oracle.Rule(BUDGET, 1, 1, "top_p", 0.9, "lse"), oracle.Rule(BUDGET, 1, 1, page_score="lse")],
    ids=lambda rule: rule.name,
)
def test_hybrid_decode_by_attention_mass(rule: oracle.Rule) -> None:
    check_hybrid(SHAPES[1], make_cache(SHAPES[1]), [2, 0], rule)


def test_hybrid_decode_over_more_pages_than_one_pass_holds() -> None:
    """A long cache and a wide selection, so that an implementation that goes block by block needs several."""
    shape = Shape(64, 8, 2)
    cache = make_cache(shape, lengths=[18 * 64 + 5, 39 * 64, 64])
    check_hybrid(shape, cache, [1], oracle.Rule(20, 1, 2))


def test_hybrid_decode_with_padded_heads_in_every_position() -> None:
    """Known while tracing or not, heads of −1 change nothing: the layer is that of the heads beside them."""
    shape, rule = SHAPES[1], oracle.Rule(BUDGET, 1, 1)
    cache = make_cache(shape, seed=1)
    pages = some_pages(cache, shape.page_size)
    inherited = padded(pages, BUDGET)
    layer = functools.partial(ops.hybrid_decode, spec=spec_of(rule), scale=shape.scale, implementation="xla")
    traced = jax.jit(layer)
    for heads in ([1, -1, -1], [-1, 1, -1], [-1, -1, 1], [2, -1, 0], [-1, 0, 2], [-1, -1, -1], [2, 0, 1]):
        real = [head for head in heads if head >= 0]
        want, handed, margin = oracle.hybrid_decode(
            cache.q, cache.kv_pages, cache.page_table, cache.lengths, pages, real, rule, scale=shape.scale
        )
        assert margin > 1e-4, "another seed: this one decides by rounding"
        results = [traced(*cache.arrays, inherited, jnp.array(heads, jnp.int32))]
        if heads == [2, -1, 0]:
            results.append(layer(*cache.arrays, inherited, np.array(heads, np.int32)))
        for out, selection in results:
            np.testing.assert_allclose(out, want, atol=shape.tolerance)
            expected = padded(handed, BUDGET)
            np.testing.assert_array_equal(selection.pages, expected.pages)
            np.testing.assert_array_equal(selection.counts, expected.counts)


@pytest.mark.parametrize("heads", [[1], [], [0, 1, 2]], ids=["one retrieves", "none retrieves", "all retrieve"])
def test_dense_rows_beside_hybrid_ones(heads: list[int]) -> None:
    """Every combination of flags: a dense row is `dense_decode`'s to the bit, no row depends on another's flag."""
    shape, spec = SHAPES[1], SelectionSpec(BUDGET, 1, 1)
    page = shape.page_size
    cache = make_cache(shape, lengths=[0, page + 1, 6 * page, 5 * page - 1])
    inherited = padded(some_pages(cache, page), BUDGET)
    every = np.arange(KV_HEADS, dtype=np.int32)
    full, _ = run(ops.dense_decode, *cache.arrays, heads=every, scale=shape.scale)
    call = functools.partial(
        ops.hybrid_decode, heads=np.array(heads, np.int32), spec=spec, scale=shape.scale, implementation="xla"
    )
    plain, handed = jax.jit(call)(*cache.arrays, inherited)
    flagged = jax.jit(lambda dense: call(*cache.arrays, inherited, dense=dense))
    for flags in itertools.product([False, True], repeat=len(cache.lengths)):
        dense = np.array(flags)
        out, selection = flagged(jnp.asarray(dense))
        np.testing.assert_array_equal(out[dense], full[dense])
        np.testing.assert_array_equal(out[~dense], plain[~dense])
        np.testing.assert_array_equal(selection.pages[~dense], handed.pages[~dense])
        np.testing.assert_array_equal(selection.counts[~dense], handed.counts[~dense])
        ids, used = np.asarray(selection.pages), -(-cache.lengths // page)
        assert ((ids >= -1) & (ids < used[:, None, None])).all()
        np.testing.assert_array_equal((ids >= 0).sum(axis=-1), selection.counts)


def test_a_named_implementation_runs_or_raises() -> None:
    shape = SHAPES[1]
    args = (*make_cache(shape).arrays, jnp.array([0], jnp.int32))
    with pytest.raises(NotImplementedError, match="mosaic_tpu"):
        ops.dense_decode(*args, scale=shape.scale, implementation="mosaic_tpu")
    with pytest.raises(NotImplementedError, match="Hopper"):
        ops.dense_decode(*args, scale=shape.scale, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="xla"):
        ops.dense_decode(*args, scale=shape.scale, implementation="triton")
    with pytest.raises(ValueError, match="no kernels to interpret"), ops.interpreted("xla"):
        pass


def test_without_a_name_a_refusal_falls_back_and_an_error_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES[1]
    args = (*make_cache(shape).arrays, jnp.array([0], jnp.int32))
    error: Exception = NotImplementedError("mosaic_tpu: no such head_dim")

    def refuse(*_: Any, **__: Any) -> Any:
        raise error

    def trace(**options: Any) -> None:
        jax.eval_shape(functools.partial(ops.dense_decode, scale=shape.scale, **options), *args)

    monkeypatch.setitem(dispatch._OPS, "mosaic_tpu", {"dense_decode": refuse})
    monkeypatch.setitem(dispatch._PREFERENCE, jax.default_backend(), ("mosaic_tpu", "xla"))
    with ops.recorded() as calls:
        trace()
    assert calls == [("dense_decode", "xla")]
    with pytest.raises(NotImplementedError, match="head_dim"):
        trace(implementation="mosaic_tpu")
    error = ValueError("bad input")
    with pytest.raises(ValueError, match="bad input"):
        trace()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kv": (9, 2, 4, 16)}, "kv.data"),
        ({"kv": (9, 3, 4, 15)}, "kv.data"),
        ({"page_table": (3, 5)}, "rows"),
        ({"lengths": (1,)}, "rows"),
        ({"heads": (4,)}, "heads"),
        ({"dense": (3,)}, "rows"),
        ({"budget_pages": 0}, "budget"),
        ({"budget_pages": 5}, "room for 4 pages"),
        ({"sink_pages": -1}, "sink"),
        ({"recent_pages": -1}, "recent"),
        ({"sink_pages": 3, "recent_pages": 2}, "forced"),
    ],
    ids=str,
)
def test_bad_input_is_a_value_error(wrong: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As a user has it: without the tests' import hook, only the ops' own checks stand.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    shapes = {"q": (2, 3, 1, 8), "kv": (9, 3, 4, 16), "page_table": (2, 5), "lengths": (2,), "heads": (1,)}
    shapes["dense"] = (2,)
    shapes |= {name: shape for name, shape in wrong.items() if name in shapes}
    q, kv = jnp.zeros(shapes["q"]), KVPages(jnp.zeros(shapes["kv"]))
    ints: dict[str, Any] = {name: jnp.zeros(shapes[name], jnp.int32) for name in ("page_table", "lengths", "heads")}
    selection = Selection(jnp.zeros((2, 3, 4), jnp.int32), jnp.zeros((2, 3), jnp.int32))
    policy: dict[str, Any] = {"budget_pages": 4, "sink_pages": 1, "recent_pages": 1}
    policy |= {name: value for name, value in wrong.items() if name in policy}
    with pytest.raises(ValueError, match=message):
        ops.hybrid_decode(
            q,
            kv,
            **ints,
            selection=selection,
            spec=SelectionSpec(**policy),
            scale=1.0,
            dense=jnp.zeros(shapes["dense"], bool),
        )
