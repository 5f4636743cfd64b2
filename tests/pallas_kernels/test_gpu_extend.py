"""Prefill on Hopper: the kernel against the float64 oracle, interpreted with race detection, and lowered for CUDA.

NaN is in every slot that must not be read, and the page table ends in garbage.
"""

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_kernels as ops
from lychee_jax.benchmarks.shapes import MODELS
from lychee_jax.config import ModelConfig
from lychee_jax.engine import programs
from lychee_jax.models.decoder import Decoder
from lychee_jax.models.rope import rotary_tables
from lychee_jax.models.spec import ModelSpec
from pallas_kernels import KVPages
from pallas_kernels.mosaic_gpu import extend
from pallas_kernels.mosaic_gpu.common import targeting
from tests.support import oracle, quantized
from tests.support.gpu import interpreted, kernels, run, unsigned
from tests.support.paged_caches import Shape

BF16, F16 = "bfloat16", "float16"


@dataclasses.dataclass
class Chunk:
    """A ragged batch of chunks that were written to the cache already; `kv_pages` are the numbers to be read of it."""

    q: Any
    kv_pages: Any
    page_table: Any
    starts: Any
    counts: Any
    kv: str | None

    @property
    def arrays(self) -> tuple[Any, ...]:
        """Queries, no real keys and values (they are read where the cache holds them), cache, table, starts, counts."""
        table, starts, counts = map(jnp.asarray, (self.page_table, self.starts, self.counts))
        unread = jnp.full((*self.q.shape[:3], self.q.shape[-1]), jnp.nan, self.q.dtype)
        return jnp.asarray(self.q), unread, unread, quantized.as_pages(self.kv_pages, self.kv), table, starts, counts


def make_chunk(shape: Shape, kv_heads: int, length: int, starts: list[int], counts: list[int]) -> Chunk:
    """Fresh data in permuted pages; nothing past `starts + counts` is a number, and no page there has a valid id."""
    rng = np.random.default_rng(0)
    page, dtype = shape.page_size, jnp.dtype(shape.dtype)
    ends = [start + count for start, count in zip(starts, counts, strict=True)]
    capacity = oracle.page_count(max(ends), page) + 2
    # Page 0 and the last page belong to nobody: where a bad entry of the table gets clipped to.
    num_pages = len(starts) * capacity + 2
    free = iter(1 + rng.permutation(num_pages - 2))
    table = rng.choice(np.array([-1, num_pages, 0, 2**31 - 1, -(2**31)]), (len(starts), capacity)).astype(np.int32)
    pool = np.full((num_pages, kv_heads, page, 2 * shape.head_dim), np.nan, np.float32)
    for b, end in enumerate(ends):
        for p in range(oracle.page_count(end, page)):
            table[b, p] = next(free)
            real = min(page, end - p * page)
            pool[table[b, p], :, :real] = rng.standard_normal((kv_heads, real, 2 * shape.head_dim))
    q = 2 * rng.standard_normal((len(starts), length, kv_heads, shape.group, shape.head_dim))
    pool = pool.astype(dtype) if shape.kv is None else quantized.store_pool(pool, shape.kv).read
    return Chunk(q.astype(dtype), pool, table, np.array(starts, np.int32), np.array(counts, np.int32), shape.kv)


def check(chunk: Chunk, got: jax.Array, shape: Shape) -> None:
    want = oracle.extend_attention(
        chunk.q, chunk.kv_pages, chunk.page_table, chunk.starts, chunk.counts, scale=shape.scale
    )
    assert got.shape == chunk.q.shape
    assert got.dtype == chunk.q.dtype
    assert np.isfinite(np.asarray(got, np.float64)).all(), "of padding, too"
    for row, out in zip(want, got, strict=True):
        np.testing.assert_allclose(np.asarray(out[: len(row)], np.float64), row, atol=shape.tolerance)


@pytest.mark.parametrize(
    ("shape", "kv_heads", "length", "starts", "counts"),
    [
        # A page's edge and the middle of a tile; a row that ends with its chunk, one inside a page, one with a token.
        (Shape(16, 64, 2, BF16), 2, 128, [0, 16, 200, 33], [128, 100, 128, 1]),
        # More tiles than slots; an empty row with a past; the second block of a row has no token.
        (Shape(64, 128, 1, BF16), 1, 256, [64 * 9, 0, 128], [256, 0, 100]),
        # Starts inside a page, seven query heads, another type.
        (Shape(32, 128, 7, F16), 1, 128, [77], [128]),
        # A page is a tile; fewer tokens than a block, and not a whole number of blocks.
        (Shape(128, 64, 1, F16), 2, 192, [128, 3], [192, 190]),
        (Shape(16, 64, 1, BF16), 1, 7, [250, 121], [7, 7]),
        # Over 8-bit caches.
        (Shape(32, 64, 1, BF16, "int8"), 2, 64, [100, 3], [30, 64]),
        (Shape(64, 128, 1, F16, "fp8"), 1, 64, [130], [50]),
    ],
    ids=str,
)
def test_a_chunk_over_its_past(shape: Shape, kv_heads: int, length: int, starts: list[int], counts: list[int]) -> None:
    chunk = make_chunk(shape, kv_heads, length, starts, counts)
    check(chunk, run(ops.extend_attention, *chunk.arrays, scale=shape.scale), shape)


def test_every_slot_is_used_again_and_again() -> None:
    shape = Shape(128, 64, 1, BF16)
    chunk = make_chunk(shape, 1, 64, [128 * 15 + 40], [64])
    check(chunk, run(ops.extend_attention, *chunk.arrays, scale=shape.scale), shape)


def test_large_scores_do_not_overflow() -> None:
    """Scores of some hundreds, of which the largest comes last, and earlier ones far below."""
    shape = Shape(16, 64, 1, BF16)
    chunk = make_chunk(shape, 1, 128, [256], [128])
    chunk.q = (40 * chunk.q.astype(np.float32)).astype(chunk.q.dtype)
    check(chunk, run(ops.extend_attention, *chunk.arrays, scale=shape.scale), shape)


def test_wrong_page_ids_are_never_followed() -> None:
    """What the interpreter would hide: every page that is fetched lies inside the pool, whatever the table says."""
    wrong = jnp.array([[-1, 9, 2**31 - 1, -(2**31), 3, 8]], jnp.int32)
    facts = extend.ChunkShape(
        blocks=1, kv_heads=1, groups=1, head_dim=64, page_size=64, num_pages=9, capacity=6, stages=3
    )
    number = jnp.int32(0)
    for seen in (1, 64, 65, 64 * 6):
        work = extend.BlockWork(number, number, number, number, number, jnp.int32(seen), number)
        for tile in range(-(-seen // extend.TILE)):
            pages = [int(page) for page in extend.physical_pages(facts, wrong, work, jnp.int32(tile))]
            named = [2 * tile + k if (2 * tile + k) * 64 < seen else 2 * tile for k in range(2)]
            assert pages == [min(max(int(wrong[0, page]), 0), 8) for page in named]


def test_blocks_cover_every_query_once_the_longest_first() -> None:
    """The blocks of one KV head follow each other, and among them those of one tile of queries."""
    facts = extend.ChunkShape(
        blocks=3, kv_heads=2, groups=2, head_dim=64, page_size=64, num_pages=9, capacity=6, stages=3
    )
    # As the order promises: row, KV head, tiles of queries from the last to the first, query head.
    want = [
        (row, head, 2 * head + group, block * extend.BLOCK)
        for row in range(2)
        for head in range(2)
        for block in (2, 1, 0)
        for group in range(2)
    ]

    def of(block: jax.Array) -> Any:
        starts, counts = jnp.array([5, 300], jnp.int32), jnp.array([2 * extend.BLOCK + 1, 9], jnp.int32)
        work = extend.BlockWork.of(facts, extend.Refs({"starts": starts, "counts": counts}), block)
        return jnp.stack([work.row, work.kv_head, work.head, work.first]), work.position, work.seen, work.steps

    found, positions, seen, steps = jax.vmap(of)(jnp.arange(len(want), dtype=jnp.int32))
    assert list(map(tuple, found.tolist())) == want
    for (row, _, _, first), *numbers in zip(want, positions.tolist(), seen.tolist(), steps.tolist(), strict=True):
        start, count = [(5, 2 * extend.BLOCK + 1), (300, 9)][row]
        end = start + min(first + extend.BLOCK, count)
        assert numbers == [start + first, end, -(-end // extend.TILE) if first < count else 0]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (Shape(3, 64, 4, BF16), "pages of 3"),
        (Shape(16, 32, 4, BF16), "head_dim 32"),
        (Shape(16, 64, 9, BF16), "and 9"),
        (Shape(16, 64, 4), "float32"),
    ],
    ids=str,
)
def test_what_the_kernel_does_not_cover_is_refused(shape: Shape, message: str) -> None:
    chunk = make_chunk(shape, 1, 16, [0], [16])
    with pytest.raises(NotImplementedError, match=message), targeting("cuda"):
        ops.extend_attention(*chunk.arrays, scale=1.0, implementation="mosaic_gpu")


def test_other_machines_are_refused_by_name_and_served_by_xla_otherwise() -> None:
    shape = Shape(16, 64, 4, BF16)
    chunk = make_chunk(shape, 1, 16, [0], [16])
    with pytest.raises(NotImplementedError, match="Hopper"):
        ops.extend_attention(*chunk.arrays, scale=1.0, implementation="mosaic_gpu")
    q, _, _, kv, table, *rest = chunk.arrays
    own = kv.data[table[0, 0]].transpose(1, 0, 2)[None]
    with ops.recorded() as calls:
        got = ops.extend_attention(q, own[..., :64], own[..., 64:], kv, table, *rest, scale=shape.scale)
    assert calls == [("extend_attention", "xla")]
    check(chunk, got, shape)


@pytest.mark.parametrize(("model", "page"), [(model, (16, 64)[index % 2]) for index, model in enumerate(MODELS)])
def test_real_shapes_lower_for_cuda(model: str, page: int) -> None:
    """Shared memory, TMA boxes and layouts are checked while lowering, which interpreting is not."""
    config, tokens, context = MODELS[model], 4096, 131072
    pages, kv_heads = context // page, config.num_kv_heads
    dtype = jnp.float16 if page == 16 else jnp.bfloat16
    shapes: list[Any] = [
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in [
            ((1, tokens, kv_heads, config.groups, config.head_dim), dtype),
            ((1, tokens, kv_heads, config.head_dim), dtype), ((1, tokens, kv_heads, config.head_dim), dtype),
            ((pages + 1, kv_heads, page, 2 * config.head_dim), dtype),
            ((1, pages), jnp.int32), ((1,), jnp.int32), ((1,), jnp.int32),
        ]
    ]  # fmt: skip

    def call(q: Any, k: Any, v: Any, pool: Any, *rest: Any) -> Any:
        return ops.extend_attention(q, k, v, KVPages(pool), *rest, scale=0.1, implementation="mosaic_gpu")

    code = kernels(call, *shapes)
    assert len(code) == 1
    assert unsigned(code) == []


def test_the_prefill_of_a_prompt_is_that_of_xla() -> None:
    """Two chunks of a prompt through a model, the second one with padding, over a pool of NaN."""
    config = ModelConfig("llama", 50, 64, 96, 2, 2, 1, 64, 4096)
    page, chunk, prompt = 16, 128, 128 + 37
    spec, weights = ModelSpec.split(Decoder(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    # Large enough that attention is peaked, and that the layers say more than the token's own embedding.
    weights = tuple(w if w.ndim == 1 else jnp.asarray(rng.normal(0.0, 0.2, w.shape), w.dtype) for w in weights)
    tokens = np.zeros((1, 2 * chunk), np.int32)
    tokens[0, :prompt] = rng.integers(0, config.vocab_size, prompt)
    num_pages = 20
    used = -(-prompt // page)
    table = np.full((1, 32), 2**31 - 1, np.int32)
    table[0, :used] = rng.permutation(num_pages)[:used]

    def prefill(implementation: str) -> list[np.ndarray]:
        """The last hidden state of each chunk, and what each layer's cache holds of the prompt."""
        shape = (num_pages, 1, page, 2 * config.head_dim)
        pools = tuple(KVPages(jnp.full(shape, jnp.nan, jnp.bfloat16)) for _ in range(config.num_layers))
        lasts = []
        for start in (0, chunk):
            cos, sin = rotary_tables(
                config.rope, config.head_dim, 4096, start + np.arange(chunk)[None], np.array([prompt])
            )
            # Op by op: within one program the interpreter's calls back can starve on a machine with few cores.
            pools, last = inspect.unwrap(programs.prefill_chunk)(
                spec, implementation, 1, weights, pools, jnp.asarray(table),
                jnp.asarray(tokens[:, start : start + chunk]), jnp.asarray(cos), jnp.asarray(sin),
                jnp.array([start], jnp.int32), jnp.array([min(chunk, prompt - start)], jnp.int32),
            )  # fmt: skip
            lasts.append(np.asarray(last, np.float32))
        held = [np.asarray(pool.data, np.float32)[table[0, :used]].reshape(-1, 2 * config.head_dim) for pool in pools]
        return [*lasts, *[each[:prompt] for each in held]]

    want = prefill("xla")
    with interpreted(), ops.recorded() as calls:
        got = prefill("mosaic_gpu")
    assert set(calls) == {("extend_attention", "mosaic_gpu")}
    for ours, theirs in zip(got, want, strict=True):
        assert np.isfinite(theirs).all()
        assert np.abs(theirs).max() > 1
        np.testing.assert_allclose(ours, theirs, atol=0.05)
