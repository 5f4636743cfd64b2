"""Paged caches of random data for tests of ops: ragged lengths, NaN wherever nothing was written."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as ops
from pallas_kernels import KVPages, Selection, SelectionSpec
from pallas_kernels.types import KVDtype
from tests.support import oracle, quantized

PAGES = 6


KV_HEADS = 3


BUDGET = 4


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shapes that a kernel may depend on; `kv`: of a cache of 8-bit numbers, what these are."""

    page_size: int
    head_dim: int
    group: int
    dtype: str = "float32"
    kv: KVDtype | None = None

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def tolerance(self) -> float:
        """Of an output: a convex mix of values of size 1, rounded to `dtype`; scores are float32 in either."""
        return 2e-5 if self.dtype == "float32" else 2e-2


SHAPES = [
    Shape(1, 8, 1),
    Shape(3, 16, 7),
    Shape(16, 64, 4),
    Shape(64, 128, 2),
    Shape(3, 64, 8, "bfloat16"),
    Shape(16, 128, 4, "bfloat16"),
    Shape(64, 8, 1, "bfloat16"),
]


@dataclasses.dataclass
class Cache:
    """A ragged batch whose lengths sit at the borders of pages, and queries peaked enough that pages differ.

    `kv_pages` are the numbers to be read, whatever the cache holds for them.
    """

    q: Any
    kv_pages: Any
    page_table: Any
    lengths: Any
    kv: KVDtype | None = None  # `kv_pages` are stored so; they hold the floats that are read of it

    @property
    def arrays(self) -> tuple[jax.Array, KVPages, jax.Array, jax.Array]:
        pool = quantized.as_pages(self.kv_pages, self.kv)
        return jnp.asarray(self.q), pool, jnp.asarray(self.page_table), jnp.asarray(self.lengths)


def make_cache(shape: Shape, seed: int = 0, lengths: Sequence[int] | None = None) -> Cache:
    """Permuted pages, a prefix page that rows share, a page table that ends in garbage."""
    rng = np.random.default_rng(seed)
    page, dtype = shape.page_size, jnp.dtype(shape.dtype)
    if lengths is None:
        lengths = [0, 1, page - 1, page, page + 1, 4 * page + page // 2 + 1, PAGES * page]
    B, P = len(lengths), oracle.page_count(max(lengths), page)
    # Page 0 and the last page belong to nobody: where a bad entry of the table gets clipped or wrapped to.
    num_pages = B * P + 2
    kv_pages = np.full((num_pages, KV_HEADS, page, 2 * shape.head_dim), np.nan, np.float32)
    free = iter(1 + rng.permutation(num_pages - 2))
    garbage = np.array([-1, -7, num_pages, num_pages - 1, 0, 2**31 - 1, -(2**31)])
    page_table = rng.choice(garbage, (B, P)).astype(np.int32)
    for b, length in enumerate(lengths):
        for p in range(oracle.page_count(length, page)):
            if p == 0 and b == B - 1:
                page_table[b, p] = page_table[B - 2, p]  # a shared prefix
                continue
            page_table[b, p] = next(free)
            used = min(page, length - p * page)
            kv_pages[page_table[b, p], :, :used] = rng.standard_normal((KV_HEADS, used, 2 * shape.head_dim))
    q = 3 * rng.standard_normal((B, KV_HEADS, shape.group, shape.head_dim), np.float32)
    numbers = kv_pages.astype(dtype) if shape.kv is None else quantized.store_pool(kv_pages, shape.kv).read
    return Cache(q.astype(dtype), numbers, page_table, np.array(lengths, np.int32), shape.kv)


def spec_of(rule: oracle.Rule) -> SelectionSpec:
    """The oracle's rule as the ops take it."""
    return SelectionSpec(rule.budget, rule.sink, rule.recent, rule.name, rule.amount, rule.page_score)  # type: ignore[arg-type]


def run(op: Any, *args: Any, **static: Any) -> Any:
    """One compiled call of the XLA implementation, and the proof that it was no other."""
    with ops.recorded() as calls:
        result = jax.jit(functools.partial(op, implementation="xla", **static))(*args)
    assert calls == [(op.__name__, "xla")]
    return result


def some_pages(cache: Cache, page_size: int, most: int = BUDGET) -> list[list[list[int]]]:
    """For every row and KV head a random set of its pages, at most `most` of them, for some heads none."""
    rng = np.random.default_rng(1)
    sizes = [oracle.page_count(int(length), page_size) for length in cache.lengths]
    return [
        [sorted(rng.permutation(P)[: (most - k - b) % (most + 1)].tolist()) for k in range(KV_HEADS)]
        for b, P in enumerate(sizes)
    ]


def padded(pages: Sequence[Sequence[Sequence[int]]], width: int) -> Selection:
    """Lists of pages as the arrays that ops hand to each other."""
    array = [[[*head, *[-1] * (width - len(head))] for head in row] for row in pages]
    counts = [[len(head) for head in row] for row in pages]
    return Selection(jnp.array(array, jnp.int32), jnp.array(counts, jnp.int32))
