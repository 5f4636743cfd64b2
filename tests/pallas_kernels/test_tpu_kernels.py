"""The TPU kernels against the float64 oracle, run by the TPU interpreter.

Lengths sit at the borders of pages and of the kernel's steps; NaN is in every slot that must not be read.
"""

import contextlib
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import pallas_kernels as ops
from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.cli.main import main
from lychee_jax.config import ModelConfig
from lychee_jax.engine.options import GenerateOptions
from lychee_jax.llm import LLM
from lychee_jax.models.decoder import Decoder
from pallas_kernels import KVPages
from pallas_kernels.mosaic_tpu.config import TpuConfig
from pallas_kernels.types import KVDtype
from tests.support import oracle
from tests.support.hybrid_models import small_chunks
from tests.support.paged_caches import KV_HEADS, Cache, Shape, make_cache, padded, some_pages, spec_of
from tests.support.tpu import interpreted, run

F32, BF16 = "float32", "bfloat16"


def steps(shape: Shape, *tokens: int) -> list[int]:
    """Lengths of a long ragged batch: the first row needs whole steps of the kernel."""
    return [4096 * 2, *tokens, shape.page_size * 3]


# Several steps where there would be one.
SMALL = TpuConfig(
    block_tokens=128, block_pages=4, step_blocks=2, dma_unroll=2, select_chunk=128, select_places=8, select_bits=4
)


def check_dense(
    shape: Shape,
    cache: Cache,
    heads: list[int],
    kind: str | None,
    cores: int = 1,
    config: TpuConfig | None = None,
) -> None:
    """Everything that `dense_decode` gives, against the oracle; without page scores, without log-sum-exps, too."""
    out, scores, *lse = run(
        ops.dense_decode, *cache.arrays, jnp.array(heads, jnp.int32), scale=shape.scale, page_scores=kind,
        return_lse=kind is not None, cores=cores, config=config,
    )  # fmt: skip
    assert out.dtype == cache.q.dtype
    assert not np.asarray(out)[:, [r for r, head in enumerate(heads) if head < 0]].any()
    named = [r for r, head in enumerate(heads) if head >= 0]
    want, want_scores = oracle.dense_decode(
        cache.q, cache.kv_pages, cache.page_table, cache.lengths, [heads[r] for r in named], scale=shape.scale,
        score=kind or "max",
    )  # fmt: skip
    np.testing.assert_allclose(np.asarray(out, np.float64)[:, named], want, atol=shape.tolerance)
    if kind is None:
        assert scores is None
        assert not lse
        return
    assert scores.dtype == jnp.float32
    assert scores.shape == (len(cache.lengths), len(heads), cache.page_table.shape[1])
    for b, row in enumerate(want_scores):
        for r, head in zip(named, row, strict=True):
            np.testing.assert_allclose(scores[b, r, : len(head)], head, atol=5e-5, rtol=1e-5)
    check_lse(shape, cache, heads, lse[0])


def check_lse(
    shape: Shape, cache: Cache, heads: list[int], lse: jax.Array, pages: list[list[list[int]]] | None = None
) -> None:
    """`lse [B, R, G]` over all that a head may read, or over `pages` of it; masked where nothing was read."""
    assert lse.dtype == jnp.float32
    for b, length in enumerate(cache.lengths.tolist()):
        for r, head in enumerate(heads):
            keys, _ = oracle.read_cache(cache.kv_pages, cache.page_table, b, length if head >= 0 else 0, head)
            if pages is not None:
                keys = keys[[j for j in range(len(keys)) if j // shape.page_size in pages[b][head]]]
            want = oracle.log_sum_exp(cache.q[b, head].astype(np.float64), keys, shape.scale)
            np.testing.assert_allclose(lse[b, r], np.maximum(want, ops.MASKED), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "heads", "kind"),
    [
        (Shape(16, 64, 4), [2, -1, 0], "max"),
        (Shape(32, 128, 7, BF16), [1], "lse"),
        (Shape(64, 128, 8, BF16), [0, 2, 1], "max"),
        (Shape(128, 64, 1), [2], "lse"),
        (Shape(64, 64, 2, BF16), [0], None),
        (Shape(64, 128, 4, BF16, "int8"), [2, -1, 0], "max"),
        (Shape(128, 64, 2, F32, "int8"), [1], None),
        (Shape(32, 64, 1, F32, "fp8"), [0, 2], "lse"),
    ],
    ids=str,
)
def test_dense_decode_at_every_border_of_a_page(shape: Shape, heads: list[int], kind: str | None) -> None:
    check_dense(shape, make_cache(shape), heads, kind)


@pytest.mark.parametrize(
    ("shape", "heads", "kind"),
    [(Shape(64, 64, 2), [0, 2], "max"), (Shape(32, 128, 4, BF16), [1], "lse")],
    ids=str,
)
def test_dense_decode_over_several_steps(shape: Shape, heads: list[int], kind: str) -> None:
    """Steps of 4096 tokens: exactly two, one and a page, and a row that is done long before the others."""
    check_dense(shape, make_cache(shape, lengths=steps(shape, 4096 + shape.page_size, 4096 + 1)), heads, kind)


@pytest.mark.parametrize(
    "shape", [Shape(32, 64, 2), Shape(64, 128, 2, kv="int8"), Shape(16, 128, 1, BF16, "fp8")], ids=str
)
def test_tiles_of_other_sizes_give_the_same(shape: Shape) -> None:
    cache = make_cache(shape, lengths=[600, 0, 256, 257, 33])
    check_dense(shape, cache, [-1, 1], "lse", config=SMALL)


@pytest.mark.parametrize(
    "heads",
    [[1], [2, 0], [0, -1, 2]],
    ids=["split KV", "a head each", "split KVs"],
)
def test_two_cores_share_the_work(heads: list[int]) -> None:
    """v4 and v5p: cores take turns with the heads, or share each head's context where heads do not come out even."""
    shape = Shape(64, 64, 4)
    check_dense(shape, make_cache(shape, lengths=[320, 0, 512, 70]), heads, "max", cores=2, config=SMALL)


@pytest.mark.parametrize("kv", [None, "int8", "fp8"])
def test_a_row_of_another_cache_does_not_leak_in(kv: KVDtype | None) -> None:
    """What is not finite in one row stays in its own output, and is seen there, though rows share buffers."""
    shape = Shape(64, 64, 2, kv=kv)
    cache = make_cache(shape, lengths=[64 * 5, 5])
    cache.kv_pages[cache.page_table[0, 3], 1, 7] = np.nan if kv else np.inf
    out, _ = run(ops.dense_decode, *cache.arrays, jnp.array([1], jnp.int32), scale=shape.scale, config=SMALL)
    assert not np.isfinite(np.asarray(out[0])).all()
    want, _ = oracle.dense_decode(
        cache.q[1:], cache.kv_pages, cache.page_table[1:], cache.lengths[1:], [1], scale=shape.scale
    )
    np.testing.assert_allclose(np.asarray(out[1:], np.float64), want, atol=shape.tolerance)


@pytest.mark.parametrize(
    ("shape", "heads", "budget", "cores"),
    [
        (Shape(16, 64, 4), [1, 2], 4, 1),
        (Shape(64, 128, 8, BF16), [-1, 0], 4, 2),
        (Shape(128, 128, 7, BF16), [0, 1, 2], 40, 1),
        (Shape(128, 128, 7, BF16), [0, 1, 2], 40, 2),
        (Shape(64, 64, 1), [2, 0], 70, 1),
        (Shape(64, 128, 4, BF16, "int8"), [1, -1, 2], 4, 1),
        (Shape(64, 64, 2, F32, "fp8"), [0, 2], 40, 1),
    ],
    ids=str,
)
def test_sparse_decode_reads_the_selected_pages_only(shape: Shape, heads: list[int], budget: int, cores: int) -> None:
    """Selections shorter and longer than a step, some empty, with and without the row's last page."""
    lengths = None if budget == 4 else [shape.page_size * budget + 1, shape.page_size * 3 - 1, 0]
    cache = make_cache(shape, lengths=lengths)
    pages = some_pages(cache, shape.page_size, budget)
    for b, row in enumerate(pages):  # nothing else may be read
        for p in set(range(oracle.page_count(int(cache.lengths[b]), shape.page_size))).difference(*row):
            if b + 2 < len(pages):  # the last two rows share a page
                cache.kv_pages[cache.page_table[b, p]] = np.nan
    got, lse = run(
        ops.sparse_decode, *cache.arrays, padded(pages, budget), jnp.array(heads, jnp.int32), scale=shape.scale,
        return_lse=True, cores=cores,
    )  # fmt: skip
    want = oracle.sparse_decode(
        cache.q, cache.kv_pages, cache.page_table, cache.lengths, pages, heads, scale=shape.scale
    )
    want[:, [r for r, head in enumerate(heads) if head < 0]] = 0.0
    assert got.dtype == cache.q.dtype
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=shape.tolerance)
    check_lse(shape, cache, heads, lse, pages)


def check_select(
    scores: np.ndarray,
    counts: list[int],
    rule: oracle.Rule,
    page_size: int = 16,
    config: TpuConfig | None = None,
) -> None:
    """Against the oracle; `counts` are the pages of every row, and what lies past them is NaN."""
    scores = scores.astype(np.float32)
    lengths = [max(0, count * page_size - b % page_size) for b, count in enumerate(counts)]
    for b, count in enumerate(counts):
        scores[b, :, count:] = np.nan
    pages, got = run(
        ops.select_pages, jnp.asarray(scores), jnp.array(lengths, jnp.int32), spec=spec_of(rule), page_size=page_size,
        config=config,
    )  # fmt: skip
    picked = [
        [oracle.pick(head[:count].astype(np.float64), rule) for head in row]
        for row, count in zip(scores, counts, strict=True)
    ]
    assert min(p.margin for row in picked for p in row) > 0.0 or rule.name == "budget"
    expected = padded([[p.pages for p in row] for row in picked], rule.budget)
    np.testing.assert_array_equal(pages, expected.pages)
    np.testing.assert_array_equal(got, expected.counts)


@pytest.mark.parametrize("make", ["distinct", "ties", "zeros"])
def test_select_pages_is_exact(make: str) -> None:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((5, 3, 300))
    if make == "ties":
        scores = np.round(scores)
    if make == "zeros":  # minus zero ties with zero
        scores = np.where(scores > 0, 0.0, -0.0)
    check_select(scores, [300, 0, 1, 40, 41], oracle.Rule(40, 2, 3))


def test_select_pages_in_smaller_pieces() -> None:
    rng = np.random.default_rng(3)
    check_select(np.round(8 * rng.standard_normal((2, 2, 300))), [300, 129], oracle.Rule(40, 2, 3), config=SMALL)


def test_select_pages_of_the_longest_contexts() -> None:
    """More pages than one piece of the kernel's code covers, and more places than one register has lanes."""
    rng = np.random.default_rng(1)
    check_select(np.round(8 * rng.standard_normal((2, 4, 5000))), [5000, 4097], oracle.Rule(200, 8, 16))


@pytest.mark.parametrize(
    ("name", "amount"), [("ratio", 0.07), ("top_p", 0.6), ("threshold", 0.01), ("forced", 0.0)], ids=str
)
def test_select_pages_by_every_rule(name: str, amount: float) -> None:
    rng = np.random.default_rng(2)
    check_select(2 * rng.standard_normal((2, 3, 90)), [90, 33], oracle.Rule(30, 1, 2, name, amount, "lse"))


@pytest.mark.parametrize(
    ("shape", "heads", "rule", "cores", "dense"),
    [
        (Shape(16, 64, 4), [-1, 1], oracle.Rule(4, 1, 1), 1, None),
        (Shape(64, 128, 8, BF16), [2, 0], oracle.Rule(4, 1, 1), 2, [0, 3, 4, 5]),
        (Shape(32, 64, 2), [], oracle.Rule(4, 1, 1), 1, [1, 2, 6]),
        (Shape(16, 128, 7), [0, 1, 2], oracle.Rule(4, 1, 1, "top_p", 0.9, "lse"), 1, None),
        (Shape(64, 64, 4, F32, "int8"), [2, 0], oracle.Rule(4, 1, 1), 1, [0, 3, 4, 5]),
        (Shape(64, 128, 4, BF16, "fp8"), [1], oracle.Rule(4, 1, 1), 1, None),
    ],
    ids=str,
)
def test_hybrid_decode_mixes_the_roles_of_a_layer(
    shape: Shape, heads: list[int], rule: oracle.Rule, cores: int, dense: list[int] | None
) -> None:
    """Rows in `dense` read everything in every head; what they hand up is what they would without."""
    cache = make_cache(shape, seed=1)
    flags = None if dense is None else np.isin(np.arange(len(cache.lengths)), dense)
    pages = some_pages(cache, shape.page_size, rule.budget)
    with ops.recorded() as calls:
        out, selection = run(
            ops.hybrid_decode, *cache.arrays, padded(pages, rule.budget), jnp.array(heads, jnp.int32),
            spec=spec_of(rule), scale=shape.scale, cores=cores, dense=None if flags is None else jnp.asarray(flags),
        )  # fmt: skip
    assert calls == [("hybrid_decode", "mosaic_tpu")]
    want, handed, margin = oracle.hybrid_decode(
        cache.q, cache.kv_pages, cache.page_table, cache.lengths, pages, [head for head in heads if head >= 0], rule,
        scale=shape.scale,
    )  # fmt: skip
    assert margin > 1e-4, "another seed: this one decides by rounding"
    if flags is not None:
        want[flags] = oracle.dense_decode(
            cache.q, cache.kv_pages, cache.page_table, cache.lengths, list(range(KV_HEADS)), scale=shape.scale
        )[0][flags]
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=shape.tolerance)
    expected = padded(handed, rule.budget)
    np.testing.assert_array_equal(selection.pages, expected.pages)
    np.testing.assert_array_equal(selection.counts, expected.counts)


@pytest.mark.parametrize("cores", [1, 2])
def test_dense_rows_read_everything_and_change_no_other_row(cores: int) -> None:
    """Dense rows of several steps beside rows that still read their selections only, to the bit as without them."""
    shape, heads, budget = Shape(64, 64, 2), [2, -1, 0], 2
    lengths = [64 * 4 + 1, 64 * 3, 0, 64 * 8, 64 * 6 - 1, 64]
    dense = np.array([True, False, True, True, False, True])
    cache = make_cache(shape, lengths=lengths)
    pages = some_pages(cache, shape.page_size, budget)
    full, _ = oracle.dense_decode(cache.q, cache.kv_pages, cache.page_table, cache.lengths, [2, 0], scale=shape.scale)
    for head in (2, 0):
        for p in {0, 1, 2}.difference(pages[1][head]):
            cache.kv_pages[cache.page_table[1, p], head] = np.nan

    def decode(flags: jax.Array | None) -> np.ndarray:
        out = run(
            ops.sparse_decode, *cache.arrays, padded(pages, budget), scale=shape.scale, heads=np.array(heads, np.int32),
            dense=flags, cores=cores, config=SMALL,
        )  # fmt: skip
        return np.asarray(out)

    out, alone = decode(jnp.asarray(dense)), decode(None)
    assert np.isfinite(out).all()
    assert not out[:, 1].any()
    np.testing.assert_allclose(out[dense][:, [0, 2]], full[dense], atol=shape.tolerance)
    np.testing.assert_array_equal(out[~dense], alone[~dense])


@pytest.mark.parametrize(
    ("shape", "message"),
    [(Shape(3, 64, 4), "page sizes"), (Shape(16, 32, 4), "head_dim"), (Shape(16, 64, 4, "float16"), "float16")],
    ids=str,
)
def test_what_the_kernels_do_not_cover_is_refused(shape: Shape, message: str) -> None:
    cache = make_cache(shape, lengths=[5])
    with pytest.raises(NotImplementedError, match=message), interpreted():
        ops.dense_decode(*cache.arrays, jnp.array([0], jnp.int32), scale=1.0, implementation="mosaic_tpu")


def test_without_a_tpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text("[1, 2, 3]")
    arguments = ["generate", "--prompt-ids", str(tmp_path / "ids.json"), "--max-new-tokens", "2"]
    assert main([*arguments, "--implementation", "mosaic_tpu"]) == 2
    assert capsys.readouterr().err.strip() == "error: mosaic_tpu runs on TPUs, and JAX sees a cpu here"


def test_a_model_decodes_with_the_kernels_as_it_does_without() -> None:
    """Two rows of a tiny model, a sparse and a retrieval head: the same tokens, whichever implementation reads."""
    config = ModelConfig("llama", 64, 32, 48, 2, 4, 2, 64, 512)
    model = LLM(Path("tiny"), config, Decoder(config, rngs=nnx.Rngs(0)), None, (), engine_config=small_chunks(64))
    prompts = [list(range(1, 60)), [7] * 17]
    results = []
    for implementation in ("xla", "mosaic_tpu"):
        options = GenerateOptions(
            "hybrid", HeadMap(2, 2, ((0, 1), (1,))), SelectionPolicy(48, 16, 16), page_size=16, max_new_tokens=4,
            implementation=implementation,
        )  # fmt: skip
        with interpreted() if implementation == "mosaic_tpu" else contextlib.nullcontext(), ops.recorded() as calls:
            results.append(model.generate_tokens(prompts, options))
        assert {name for op, name in calls if op == "hybrid_decode"} == {implementation}
    assert results[0].tokens == results[1].tokens
    for want, got in zip(results[0].logprobs, results[1].logprobs, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_page_tables_beyond_the_scalar_memory_are_refused() -> None:
    shapes: list[Any] = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in [
            ((1, KV_HEADS, 1, 64), jnp.float32), ((9, KV_HEADS, 16, 128), jnp.float32), ((1, 1 << 17), jnp.int32),
            ((1,), jnp.int32), ((1,), jnp.int32),
        ]
    ]  # fmt: skip
    with pytest.raises(NotImplementedError, match="scalar memory"), interpreted():
        jax.eval_shape(
            lambda q, data, *rest: ops.dense_decode(q, KVPages(data), *rest, scale=1.0, implementation="mosaic_tpu"),
            *shapes,
        )


def test_the_interpreter_sees_a_copy_that_is_not_waited_for() -> None:
    """The judge of the tests above: without it they would pass whatever the kernels' semaphores do."""

    def kernel(source: Any, out: Any, buffer: Any, arrived: Any) -> None:
        copy = pltpu.make_async_copy(source, buffer, arrived)
        copy.start()
        out[...] = buffer[...]
        copy.wait()

    def call(x: jax.Array) -> jax.Array:
        return pl.pallas_call(
            kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
        )(x)  # fmt: skip

    with pytest.raises(Exception, match="race"), interpreted():
        jax.block_until_ready(jax.jit(call)(jnp.ones((8, 128))))


@pytest.mark.parametrize(
    ("head_dim", "groups", "length", "kv"), [(64, 2, 128, None), (128, 1, 256, None), (64, 1, 128, "int8")]
)
def test_prefill_of_a_chunk_over_its_past(head_dim: int, groups: int, length: int, kv: KVDtype | None) -> None:
    """JAX's splash attention for the chunk and for blocks of the past, merged: three lengths of past, NaN beyond.

    A quantised cache holds the chunk, too, and nothing else is looked at.
    """
    rng = np.random.default_rng(0)
    page, kv_heads, starts = 64, 2, [0, 64 * 65 + 64, 128]
    counts = [length, length, 6]
    lengths = starts if kv is None else np.add(starts, counts).tolist()
    cache = make_cache(Shape(page, head_dim, groups, BF16, kv), lengths=lengths)
    pool, table = cache.kv_pages[:, :kv_heads], cache.page_table
    stored = jax.tree.map(lambda x: x[:, :kv_heads], cache.arrays[1])
    B = len(starts)
    q = (2 * rng.standard_normal((B, length, kv_heads, groups, head_dim))).astype(jnp.bfloat16)
    k, v = rng.standard_normal((2, B, length, kv_heads, head_dim)).astype(jnp.bfloat16)
    k[2, 6:] = v[2, 6:] = np.nan  # padding
    scale = head_dim**-0.5
    with interpreted(), ops.recorded() as calls:
        out = jax.block_until_ready(
            jax.jit(functools.partial(ops.extend_attention, scale=scale, implementation="mosaic_tpu"))(
                jnp.asarray(q), *(jnp.asarray(x if kv is None else np.full_like(x, np.nan)) for x in (k, v)), stored,
                jnp.asarray(table), jnp.array(starts, jnp.int32), jnp.array(counts, jnp.int32),
            )
        )  # fmt: skip
    assert calls == [("extend_attention", "mosaic_tpu")]
    for b, head, t in [(0, 0, 0), (0, 1, length - 1), (1, 0, 0), (1, 1, 77), (1, 0, length - 1), (2, 1, 5)]:
        if kv is None:
            keys, values = oracle.read_cache(pool, table, b, starts[b], head)
            keys = np.concatenate([keys, k[b, : t + 1, head].astype(np.float64)])
            values = np.concatenate([values, v[b, : t + 1, head].astype(np.float64)])
        else:
            keys, values = oracle.read_cache(pool, table, b, starts[b] + t + 1, head)
        want = oracle.attend(q[b, t, head].astype(np.float64), keys, values, scale)
        np.testing.assert_allclose(np.asarray(out[b, t, head], np.float64), want, atol=2e-2)
