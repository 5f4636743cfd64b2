"""The GPU kernels on a real GPU against the float64 oracle: `PYTHONPATH=. python tests/hardware/gpu_check.py`.

Fresh random data, ragged lengths at the borders of pages and tiles, NaN in every slot that must not be read, memory
that was poisoned before the call, and every call twice: it must give the same bits. The interpreter's tests cannot see
what the compiler or the hardware makes of a kernel.
"""

import functools
import itertools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as ops
from tests.support import oracle

KV_HEADS, BUDGET = 3, 12
CASES = [
    # page size, head_dim, query heads a KV head, dtype, retrieval heads
    (64, 128, 4, "bfloat16", [1]),
    (16, 64, 4, "bfloat16", [2, 0]),
    (32, 128, 7, "float16", [1]),
    (128, 128, 8, "bfloat16", [0, 1, 2]),
    (128, 64, 1, "float16", []),
    (64, 64, 2, "bfloat16", [0]),
]
# Chunks of every width, full or padded, one and several.
CAPACITIES = [64, 1024, 2048, 2112, 3072, 4096, 4160, 8192, 20000]

CHUNKS = [
    # page size, head_dim, query heads a KV head, dtype, tokens of the chunk
    (64, 128, 4, "bfloat16", 512),
    (16, 64, 8, "bfloat16", 256),
    (32, 128, 7, "float16", 200),
    (128, 64, 1, "float16", 64),
    (128, 128, 2, "bfloat16", 384),
]


def check_chunk(page: int, head_dim: int, groups: int, dtype: str, length: int, seed: int) -> tuple[float, bool, bool]:
    """Largest error of a chunk's attention, whether padding came out finite, and whether two calls agree to the bit."""
    rng = np.random.default_rng(seed)
    starts = np.array([0, page, 9 * 128 + 64, 1000, 77, 128], np.int32)
    counts = np.array([length, length - 1, length, max(1, length - 130), 1, 0], np.int32)
    ends = (starts + counts).tolist()
    capacity = oracle.page_count(max(ends), page) + 3
    num_pages = len(ends) * capacity + 2
    table = rng.choice(np.array([-1, num_pages, 2**31 - 1]), (len(ends), capacity)).astype(np.int32)
    pool = np.full((num_pages, KV_HEADS, page, 2 * head_dim), np.nan, np.float32)
    free = iter(1 + rng.permutation(num_pages - 2))
    for b, end in enumerate(ends):
        for p in range(oracle.page_count(end, page)):
            table[b, p] = next(free)
            real = min(page, end - p * page)
            pool[table[b, p], :, :real] = rng.standard_normal((KV_HEADS, real, 2 * head_dim))
    q = 2 * rng.standard_normal((len(ends), length, KV_HEADS, groups, head_dim))
    q, pool = (np.asarray(jnp.asarray(x, dtype)) for x in (q, pool))
    scale = head_dim**-0.5
    call = jax.jit(functools.partial(ops.extend_attention, scale=scale, implementation="mosaic_gpu"))
    unread = jnp.full((*q.shape[:3], head_dim), jnp.nan, q.dtype)  # keys and values are read where the cache has them
    args = (
        jnp.asarray(q), unread, unread, ops.KVPages(jnp.asarray(pool)), *map(jnp.asarray, (table, starts, counts))
    )  # fmt: skip
    results = [np.asarray(call(*args)) for _ in range(2)]
    want = oracle.extend_attention(q, pool, table, starts, counts, scale=scale)
    pairs = [(out[: len(row)].astype(np.float64), row) for out, row in zip(results[0], want, strict=True)]
    error = max(float(np.abs(out - row).max(initial=0.0)) for out, row in pairs)
    finite = bool(np.isfinite(results[0].astype(np.float32)).all())
    return error, finite, np.array_equal(results[0], results[1])


def check(
    page: int, head_dim: int, groups: int, dtype: str, heads: list[int], seed: int, lone: bool = False
) -> tuple[float, bool, bool]:
    """Largest error of the output, whether the selection is exact, and whether two calls agree to the bit."""
    rng = np.random.default_rng(seed)
    # The pieces of a lone head are so many that all warpgroups of a block merge them together.
    lengths = [63 * page + 1] if lone else [0, 1, page - 1, 20 * page + page // 2, 33 * page, 129]
    capacity = 64
    num_pages = len(lengths) * capacity + 2
    pool = np.full((num_pages, KV_HEADS, page, 2 * head_dim), np.nan, np.float32)
    table = rng.choice(np.array([-1, num_pages, 2**31 - 1]), (len(lengths), capacity)).astype(np.int32)
    free = iter(1 + rng.permutation(num_pages - 2))
    pages = []
    for b, length in enumerate(lengths):
        used = oracle.page_count(length, page)
        for p in range(used):
            table[b, p] = next(free)
            real = min(page, length - p * page)
            pool[table[b, p], :, :real] = rng.standard_normal((KV_HEADS, real, 2 * head_dim))
        pages.append([sorted(rng.permutation(used)[:BUDGET].tolist()) for _ in range(KV_HEADS)])
    q = 2 * rng.standard_normal((len(lengths), KV_HEADS, groups, head_dim))
    q, pool = (np.asarray(jnp.asarray(x, dtype)) for x in (q, pool))
    padded = np.array([[row + [-1] * (BUDGET - len(row)) for row in rows] for rows in pages], np.int32)
    counts = np.array([[len(row) for row in rows] for rows in pages], np.int32)
    scale = head_dim**-0.5
    decode = functools.partial(
        ops.hybrid_decode,
        heads=np.array(heads, np.int32),
        spec=ops.SelectionSpec(BUDGET, 1, 2),
        scale=scale,
        implementation="mosaic_gpu",
    )
    call = jax.jit(decode)
    args = (
        jnp.asarray(q),
        ops.KVPages(jnp.asarray(pool)),
        *map(jnp.asarray, (table, np.array(lengths, np.int32))),
        ops.Selection(*map(jnp.asarray, (padded, counts))),
    )
    results = []
    for _ in range(2):
        poison = [jnp.full((1 << 22,), jnp.nan) for _ in range(8)]
        jax.block_until_ready(poison)
        del poison
        out, selection = call(*args)
        results.append((np.asarray(out), np.asarray(selection.pages), np.asarray(selection.counts)))
    want, handed, margin = oracle.hybrid_decode(
        q, pool, table, np.array(lengths), pages, heads, oracle.Rule(BUDGET, 1, 2), scale=scale
    )
    error = float(np.abs(results[0][0].astype(np.float64) - want).max())
    expected = np.array([[row + [-1] * (BUDGET - len(row)) for row in rows] for rows in handed], np.int32)
    exact = bool((results[0][1] == expected).all()) or margin < 1e-4
    same = all(np.array_equal(a, b) for a, b in zip(*results, strict=True))
    return error, exact, same


def check_select(capacity: int, ties: bool, seed: int) -> bool:
    """Whether selections among up to `capacity` pages are exact: NaN past every row's end, and ties if asked for."""
    rng = np.random.default_rng(seed)
    counts = [capacity, capacity - 1, capacity // 2 + 1, BUDGET, 0]
    rule = oracle.Rule(BUDGET, 1, 2)
    scores = rng.standard_normal((len(counts), KV_HEADS, capacity)).astype(np.float32)
    if ties:
        scores = np.round(8 * scores) / 8
    for b, count in enumerate(counts):
        scores[b, :, count:] = np.nan
    pages, got = ops.select_pages(
        jnp.asarray(scores),
        jnp.array(counts, jnp.int32) * 64,
        ops.SelectionSpec(BUDGET, 1, 2),
        page_size=64,
        implementation="mosaic_gpu",
    )
    exact = True
    for b, count in enumerate(counts):
        for head in range(KV_HEADS):
            want = oracle.pick(scores[b, head, :count].astype(np.float64), rule).pages
            exact &= int(got[b, head]) == len(want)
            exact &= np.asarray(pages[b, head]).tolist() == want + [-1] * (BUDGET - len(want))
    return exact


def main() -> int:
    """Check every case with a seed from the clock."""
    seed = int(time.time())
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, seed {seed}")
    bad = 0
    for case, lone in [*((case, False) for case in CASES), (CASES[0], True)]:
        error, exact, same = check(*case, seed=seed, lone=lone)
        good = error < 2e-2 and exact and same
        bad += not good
        print(
            f"{'ok ' if good else 'BAD'} {case}{', one row' if lone else ''}: error {error:.1e}, "
            f"selection exact {exact}, repeats equal {same}",
            flush=True,
        )
    for capacity, ties in itertools.product(CAPACITIES, (False, True)):
        exact = check_select(capacity, ties, seed)
        bad += not exact
        kind = "ties" if ties else "no ties"
        print(f"{'ok ' if exact else 'BAD'} selection among {capacity} pages, {kind}: exact {exact}", flush=True)
    for case in CHUNKS:
        error, finite, same = check_chunk(*case, seed=seed)
        good = error < 2e-2 and finite and same
        bad += not good
        print(
            f"{'ok ' if good else 'BAD'} chunk {case}: error {error:.1e}, finite {finite}, repeats equal {same}",
            flush=True,
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
