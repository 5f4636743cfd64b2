"""The GPU kernels on a real GPU against the float64 oracle: `PYTHONPATH=. python tests/hardware/gpu_check.py`.

With `--devices N` instead: one model on one GPU and on N of this host, see `devices_check`.

Fresh random data, ragged lengths at the borders of pages and tiles, NaN in every slot that must not be read, memory
that was poisoned before the call, and every call twice: it must give the same bits. The interpreter's tests cannot see
what the compiler or the hardware makes of a kernel. `--only kv8` checks what reads 8-bit caches, `--only GROUP` another
group of checks.
"""

import argparse
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as ops
from lychee_jax.benchmarks.step import random_pools
from lychee_jax.cache.pages import append_token
from pallas_kernels import mosaic_gpu
from pallas_kernels.mosaic_gpu.common import multiprocessors
from pallas_kernels.mosaic_gpu.config import DecodeConfig
from tests.hardware import devices_check
from tests.support import oracle, quantized

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
# The same with one row, with dense rows, and with heads that only the device knows; −1 stands for none.
VARIANTS: list[tuple[Any, dict[str, Any]]] = [
    (CASES[0], {"lone": True}),
    (CASES[0], {"lone": True, "dense": [True]}),
    (CASES[0], {"dense": [True, True, False, False, True, False]}),
    ((128, 64, 8, "float16", [2, -1]), {"known": False}),
    ((16, 128, 4, "bfloat16", [-1, 0]), {"known": False, "dense": [False, False, True, True, False, True]}),
]
PARTS: list[tuple[Any, dict[str, Any]]] = [
    ((64, 128, 4, "bfloat16", [2, -1, 0]), {"known": False}),
    ((16, 64, 7, "float16", [-1, 1]), {"known": True}),
    ((64, 128, 8, "bfloat16", [1]), {"known": True, "lone": True}),
]
# Over 8-bit caches.
WORDS: list[tuple[Any, dict[str, Any]]] = [
    ((64, 128, 4, "bfloat16", [1]), {"kv": "fp8"}),
    ((64, 128, 4, "bfloat16", [1]), {"kv": "int8"}),
    ((16, 64, 4, "bfloat16", [2, 0]), {"kv": "fp8"}),
    ((32, 64, 7, "float16", [1]), {"kv": "int8"}),
    ((128, 128, 8, "bfloat16", [0, 1, 2]), {"kv": "int8"}),
    ((128, 64, 1, "float16", []), {"kv": "fp8"}),
    ((64, 128, 4, "bfloat16", [1]), {"kv": "fp8", "lone": True}),
    ((64, 128, 4, "bfloat16", [1]), {"kv": "int8", "lone": True}),
    (
        (64, 128, 8, "bfloat16", [2, -1]),
        {"kv": "int8", "known": False, "dense": [True, False, False, True, True, False]},
    ),
]
WORD_PARTS: list[tuple[Any, dict[str, Any]]] = [
    ((64, 128, 4, "bfloat16", [2, -1, 0]), {"kv": "fp8", "known": False}),
    ((64, 128, 7, "float16", [-1, 1]), {"kv": "int8", "known": True}),
    ((64, 128, 8, "bfloat16", [1]), {"kv": "int8", "known": True, "lone": True}),
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


def check_chunk(
    page: int, head_dim: int, groups: int, dtype: str, length: int, seed: int, *, kv: str | None = None
) -> tuple[float, bool, bool]:
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
    q = np.asarray(jnp.asarray(q, dtype))
    pool = as_read(pool, dtype, kv)
    scale = head_dim**-0.5
    call = jax.jit(functools.partial(ops.extend_attention, scale=scale, implementation="mosaic_gpu"))
    unread = jnp.full((*q.shape[:3], head_dim), jnp.nan, q.dtype)  # keys and values are read where the cache has them
    args = (
        jnp.asarray(q), unread, unread, quantized.as_pages(pool, kv), *map(jnp.asarray, (table, starts, counts))
    )  # fmt: skip
    results = [np.asarray(call(*args)) for _ in range(2)]
    want = oracle.extend_attention(q, pool, table, starts, counts, scale=scale)
    pairs = [(out[: len(row)].astype(np.float64), row) for out, row in zip(results[0], want, strict=True)]
    error = max(float(np.abs(out - row).max(initial=0.0)) for out, row in pairs)
    finite = bool(np.isfinite(results[0].astype(np.float32)).all())
    return error, finite, np.array_equal(results[0], results[1])


def as_read(pool: np.ndarray, dtype: str, kv: str | None) -> np.ndarray:
    """The numbers that are read of a cache that was given `pool`."""
    return np.asarray(jnp.asarray(pool, dtype)) if kv is None else quantized.store_pool(pool, kv).read


@dataclasses.dataclass
class Layer:
    """A ragged batch over a paged cache, and the pages that every head inherits; `pool` has the numbers to be read."""

    q: np.ndarray
    pool: np.ndarray
    table: np.ndarray
    lengths: np.ndarray
    pages: list[list[list[int]]]
    kv: str | None

    @property
    def arrays(self) -> tuple[Any, ...]:
        """What `sparse_decode` takes before the heads; `dense_decode` takes all but the last."""
        return (
            jnp.asarray(self.q), quantized.as_pages(self.pool, self.kv), jnp.asarray(self.table),
            jnp.asarray(self.lengths), ops.Selection(*map(jnp.asarray, padded(self.pages))),
        )  # fmt: skip

    @property
    def cache(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The same for the oracle."""
        return self.q, self.pool, self.table, self.lengths


def padded(pages: list[list[list[int]]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of pages as the two arrays of a selection."""
    rows = [[head + [-1] * (BUDGET - len(head)) for head in row] for row in pages]
    return np.array(rows, np.int32), np.array([[len(head) for head in row] for row in pages], np.int32)


def make_layer(
    page: int, head_dim: int, groups: int, dtype: str, seed: int, lone: bool = False, kv: str | None = None
) -> Layer:
    """Random data; NaN in every slot that is not read, garbage in the table's entries behind a row's end."""
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
    q = np.asarray(jnp.asarray(q, dtype))
    return Layer(q, as_read(pool, dtype, kv), table, np.array(lengths, np.int32), pages, kv)


def twice(call: Any, *args: Any) -> tuple[list[np.ndarray], bool]:
    """What a call gives, after its memory was poisoned, and whether it gives the same bits again."""
    results = []
    for _ in range(2):
        poison = [jnp.full((1 << 22,), jnp.nan) for _ in range(8)]
        jax.block_until_ready(poison)
        del poison
        results.append([np.asarray(x) for x in jax.tree.leaves(call(*args))])
    same = all(np.array_equal(a, b) for a, b in zip(*results, strict=True))
    return results[0], same


def call_with(op: Any, heads: list[int], known: bool, **options: Any) -> Any:
    """The op as a program of its other arguments; `known`: the kernels need not count the heads that are not −1."""
    named = np.array(heads, np.int32)
    call = functools.partial(op, **options)
    if known:
        return jax.jit(functools.partial(call, heads=named))
    return functools.partial(jax.jit(lambda heads, *args: call(*args, heads=heads)), jnp.asarray(named))


def check(
    page: int, head_dim: int, groups: int, dtype: str, heads: list[int], seed: int, *, lone: bool = False,
    known: bool = True, dense: list[bool] | None = None, kv: str | None = None,
) -> tuple[float, bool, bool]:  # fmt: skip
    """Largest error of `hybrid_decode`, whether the selection is exact, and whether two calls agree to the bit."""
    layer = make_layer(page, head_dim, groups, dtype, seed, lone, kv)
    scale = head_dim**-0.5
    flags = None if dense is None else jnp.array(dense)
    options = {"spec": ops.SelectionSpec(BUDGET, 1, 2), "scale": scale, "dense": flags}
    call = call_with(ops.hybrid_decode, heads, known, implementation="mosaic_gpu", **options)
    (out, pages, counts), same = twice(call, *layer.arrays)
    if kv is not None and page == 64 and groups == 4 and not lone:  # as the interpreter runs it
        plain = call_with(mosaic_gpu.hybrid_decode, heads, known, config=DecodeConfig(inlined=False), **options)
        others = jax.tree.leaves(plain(*layer.arrays))
        same &= all(np.array_equal(a, b) for a, b in zip(others, (out, pages, counts), strict=True))
    named = [head for head in heads if head >= 0]
    want, handed, margin = oracle.hybrid_decode(
        *layer.cache, layer.pages, named, oracle.Rule(BUDGET, 1, 2), scale=scale
    )
    if dense is not None:
        full, _ = oracle.dense_decode(*layer.cache, range(KV_HEADS), scale=scale)
        for b in np.flatnonzero(dense):  # such a row hands on what it got
            want[b], handed[b] = full[b], layer.pages[b]
    error = float(np.abs(out.astype(np.float64) - want).max())
    expected = padded(handed)
    exact = bool((pages == expected[0]).all() and (counts == expected[1]).all()) or margin < 1e-4
    return error, exact, same


def check_parts(
    page: int, head_dim: int, groups: int, dtype: str, heads: list[int], seed: int, *, known: bool, lone: bool = False,
    kv: str | None = None,
) -> tuple[float, float, bool]:  # fmt: skip
    """Largest errors of the outputs and of the log-sum-exps of `dense_decode` and `sparse_decode`, and repeats."""
    layer = make_layer(page, head_dim, groups, dtype, seed, lone, kv)
    scale = head_dim**-0.5
    *arrays, selection = layer.arrays
    real = np.flatnonzero(np.array(heads) >= 0)  # nobody writes the page scores of a place without a head
    options = {"scale": scale, "return_lse": True, "implementation": "mosaic_gpu"}
    decode = call_with(ops.dense_decode, heads, known, page_scores="max", **options)

    def dense(*args: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        out, scores, lse = decode(*args)
        return out, scores[:, real], lse

    sparse = call_with(ops.sparse_decode, heads, known, **options)
    (full, _, full_lse), same = twice(dense, *arrays)
    (some, some_lse), again = twice(sparse, *arrays, selection)
    error = lse_error = 0.0
    for b, place in np.ndindex(full.shape[:2]):
        head = heads[place]
        k, v = oracle.read_cache(*layer.cache[1:3], b, int(layer.lengths[b]), max(head, 0))
        for out, lse, pages in ((full, full_lse, range(64)), (some, some_lse, layer.pages[b][head])):
            read = [j for j in range(len(k)) if head >= 0 and j // page in set(pages)]
            q = layer.q[b, max(head, 0)].astype(np.float64)
            want = oracle.attend(q, k[read], v[read], scale)
            want_lse = oracle.log_sum_exp(q, k[read], scale) if read else np.full(groups, ops.MASKED)
            error = max(error, float(np.abs(out[b, place].astype(np.float64) - want).max()))
            lse_error = max(lse_error, float(np.abs(lse[b, place] / want_lse - 1.0).max()))
    return error, lse_error, same and again


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


def check_long(kv: str | None, batch: int, seed: int) -> tuple[float, float, int]:
    """A layer of Llama-3-8B after 32 K tokens a row against XLA's ops: errors of outputs and scores, other pages."""
    page, context, kv_heads, width = 64, 32768, 8, 128
    used = context // page
    shapes = jax.eval_shape(
        lambda: ops.KVPages(
            jnp.zeros((batch * used, kv_heads, page, width), jnp.uint16),
            jnp.zeros((batch * used, kv_heads, 2 * page), jnp.float32) if kv == "int8" else None,
        )
    )
    (pool,) = random_pools((shapes,), jax.random.key(seed))
    rng = np.random.default_rng(seed)
    q = jnp.asarray(2 * rng.standard_normal((batch, kv_heads, 4, width)), jnp.bfloat16)
    table = jnp.asarray(rng.permutation(batch * used).reshape(batch, used).astype(np.int32))
    lengths = jnp.asarray(context - 37 * np.arange(batch), jnp.int32)
    chosen = np.stack([np.sort(rng.permutation(used - 40)[:64]) for _ in range(batch * kv_heads)]).astype(np.int32)
    selection = ops.Selection(
        jnp.asarray(chosen.reshape(batch, kv_heads, 64)), jnp.full((batch, kv_heads), 64, jnp.int32)
    )
    heads, spec = np.array([3], np.int32), ops.SelectionSpec(64, 2, 4)

    def hybrid(implementation: str) -> Any:
        call = functools.partial(
            ops.hybrid_decode, heads=heads, spec=spec, scale=width**-0.5, implementation=implementation
        )
        return jax.jit(call)(q, pool, table, lengths, selection)

    def dense(implementation: str) -> Any:
        call = functools.partial(
            ops.dense_decode, heads=heads, scale=width**-0.5, page_scores="max", implementation=implementation
        )
        return jax.jit(call)(q, pool, table, lengths)

    (out, picked), (want, right) = hybrid("mosaic_gpu"), hybrid("xla")
    (_, scores), (_, good) = dense("mosaic_gpu"), dense("xla")
    error = float(jnp.abs(out.astype(jnp.float32) - want.astype(jnp.float32)).max())
    others = int((np.asarray(picked.pages) != np.asarray(right.pages)).sum())
    real = np.arange(used) * page < np.asarray(lengths)[:, None, None]
    return error, float(np.abs(np.asarray(scores - good)[np.broadcast_to(real, scores.shape)]).max()), others


def check_large(kv: str | None, seed: int) -> tuple[float, bool]:
    """A pool of more than 2^31 elements: a token is written to its last page and read there, as in a small pool.

    Returns the largest difference, and whether the last page has what was written.
    """
    page, kv_heads, head_dim, scale = 64, 8, 128, 128**-0.5
    width = head_dim if kv else 2 * head_dim
    many = (1 << 31) // (kv_heads * page * width) + 40
    table = np.array([[3, 1, 2]], np.int32)  # of the small pool; of the large one its last pages
    length = 2 * page + 30
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.standard_normal((1, kv_heads, 4, head_dim)), jnp.bfloat16)
    new = jnp.asarray(rng.standard_normal((1, kv_heads, 2 * head_dim)), jnp.bfloat16)
    data = np.asarray(jnp.asarray(rng.standard_normal((4, kv_heads, page, 2 * head_dim)), jnp.bfloat16))
    small = quantized.as_pages(data, kv)

    @functools.partial(jax.jit, static_argnums=1)
    def grow(small: ops.KVPages, pages: int) -> ops.KVPages:
        def leaf(x: jax.Array) -> jax.Array:
            return jnp.zeros((pages, *x.shape[1:]), x.dtype).at[pages - 4 :].set(x)

        return jax.tree.map(leaf, small)

    @functools.partial(jax.jit, donate_argnums=0)
    def write(pool: ops.KVPages, table: jax.Array) -> ops.KVPages:
        where = jnp.array([length - 1], jnp.int32)
        return append_token(pool, table, where, jnp.ones((1,), bool), new)

    read = jax.jit(
        functools.partial(
            ops.dense_decode, heads=np.arange(kv_heads, dtype=np.int32), scale=scale, implementation="mosaic_gpu"
        )
    )
    found = []
    for pages in (4, many):
        # The page that is written to is the pool's last but one, what comes before it the last.
        ids = jnp.asarray(table + pages - 4)
        pool = write(grow(small, pages), ids)
        last = [np.asarray(x[pages - 4 :]) for x in jax.tree.leaves(pool)]
        found.append((np.asarray(read(q, pool, ids, jnp.array([length], jnp.int32))[0], np.float32), last))
        del pool
    (want, small_last), (got, large_last) = found
    kept = all(np.array_equal(a, b) for a, b in zip(small_last, large_last, strict=True))
    return float(np.abs(got - want).max()), kept


Check = tuple[str, Callable[[int], tuple[bool, str]]]


def checks() -> Iterator[tuple[str, Check]]:
    """Every check by its group: what it is called, and what says with a seed whether it is right, and the numbers."""

    def of_layer(case: Any, options: dict[str, Any], seed: int) -> tuple[bool, str]:
        error, exact, same = check(*case, seed=seed, **options)
        return error < 2e-2 and exact and same, f"error {error:.1e}, selection exact {exact}, repeats equal {same}"

    def of_parts(case: Any, options: dict[str, Any], seed: int) -> tuple[bool, str]:
        error, lse_error, same = check_parts(*case, seed=seed, **options)
        good = error < 2e-2 and lse_error < 1e-3 and same
        return good, f"error {error:.1e}, log-sum-exp {lse_error:.1e}, repeats equal {same}"

    def of_selection(capacity: int, ties: bool, seed: int) -> tuple[bool, str]:
        exact = check_select(capacity, ties, seed)
        return exact, f"exact {exact}"

    def of_chunk(case: Any, kv: str | None, seed: int) -> tuple[bool, str]:
        error, finite, same = check_chunk(*case, seed=seed, kv=kv)
        return error < 2e-2 and finite and same, f"error {error:.1e}, finite {finite}, repeats equal {same}"

    def of_long(kv: str, batch: int, seed: int) -> tuple[bool, str]:
        error, score_error, others = check_long(kv, batch, seed)
        good = error < 1e-2 and score_error < 1e-3 and others <= 2
        return good, f"differs from XLA by {error:.1e}, in scores by {score_error:.1e}, in {others} places of pages"

    def of_large(kv: str | None, seed: int) -> tuple[bool, str]:
        error, kept = check_large(kv, seed)
        return error == 0.0 and kept, f"differs from a small one by {error:.1e}, written alike {kept}"

    for group, layers in (("layers", [*((case, {}) for case in CASES), *VARIANTS]), ("kv8", WORDS)):
        for case, options in layers:
            yield group, (f"{case} {options or ''}", functools.partial(of_layer, case, options))
    for group, parts in (("parts", PARTS), ("kv8", WORD_PARTS)):
        for case, options in parts:
            yield group, (f"dense and sparse {case} {options}", functools.partial(of_parts, case, options))
    for capacity, ties in itertools.product(CAPACITIES, (False, True)):
        name = f"selection among {capacity} pages, {'ties' if ties else 'no ties'}"
        yield "select", (name, functools.partial(of_selection, capacity, ties))
    for kv in (None, "fp8", "int8"):
        # The kernels take int8 in pages of 32 tokens or more.
        for case in CHUNKS if kv is None else [case for case in CHUNKS[:3] if kv == "fp8" or case[0] >= 32]:
            yield "kv8" if kv else "chunks", (f"chunk {case} {kv or ''}", functools.partial(of_chunk, case, kv))
    for kv, batch in itertools.product(("fp8", "int8"), (1, 4)):
        yield "kv8", (f"32 K tokens, batch {batch}, {kv}", functools.partial(of_long, kv, batch))
    for kv in (None, "fp8", "int8"):
        name = f"a pool beyond 2^31 elements, {kv or 'bfloat16'}"
        yield "kv8" if kv else "large", (name, functools.partial(of_large, kv))


def main() -> int:
    """Check every case with a seed from the clock; 2 without a Hopper GPU, or with too few."""
    every = list(checks())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted({group for group, _ in every}), help="one group of checks")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="GPUs of this host")
    arguments = parser.parse_args()
    only, devices = arguments.only, arguments.devices
    try:
        multiprocessors()
    except NotImplementedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if devices > 1:
        return devices_check.check(devices)
    seed = int(time.time())
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, seed {seed}")
    bad = 0
    for group, (name, run) in every:
        if only in (None, group):
            good, found = run(seed)
            bad += not good
            print(f"{'ok ' if good else 'BAD'} {name}: {found}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
