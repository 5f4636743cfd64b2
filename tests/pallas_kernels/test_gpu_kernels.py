"""The GPU kernels against the float64 oracle, run by the GPU interpreter with race detection, and lowered for CUDA.

Lengths sit at the borders of pages and of tiles; NaN is in every slot that must not be read.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import pallas_kernels as ops
from pallas_kernels import KVPages, SelectionSpec
from pallas_kernels.mosaic_gpu.common import compiler_params, targeting
from pallas_kernels.types import KVDtype
from tests.support import oracle
from tests.support.gpu import interpreted, kernels, lower, run, unsigned
from tests.support.paged_caches import Cache, Shape, make_cache, padded, some_pages, spec_of

BF16, F16 = "bfloat16", "float16"
INT8, FP8 = "int8", "fp8"


def as_heads(heads: list[int], known: bool) -> Any:
    """Known while tracing, or not: then the kernels count the heads that are not −1."""
    return np.array(heads, np.int32) if known else jnp.array(heads, jnp.int32)


def log_sum_exp(cache: Cache, row: int, head: int, scale: float, pages: list[int] | None = None) -> np.ndarray:
    """Of the scaled scores of every query head over its cache, or over some pages of it."""
    k, _ = oracle.read_cache(cache.kv_pages, cache.page_table, row, int(cache.lengths[row]), head)
    if pages is not None:
        k = k[[j for j in range(len(k)) if j // cache.kv_pages.shape[2] in pages]]
    q = cache.q[row, head].astype(np.float64)
    return oracle.log_sum_exp(q, k, scale) if len(k) else np.full(len(q), ops.MASKED)


def check_dense(shape: Shape, cache: Cache, heads: list[int], kind: str | None, known: bool = True) -> None:
    out, scores, lse = run(
        ops.dense_decode, *cache.arrays, heads=as_heads(heads, known), scale=shape.scale, page_scores=kind,
        return_lse=True,
    )  # fmt: skip
    real = [place for place, head in enumerate(heads) if head >= 0]
    named = [heads[place] for place in real]
    want, want_scores = oracle.dense_decode(
        cache.q, cache.kv_pages, cache.page_table, cache.lengths, named, scale=shape.scale, score=kind or "max"
    )
    assert out.dtype == cache.q.dtype
    assert out.shape == (len(cache.lengths), len(heads), *cache.q.shape[2:])
    np.testing.assert_allclose(np.asarray(out[:, real], np.float64), want, atol=shape.tolerance)
    others = np.setdiff1d(range(len(heads)), real)
    assert not np.asarray(out[:, others]).any()
    np.testing.assert_array_equal(lse[:, others], np.float32(ops.MASKED))
    for b in range(len(cache.lengths)):
        for place, head in zip(real, named, strict=True):
            np.testing.assert_allclose(lse[b, place], log_sum_exp(cache, b, head, shape.scale), atol=5e-5, rtol=1e-5)
    if kind is None:
        assert scores is None
        return
    assert scores.dtype == jnp.float32
    assert scores.shape == (len(cache.lengths), len(heads), cache.page_table.shape[1])
    for b, row in enumerate(want_scores):
        for place, head in zip(real, row, strict=True):
            np.testing.assert_allclose(scores[b, place, : len(head)], head, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "heads", "kind", "known"),
    [
        (Shape(16, 64, 4, BF16), [2, -1, 0], "max", False),
        (Shape(32, 128, 7, F16), [1], "lse", True),
        (Shape(128, 64, 1, BF16), [-1, 2], "lse", True),
        (Shape(64, 64, 2, F16), [0, 1, 2], None, True),
        (Shape(64, 128, 4, BF16, FP8), [2, -1, 0], "max", False),
        (Shape(32, 64, 8, BF16, INT8), [1], "lse", True),
    ],
    ids=str,
)
def test_dense_decode_at_every_border_of_a_page(shape: Shape, heads: list[int], kind: str | None, known: bool) -> None:
    check_dense(shape, make_cache(shape), heads, kind, known)


@pytest.mark.parametrize(
    ("heads", "kv"),
    [([1], None), ([0, 1, 2], None), ([1], INT8)],
    ids=["a head over all blocks", "heads share blocks", "slots given back before they were multiplied"],
)
def test_more_tiles_than_slots(heads: list[int], kv: KVDtype | None) -> None:
    """Every block's slots are used again, and rows of other lengths end inside a block's share."""
    shape = Shape(64, 128, 4, BF16, kv)
    check_dense(shape, make_cache(shape, lengths=[64 * 40 + 1, 0, 129, 64 * 21]), heads, "max")


def test_more_rows_than_a_block_holds_lengths_of() -> None:
    shape = Shape(16, 64, 2, BF16)
    check_dense(shape, make_cache(shape, lengths=[(7 * b) % 50 for b in range(9)]), [1], "max")


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # NumPy's, inside the interpreter
def test_a_row_of_another_cache_does_not_leak_in() -> None:
    """Infinite values of one row stay in its own output, though rows share a block's memory."""
    shape = Shape(16, 64, 2, BF16)
    cache = make_cache(shape, lengths=[16 * 40, 5])
    cache.kv_pages[cache.page_table[0, 3]] = np.inf
    out, _ = run(ops.dense_decode, *cache.arrays, heads=as_heads([1], known=False), scale=shape.scale)
    assert not np.isfinite(np.asarray(out[0], np.float32)).all()
    want, _ = oracle.dense_decode(
        cache.q[1:], cache.kv_pages, cache.page_table[1:], cache.lengths[1:], [1], scale=shape.scale
    )
    np.testing.assert_allclose(np.asarray(out[1:], np.float64), want, atol=shape.tolerance)


@pytest.mark.parametrize(
    ("shape", "heads", "budget", "known"),
    [
        (Shape(16, 64, 4, BF16), [1, 2], 4, True),
        (Shape(64, 128, 8, BF16), [0], 4, True),
        (Shape(128, 128, 7, F16), [0, 1, 2], 9, True),
        (Shape(32, 64, 1, BF16), [2, -1, 0], 21, False),
        (Shape(16, 64, 4, BF16, FP8), [1], 4, True),
        (Shape(128, 128, 7, F16, INT8), [2, -1], 4, False),
    ],
    ids=str,
)
def test_sparse_decode_reads_the_selected_pages_only(shape: Shape, heads: list[int], budget: int, known: bool) -> None:
    """Selections shorter and longer than a tile, some empty, with and without the row's last page."""
    lengths = None if budget == 4 else [shape.page_size * budget + 1, shape.page_size * 3 - 1, 0]
    cache = make_cache(shape, lengths=lengths)
    pages = some_pages(cache, shape.page_size, budget)
    for b, row in enumerate(pages):  # nothing else may be read
        for p in set(range(oracle.page_count(int(cache.lengths[b]), shape.page_size))).difference(*row):
            if b + 2 < len(pages):  # the last two rows share a page
                cache.kv_pages[cache.page_table[b, p]] = np.nan
    got, lse = run(
        ops.sparse_decode, *cache.arrays, padded(pages, budget), heads=as_heads(heads, known), scale=shape.scale,
        return_lse=True,
    )  # fmt: skip
    assert got.dtype == cache.q.dtype
    for place, head in enumerate(heads):
        if head < 0:
            assert not np.asarray(got[:, place]).any()
            np.testing.assert_array_equal(lse[:, place], np.float32(ops.MASKED))
            continue
        want = oracle.sparse_decode(
            cache.q, cache.kv_pages, cache.page_table, cache.lengths, pages, [head], scale=shape.scale
        )
        np.testing.assert_allclose(np.asarray(got[:, place], np.float64), want[:, 0], atol=shape.tolerance)
        for b, row in enumerate(pages):
            want_lse = log_sum_exp(cache, b, head, shape.scale, row[head])
            np.testing.assert_allclose(lse[b, place], want_lse, atol=5e-5, rtol=1e-5)


def check_select(scores: np.ndarray, counts: list[int], rule: oracle.Rule, page_size: int = 16) -> None:
    """Against the oracle; `counts` are the pages of every row, and what lies past them is NaN."""
    scores = scores.astype(np.float32)
    lengths = [max(0, count * page_size - b % page_size) for b, count in enumerate(counts)]
    for b, count in enumerate(counts):
        scores[b, :, count:] = np.nan
    pages, got = run(
        ops.select_pages, jnp.asarray(scores), jnp.array(lengths, jnp.int32), spec=spec_of(rule), page_size=page_size,
    )  # fmt: skip
    picked = [
        [oracle.pick(head[:count].astype(np.float64), rule) for head in row]
        for row, count in zip(scores, counts, strict=True)
    ]
    assert min(p.margin for row in picked for p in row) > 0.0 or rule.name == "budget"
    expected = padded([[p.pages for p in row] for row in picked], rule.budget)
    np.testing.assert_array_equal(pages, expected.pages)
    np.testing.assert_array_equal(got, expected.counts)


@pytest.mark.filterwarnings("ignore:invalid value encountered in scalar subtract")  # the oracle's margin of ∞ and ∞
@pytest.mark.parametrize("make", ["distinct", "ties", "zeros", "infinite"])
def test_select_pages_is_exact(make: str) -> None:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((5, 2, 300))
    if make == "ties":
        scores = np.round(scores)
    if make == "zeros":  # minus zero ties with zero
        scores = np.where(scores > 0, 0.0, -0.0)
    if make == "infinite":  # and values that bisection must not be led astray by
        scores = np.where(scores > 2, np.inf, np.where(scores < -1, -np.inf, 1e38 * scores))
    check_select(scores, [300, 0, 1, 40, 41], oracle.Rule(40, 2, 3))


@pytest.mark.parametrize("capacity", [64, 1024, 2048, 2112, 4096, 4160])
def test_select_pages_of_every_chunk(capacity: int) -> None:
    """Chunks of 16, 32, 48 and 64 columns, full or padded, and two of them; the last page is taken by its score."""
    rng = np.random.default_rng(capacity)
    scores = np.round(40 * rng.standard_normal((2, 1, capacity))) / 16
    scores[:, :, capacity - 4] = 20
    check_select(scores, [capacity, capacity - 1], oracle.Rule(60, 2, 3))


def test_scores_of_whole_chunks_are_selected_from_in_one_launch() -> None:
    """Nothing is padded before the kernel nor cut off after it."""

    def select(scores: Any, lengths: Any) -> Any:
        return ops.select_pages(scores, lengths, SelectionSpec(64, 2, 4), page_size=64, implementation="mosaic_gpu")

    for capacity, launches in ((2048, 1), (2000, 2)):
        module = lower(
            select, jax.ShapeDtypeStruct((1, 8, capacity), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
        )
        found = sum(module.count(name) for name in ("stablehlo.pad", "stablehlo.slice", "stablehlo.custom_call"))
        assert found == launches


def test_select_pages_of_the_longest_contexts() -> None:
    """More pages than a chunk holds, and more places than one product brings."""
    rng = np.random.default_rng(1)
    check_select(np.round(8 * rng.standard_normal((2, 2, 5000))), [5000, 4097], oracle.Rule(200, 8, 16))


@pytest.mark.parametrize(
    ("name", "amount"), [("ratio", 0.07), ("top_p", 0.6), ("threshold", 0.01), ("forced", 0.0)], ids=str
)
def test_select_pages_by_every_rule(name: str, amount: float) -> None:
    rng = np.random.default_rng(2)
    check_select(2 * rng.standard_normal((2, 2, 90)), [90, 33], oracle.Rule(30, 1, 2, name, amount, "lse"))


@pytest.mark.parametrize(
    ("shape", "heads", "rule", "known", "dense"),
    [
        (Shape(64, 128, 8, BF16), [2, -1], oracle.Rule(4, 1, 1), False, None),
        (Shape(32, 64, 2, F16), [-1], oracle.Rule(4, 1, 1), True, None),
        (Shape(16, 128, 7, F16), [0, 1, 2], oracle.Rule(4, 1, 1, "top_p", 0.9, "lse"), True, None),
        (Shape(16, 64, 2, BF16), [1], oracle.Rule(4, 1, 1), True, [True, False, True, True, False]),
        (Shape(64, 64, 4, F16), [2, -1], oracle.Rule(4, 1, 1), False, [False, True, False, False, True]),
        (Shape(64, 128, 4, BF16, FP8), [2, -1], oracle.Rule(4, 1, 1), False, [False, True, False, False, True]),
        (Shape(32, 64, 7, F16, INT8), [1], oracle.Rule(4, 1, 1, "top_p", 0.9, "lse"), True, None),
    ],
    ids=str,
)
def test_hybrid_decode_mixes_the_roles_of_a_layer(
    shape: Shape, heads: list[int], rule: oracle.Rule, known: bool, dense: list[bool] | None
) -> None:
    """And dense rows beside the others; what these hand up is what they were given."""
    page = shape.page_size
    cache = make_cache(shape, seed=1, lengths=[0, 1, page, 4 * page + page // 2 + 1, 6 * page])
    pages = some_pages(cache, shape.page_size, rule.budget)
    inherited = padded(pages, rule.budget)
    options: dict[str, Any] = {"heads": as_heads(heads, known), "spec": spec_of(rule), "scale": shape.scale}
    if dense is not None:
        options["dense"] = jnp.array(dense)
    out, selection = run(ops.hybrid_decode, *cache.arrays, inherited, **options)
    named = [head for head in heads if head >= 0]
    arrays = cache.q, cache.kv_pages, cache.page_table, cache.lengths
    want, handed, margin = oracle.hybrid_decode(*arrays, pages, named, rule, scale=shape.scale)
    assert margin > 1e-4, "another seed: this one decides by rounding"
    full, _ = oracle.dense_decode(*arrays, range(3), scale=shape.scale)
    for b in np.flatnonzero(dense or []):
        want[b], handed[b] = full[b], pages[b]
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=shape.tolerance)
    expected = padded(handed, rule.budget)
    np.testing.assert_array_equal(selection.pages, expected.pages)
    np.testing.assert_array_equal(selection.counts, expected.counts)


@pytest.mark.parametrize(("batch", "heads"), [(2, []), (0, [1])], ids=["no heads", "no rows"])
def test_nothing_is_asked_for(batch: int, heads: list[int]) -> None:
    q = jnp.ones((batch, 3, 4, 64), jnp.bfloat16)
    pool, table = KVPages(jnp.ones((9, 3, 16, 128), jnp.bfloat16)), jnp.zeros((batch, 4), jnp.int32)
    lengths, named = jnp.full((batch,), 40, jnp.int32), {"heads": as_heads(heads, known=True)}
    selection = ops.Selection(jnp.zeros((batch, 3, 2), jnp.int32), jnp.ones((batch, 3), jnp.int32))
    out, scores = run(ops.dense_decode, q, pool, table, lengths, **named, scale=1.0, page_scores="max")
    assert (out.shape, scores.shape) == ((batch, len(heads), 4, 64), (batch, len(heads), 4))
    out = run(ops.sparse_decode, q, pool, table, lengths, selection, **named, scale=1.0)
    assert out.shape == (batch, len(heads), 4, 64)
    spec = SelectionSpec(2, 0, 0)
    out, handed = run(ops.hybrid_decode, q, pool, table, lengths, selection, **named, spec=spec, scale=1.0)
    assert (out.shape, handed.pages.shape) == (q.shape, selection.pages.shape)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (Shape(3, 64, 4, BF16), "pages of 3"),
        (Shape(16, 32, 4, BF16), "head_dim 32"),
        (Shape(16, 64, 9, BF16), "and 9"),
        (Shape(16, 64, 4), "float32"),
        (Shape(16, 64, 4, kv=FP8), "float32 over fp8"),
        (Shape(16, 64, 4, BF16, INT8), "int8 caches in pages of 32 tokens or more, not of 16"),
    ],
    ids=str,
)
def test_what_the_kernels_do_not_cover_is_refused(shape: Shape, message: str) -> None:
    cache = make_cache(shape, lengths=[5])
    with pytest.raises(NotImplementedError, match=message), targeting("cuda"):
        ops.dense_decode(*cache.arrays, jnp.array([0], jnp.int32), scale=1.0, implementation="mosaic_gpu")


def test_other_machines_are_refused_by_name_and_served_by_xla_otherwise() -> None:
    cache = make_cache(Shape(16, 64, 4, BF16), lengths=[5])
    heads = jnp.array([0], jnp.int32)
    with pytest.raises(NotImplementedError, match="Hopper"):
        ops.dense_decode(*cache.arrays, heads, scale=1.0, implementation="mosaic_gpu")
    with ops.recorded() as calls:
        ops.dense_decode(*cache.arrays, heads, scale=1.0)
    assert calls == [("dense_decode", "xla")]


@pytest.mark.parametrize(
    ("batch", "groups", "head_dim", "page_size", "pages", "dense", "dtype", "kv"),
    [(1, 4, 128, 64, 2048, 1, jnp.bfloat16, None), (4, 4, 128, 64, 3072, 8, jnp.float16, None),
     (20, 7, 128, 16, 512, 2, jnp.bfloat16, None), (6, 1, 64, 128, 8192, 0, jnp.float16, None),
     (2, 8, 64, 32, 32768, 8, jnp.bfloat16, None), (1, 4, 128, 64, 16384, 1, jnp.bfloat16, FP8),
     (20, 7, 64, 16, 512, 2, jnp.float16, FP8), (6, 4, 128, 64, 2048, 1, jnp.bfloat16, INT8),
     (2, 8, 128, 128, 1024, 8, jnp.float16, INT8)],
)  # fmt: skip
def test_kernels_lower_for_cuda(
    batch: int, groups: int, head_dim: int, page_size: int, pages: int, dense: int, dtype: Any, kv: str | None
) -> None:
    """The real shapes: shared memory, TMA boxes, layouts and signs show while lowering, which interpreting does not."""
    heads = np.arange(dense, dtype=np.int32)
    shapes: list[Any] = [
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in [
            ((batch, 8, groups, head_dim), dtype), ((batch, pages), jnp.int32), ((batch,), jnp.int32),
            ((batch, 8, 64), jnp.int32), ((batch, 8), jnp.int32),
        ]
    ]  # fmt: skip
    kind, width = (dtype, 2 * head_dim) if kv is None else (jnp.uint16, head_dim)
    pool = KVPages(
        jax.ShapeDtypeStruct((batch * pages + 1, 8, page_size, width), kind),  # type: ignore[arg-type]
        jax.ShapeDtypeStruct((batch * pages + 1, 8, 2 * page_size), jnp.float32) if kv == INT8 else None,  # type: ignore[arg-type]
    )

    def call(pool: KVPages, q: Any, table: Any, lengths: Any, selected: Any, counts: Any) -> Any:
        return ops.hybrid_decode(
            q, pool, table, lengths, ops.Selection(selected, counts), heads, SelectionSpec(64, 2, 4), scale=0.1,
            implementation="mosaic_gpu",
        )  # fmt: skip

    with ops.recorded() as calls:
        code = kernels(call, pool, *shapes)
    assert set(calls) == {("hybrid_decode", "mosaic_gpu")}
    assert len(code) == 2, "two launches"
    assert unsigned(code) == []


def test_what_only_the_device_knows_lowers_for_cuda() -> None:
    """Dense rows, a number of heads that the kernels count, and log-sum-exps."""
    given: tuple[Any, ...] = tuple(
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in [
            ((2, 8, 4, 128), jnp.bfloat16), ((257, 8, 64, 256), jnp.bfloat16), ((2, 128), jnp.int32), ((2,), jnp.int32),
            ((2, 8, 64), jnp.int32), ((2, 8), jnp.int32), ((2,), jnp.int32), ((2,), jnp.bool_),
        ]
    )  # fmt: skip

    def hybrid(q: Any, pool: Any, table: Any, lengths: Any, pages: Any, counts: Any, heads: Any, dense: Any) -> Any:
        selection, spec = ops.Selection(pages, counts), SelectionSpec(64, 2, 4)
        return ops.hybrid_decode(
            q, KVPages(pool), table, lengths, selection, heads, spec, scale=0.1, dense=dense,
            implementation="mosaic_gpu",
        )  # fmt: skip

    def parts(q: Any, pool: Any, table: Any, lengths: Any, pages: Any, counts: Any, heads: Any, dense: Any) -> Any:
        options = {"scale": 0.1, "return_lse": True, "implementation": "mosaic_gpu"}
        arrays = q, KVPages(pool), table, lengths
        full = ops.dense_decode(*arrays, heads, page_scores="max", **options)
        return full, ops.sparse_decode(*arrays, ops.Selection(pages, counts), heads, **options)

    for call, launches in ((hybrid, 2), (parts, 4)):
        code = kernels(call, *given)
        assert len(code) == launches
        assert unsigned(code) == []


def test_the_warpgroups_that_compute_reduce_in_memory_of_their_own() -> None:
    """In the code for CUDA: a reduction's memory is no reference, so that the interpreter cannot see who shares it."""
    shapes = [
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in [
            ((1, 8, 4, 128), jnp.bfloat16), ((257, 8, 64, 256), jnp.bfloat16), ((1, 256), jnp.int32), ((1,), jnp.int32)
        ]
    ]  # fmt: skip

    def call(q: Any, pool: Any, table: Any, lengths: Any) -> Any:
        heads = np.array([3], np.int32)
        return ops.dense_decode(
            q, KVPages(pool), table, lengths, heads, scale=0.1, page_scores="max", implementation="mosaic_gpu"
        )

    lines = kernels(call, *shapes)[0].splitlines()
    constants = dict(re.findall(r"(%\w+) = arith.constant (\d+) : index", "\n".join(lines)))
    space = compiler_params().reduction_scratch_bytes
    view = re.compile(rf"memref\.view %\w+\[(%\w+)\]\[\] : .* to memref<{space // 4}xf32,")
    places = [(number, int(constants[found[1]])) for number, line in enumerate(lines) if (found := view.search(line))]
    second, first = sorted({place for _, place in places}, reverse=True)
    assert second - first >= space
    order = [place for _, place in places]
    assert order == sorted(order, reverse=True), "each warpgroup has one place"
    # They run side by side: nobody waits for the other one's end.
    assert not any("gpu.barrier" in line for line in lines[places[0][0] :])


@pytest.mark.parametrize("pages", [1000, 20000])
def test_scores_below_zero_are_lower_than_others(pages: int) -> None:
    """In the code for CUDA; whether the interpreter knows is `test_select_pages_is_exact`'s matter."""
    arguments = jax.ShapeDtypeStruct((2, 3, pages), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)

    def call(scores: Any, lengths: Any) -> Any:
        return ops.select_pages(scores, lengths, SelectionSpec(12, 1, 2), page_size=64, implementation="mosaic_gpu")

    code = kernels(call, *arguments)
    assert len(code) == 1
    assert "maxsi" in code[0]
    assert unsigned(code) == []


def test_the_interpreter_sees_a_copy_that_is_not_waited_for() -> None:
    """The judge of the tests above: without it they would pass whatever the kernels' barriers do."""

    def body(source: Any, out: Any, buffer: Any, arrived: Any) -> None:
        plgpu.copy_gmem_to_smem(source, buffer, arrived)
        out[...] = buffer[...]
        plgpu.barrier_wait(arrived)

    with pytest.raises(Exception, match="RACE"), interpreted():
        plgpu.kernel(
            body, out_type=jax.ShapeDtypeStruct((128,), jnp.float32),
            scratch_types=[plgpu.SMEM((128,), jnp.float32), plgpu.Barrier()],
            interpret=plgpu.InterpretGPUParams(detect_races=True),
        )(jnp.ones((128,), jnp.float32))  # fmt: skip
