"""The GPU kernels on a real GPU against the float64 oracle: `PYTHONPATH=. python tests/hardware/gpu_check.py`.

With `--devices N` instead: one model on one GPU and on N of this host, see `devices_check`.

Fresh random data, ragged lengths at the borders of pages and tiles, NaN in every slot that must not be read, memory
that was poisoned before the call, and every call twice: it must give the same bits. The interpreter's tests cannot see
what the compiler or the hardware makes of a kernel.
"""

import argparse
import dataclasses
import functools
import itertools
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as ops
from pallas_kernels.mosaic_gpu.common import multiprocessors
from tests.hardware import devices_check
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


@dataclasses.dataclass
class Layer:
    """A ragged batch over a paged cache, and the pages that every head inherits."""

    q: np.ndarray
    pool: np.ndarray
    table: np.ndarray
    lengths: np.ndarray
    pages: list[list[list[int]]]

    @property
    def arrays(self) -> tuple[Any, ...]:
        """What `sparse_decode` takes before the heads; `dense_decode` takes all but the last."""
        return (
            jnp.asarray(self.q), ops.KVPages(jnp.asarray(self.pool)), jnp.asarray(self.table),
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


def make_layer(page: int, head_dim: int, groups: int, dtype: str, seed: int, lone: bool = False) -> Layer:
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
    q, pool = (np.asarray(jnp.asarray(x, dtype)) for x in (q, pool))
    return Layer(q, pool, table, np.array(lengths, np.int32), pages)


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
    call = functools.partial(op, implementation="mosaic_gpu", **options)
    if known:
        return jax.jit(functools.partial(call, heads=named))
    return functools.partial(jax.jit(lambda heads, *args: call(*args, heads=heads)), jnp.asarray(named))


def check(
    page: int, head_dim: int, groups: int, dtype: str, heads: list[int], seed: int, *, lone: bool = False,
    known: bool = True, dense: list[bool] | None = None,
) -> tuple[float, bool, bool]:  # fmt: skip
    """Largest error of `hybrid_decode`, whether the selection is exact, and whether two calls agree to the bit."""
    layer = make_layer(page, head_dim, groups, dtype, seed, lone)
    scale = head_dim**-0.5
    flags = None if dense is None else jnp.array(dense)
    call = call_with(ops.hybrid_decode, heads, known, spec=ops.SelectionSpec(BUDGET, 1, 2), scale=scale, dense=flags)
    (out, pages, counts), same = twice(call, *layer.arrays)
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
    page: int, head_dim: int, groups: int, dtype: str, heads: list[int], seed: int, *, known: bool, lone: bool = False
) -> tuple[float, float, bool]:
    """Largest errors of the outputs and of the log-sum-exps of `dense_decode` and `sparse_decode`, and repeats."""
    layer = make_layer(page, head_dim, groups, dtype, seed, lone)
    scale = head_dim**-0.5
    *arrays, selection = layer.arrays
    real = np.flatnonzero(np.array(heads) >= 0)  # nobody writes the page scores of a place without a head
    decode = call_with(ops.dense_decode, heads, known, scale=scale, page_scores="max", return_lse=True)

    def dense(*args: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        out, scores, lse = decode(*args)
        return out, scores[:, real], lse

    sparse = call_with(ops.sparse_decode, heads, known, scale=scale, return_lse=True)
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


def main() -> int:
    """Check every case with a seed from the clock; 2 without a Hopper GPU, or with too few."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="GPUs of this host")
    devices = parser.parse_args().devices
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
    for case, options in [*((case, {}) for case in CASES), *VARIANTS]:
        error, exact, same = check(*case, seed=seed, **options)
        good = error < 2e-2 and exact and same
        bad += not good
        print(
            f"{'ok ' if good else 'BAD'} {case} {options or ''}: error {error:.1e}, selection exact {exact}, "
            f"repeats equal {same}",
            flush=True,
        )
    for case, options in PARTS:
        error, lse_error, same = check_parts(*case, seed=seed, **options)
        good = error < 2e-2 and lse_error < 1e-3 and same
        bad += not good
        print(
            f"{'ok ' if good else 'BAD'} dense and sparse {case} {options}: error {error:.1e}, "
            f"log-sum-exp {lse_error:.1e}, repeats equal {same}",
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
