"""Time of each op and its baselines, in one process: our kernels, plain XLA, cuDNN through JAX, and torch if it can.

A sample is one program of many calls, over caches that take turns, so that nothing comes from the L2 and the host's
share hardly counts.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from lychee_jax.benchmarks.rooflines import READ_BANDWIDTH
from lychee_jax.benchmarks.step import random_pools
from lychee_jax.benchmarks.torch_rivals import torch_attention
from pallas_kernels import KVPages, Selection, SelectionSpec
from pallas_kernels.types import KVDtype

# Calls of one program: several rounds of them where a launch costs as much as a short kernel takes.
_CALLS, _ROUNDS = 16, 8


@dataclasses.dataclass(frozen=True)
class KernelRow:
    """One measured op; times in microseconds."""

    name: str
    model: str
    dtype: str
    kv: str
    batch: int
    context: int
    retrieval_heads: int
    page_size: int
    pages: int
    us: float
    samples_us: list[float]
    rivals: dict[str, float]
    roofline_us: float
    ratio_to_roofline: float


@dataclasses.dataclass(frozen=True)
class Shape:
    """One layer's attention: `pages` selected pages, `sink` and `recent` forced ones."""

    model: str = "llama-3-8b"
    kv_heads: int = 8
    groups: int = 4
    head_dim: int = 128
    page_size: int = 64
    pages: int = 64
    sink: int = 2
    recent: int = 4
    dtype: str = "bfloat16"
    kv: KVDtype | None = None

    def pool(self, num_pages: int) -> KVPages:
        """The shapes of a pool."""
        kind, width = (jnp.dtype(self.dtype), 2 * self.head_dim) if self.kv is None else (jnp.uint16, self.head_dim)
        lead = num_pages, self.kv_heads

        def pool() -> KVPages:
            scales = jnp.zeros((*lead, 2 * self.page_size), jnp.float32) if self.kv == "int8" else None
            return KVPages(jnp.zeros((*lead, self.page_size, width), kind), scales)

        return jax.eval_shape(pool)

    @property
    def page_bytes(self) -> int:
        """Of a page of one KV head."""
        leaves = jax.tree.leaves(self.pool(1))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves) // self.kv_heads

    @property
    def scale(self) -> float:
        """1 / √H."""
        return self.head_dim**-0.5


def measure(
    shape: Shape,
    *,
    batches: Sequence[int],
    context: int,
    implementation: str | None = None,
    rivals: bool = True,
    repeats: int = 15,
    working_set: int = 1 << 30,
    report: Callable[[str], None] = lambda line: None,
) -> list[KernelRow]:
    """Time all ops at each batch size; caches that take turns hold `working_set` bytes or more, several times an L2."""
    _refuse(shape, context, implementation)
    rows = []
    for batch in batches:
        rows += measure_batch(shape, batch, context, implementation, rivals, repeats, working_set, report)
    return rows


def _refuse(shape: Shape, context: int, implementation: str | None) -> None:
    """Whatever an implementation does not run is refused here, before gigabytes are made for it."""
    kind, head = jnp.dtype(shape.dtype), np.array([0], np.int32)
    pages = -(-context // shape.page_size)
    jax.eval_shape(
        functools.partial(
            pallas_kernels.dense_decode, heads=head, scale=shape.scale, page_scores="max", implementation=implementation
        ),
        jax.ShapeDtypeStruct((1, shape.kv_heads, shape.groups, shape.head_dim), kind),
        shape.pool(pages),
        jax.ShapeDtypeStruct((1, pages), jnp.int32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )


def measure_batch(
    shape: Shape, batch: int, context: int, implementation: str | None, rivals: bool, repeats: int,
    working_set: int, report: Callable[[str], None],
) -> list[KernelRow]:  # fmt: skip
    """All ops at one batch size; see `measure`."""
    rng = np.random.default_rng(batch)
    size, kv_heads = shape.page_size, shape.kv_heads
    used = -(-context // size)
    num_pages = batch * used + 1
    page_bytes = shape.page_bytes
    turns = max(2, -(-working_set // (num_pages * kv_heads * page_bytes)))
    pools = random_pools((shape.pool(num_pages),) * turns, jax.random.key(0))
    queries = [
        jax.random.normal(key, (batch, kv_heads, shape.groups, shape.head_dim), jnp.dtype(shape.dtype))
        for key in jax.random.split(jax.random.key(1), _CALLS)
    ]
    table = jnp.asarray(rng.permutation(num_pages)[: batch * used].reshape(batch, used).astype(np.int32))
    lengths = jnp.full((batch,), context, jnp.int32)
    count = min(shape.pages, used)
    chosen = np.stack([np.sort(rng.permutation(used)[:count]) for _ in range(batch * kv_heads)])
    chosen = np.pad(chosen, ((0, 0), (0, shape.pages - count)), constant_values=-1).astype(np.int32)
    selection = Selection(
        jnp.asarray(chosen.reshape(batch, kv_heads, -1)), jnp.full((batch, kv_heads), count, jnp.int32)
    )
    scores = [
        jax.random.normal(key, (batch, kv_heads, used), jnp.float32)
        for key in jax.random.split(jax.random.key(2), _CALLS)
    ]
    spec = SelectionSpec(shape.pages, shape.sink, shape.recent)
    every, one = np.arange(kv_heads, dtype=np.int32), np.array([kv_heads // 2], np.int32)

    def over_caches(call: Callable[..., Any]) -> list[float]:
        return _time(lambda i, qs, ps: call(qs[i], ps[i % turns], table, lengths), (queries, pools), repeats)

    reads = {"dense": batch * used * page_bytes, "sparse": batch * count * page_bytes}
    sparse = functools.partial(pallas_kernels.sparse_decode, selection=selection, heads=every, scale=shape.scale)
    dense = functools.partial(pallas_kernels.dense_decode, scale=shape.scale, page_scores="max")
    hybrid = functools.partial(
        pallas_kernels.hybrid_decode, selection=selection, heads=one, spec=spec, scale=shape.scale
    )
    cases: list[tuple[str, int, int, Callable[..., Any]]] = [
        ("sparse_decode", 0, kv_heads * reads["sparse"], sparse),
        ("dense_decode", kv_heads, kv_heads * reads["dense"], functools.partial(dense, heads=every)),
        ("dense_decode", 1, reads["dense"], functools.partial(dense, heads=one)),
        ("hybrid_decode", 1, reads["dense"] + (kv_heads - 1) * reads["sparse"], hybrid),
    ]
    rows = []

    def add(
        name: str, heads: int, read: int, time_of: Callable[[str | None], list[float]], others: dict[str, float]
    ) -> None:
        report(f"{name}, {heads} retrieval heads, batch {batch}")
        samples = time_of(implementation)
        found = dict(others)
        if rivals:
            found["xla"] = float(np.median(time_of("xla")))
        us, roofline = float(np.median(samples)), 1e6 * read / READ_BANDWIDTH
        rows.append(
            KernelRow(
                name, shape.model, shape.dtype, shape.kv or shape.dtype, batch, context, heads, size, shape.pages, us,
                samples, found, roofline, us / roofline,
            )
        )  # fmt: skip

    attention: dict[str, float] = {}
    if rivals:
        report(f"dense baselines, batch {batch}")
        attention = _dense_rivals(shape, batch, context, queries, repeats, working_set)
    for name, heads, read, call in cases:
        add(
            name,
            heads,
            read,
            lambda which, call=call: over_caches(functools.partial(call, implementation=which)),
            attention if heads == kv_heads else {},
        )

    def select(which: str | None) -> list[float]:
        def call(i: int, scores: Any) -> Any:
            return pallas_kernels.select_pages(scores[i], lengths, spec, page_size=size, implementation=which)

        return _time(call, (scores,), repeats)

    add("select_pages", kv_heads, scores[0].nbytes, select, {})
    return rows


def _time(call: Callable[..., Any], arguments: tuple[Any, ...], repeats: int) -> list[float]:
    """Microseconds of `call(i, *arguments)`, `repeats` samples."""
    rounds = _ROUNDS if jax.default_backend() == "gpu" else 1

    def program(first: Any, *rest: Any) -> jax.Array:
        def turn(_: Any, found: jax.Array) -> jax.Array:
            # No call may be taken out of the loop: its queries, or scores, come with what the last round found. (What
            # an implementation does with pages alone may be, where it takes all of them at once: below 1024 tokens.)
            args, found = jax.lax.optimization_barrier((first, found))
            outputs = [leaf for i in range(_CALLS) for leaf in jax.tree.leaves(call(i, args, *rest))]
            outputs = jax.lax.optimization_barrier(outputs)  # whole ones, not only what is looked at
            return sum((leaf.ravel()[0].astype(jnp.float32) for leaf in outputs), found)

        return jax.lax.fori_loop(0, rounds, turn, jnp.float32(0))

    program = jax.jit(program)
    jax.block_until_ready(program(*arguments))
    samples = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        samples.append(1e6 * (time.perf_counter() - started) / (_CALLS * rounds))
    return samples[2:]


def _dense_rivals(
    shape: Shape, batch: int, context: int, queries: list[jax.Array], repeats: int, working_set: int
) -> dict[str, float]:
    """Dense attention over contiguous keys and values."""
    found = {}
    if jax.default_backend() == "gpu":
        turns = max(2, -(-working_set // (2 * batch * context * shape.kv_heads * shape.head_dim * 2)))
        size = (batch, context, shape.kv_heads, shape.head_dim)
        make = jax.jit(lambda key: jax.random.normal(key, size, jnp.dtype(shape.dtype)))
        keys = jax.random.split(jax.random.key(3), 2 * turns)
        caches = [(make(keys[2 * i]), make(keys[2 * i + 1])) for i in range(turns)]
        flat = [q.reshape(batch, 1, -1, shape.head_dim) for q in queries]

        def cudnn(i: int, qs: Any, caches: Any) -> Any:
            k, v = caches[i % turns]
            return jax.nn.dot_product_attention(qs[i], k, v, scale=shape.scale, implementation="cudnn")

        found["jax_cudnn"] = float(np.median(_time(cudnn, (flat, caches), repeats)))
        del caches
    for name, samples in torch_attention(
        batch, context, shape.kv_heads, shape.groups, shape.head_dim, shape.dtype, calls=_CALLS, repeats=repeats
    ).items():
        found[name] = float(np.median(samples))
    return found


def table(rows: Sequence[KernelRow]) -> str:
    """The rows as text."""
    lines = [f"{'op':<14} {'batch':>5} {'retrieving':>10} {'µs':>9} {'bytes allow':>11} {'ratio':>6}  baselines (µs)"]
    for row in rows:
        rivals = ", ".join(f"{name} {us:.1f}" for name, us in row.rivals.items())
        lines.append(
            f"{row.name:<14} {row.batch:>5} {row.retrieval_heads:>10} {row.us:>9.1f} {row.roofline_us:>11.1f} "
            f"{row.ratio_to_roofline:>6.2f}  {rivals}"
        )
    return "\n".join(lines)
