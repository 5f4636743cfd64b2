"""Time of the whole jitted decode step of a large model: random weights of its shape, a cache of random content.

Dense attention is timed with two backends: over pages, as the engine decodes, and with cuDNN over contiguous caches,
the best that JAX offers without pages. Hybrid attention and these baselines run in the same process.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lychee_jax.attention.backend import attention_scale
from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.benchmarks.rooflines import READ_BANDWIDTH
from lychee_jax.cache.allocator import pages_for
from lychee_jax.cache.pages import Pools, cache_bytes, make_pools
from lychee_jax.config import ModelConfig, Quantization
from lychee_jax.engine.options import EngineConfig, EngineOptions, max_pages
from lychee_jax.engine.programs import DecodePlan, Rows, decode_block, make_rows
from lychee_jax.engine.request import MAX_EOS_IDS
from lychee_jax.errors import UserError
from lychee_jax.models.rope import rotary_tables
from lychee_jax.models.spec import ModelSpec
from lychee_jax.parallel.layouts import POOLS, Layout, layout_for, share_of
from lychee_jax.parallel.mesh import EVERYWHERE
from pallas_kernels import KVPages
from pallas_kernels.types import KVDtype

Mode = Literal["hybrid", "dense", "cudnn"]
_STEPS = 16


@dataclasses.dataclass(frozen=True)
class StepRow:
    """One measured step; times in microseconds, bytes as counted, over all `devices`.

    The roofline is that of the device that reads most.
    """

    name: str
    model: str
    dtype: str
    batch: int
    context: int
    retrieval_heads: int
    kv_heads: int
    page_size: int
    pages: int
    us: float
    samples_us: list[float]
    rivals: dict[str, float]
    roofline_us: float
    ratio_to_roofline: float
    weight_bytes: int
    cache_bytes: int
    peak_bytes: int | None
    pool_copies: int
    weights: str
    kv: str
    devices: int = 1


def spread_heads(config: ModelConfig, count: int) -> HeadMap:
    """All KV heads of layer 0, the other retrieval heads spread evenly over layers and indices."""
    first = config.num_kv_heads
    if not first <= count <= config.num_layers * first:
        raise UserError(
            f"{count} retrieval heads were asked for; layer 0 alone has {first}, the model {config.num_layers * first}"
        )
    layers = [list(range(first))] + [[] for _ in range(config.num_layers - 1)]
    rest = count - first
    for j in range(rest):
        layer = layers[1 + j * (config.num_layers - 1) // rest]
        layer.append(next(h for h in ((j + k) % first for k in range(first)) if h not in layer))
    return HeadMap(config.num_layers, first, tuple(tuple(sorted(layer)) for layer in layers), "spread")


def random_model(
    config: ModelConfig, dtype: Any, layout: Layout | None = None
) -> tuple[ModelSpec, tuple[jax.Array, ...]]:
    """Weights of the model's shape, quantised as the config says, made on their devices leaf by leaf."""
    spec, shapes = ModelSpec.abstract(config, dtype, layout)

    @functools.cache
    def maker(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
        def make(key: jax.Array) -> jax.Array:
            if dtype == jnp.int8:
                return jax.random.randint(key, shape, -127, 128, jnp.int8)
            if dtype == jnp.float8_e4m3fn:
                return jax.random.normal(key, shape, jnp.bfloat16).astype(dtype)
            return 0.02 * jax.random.normal(key, shape, dtype)

        return jax.jit(make, out_shardings=sharding)

    keys = jax.random.split(jax.random.key(0), len(shapes))
    made = (maker(leaf.shape, leaf.dtype, leaf.sharding)(key) for key, leaf in zip(keys, shapes, strict=True))
    return spec, tuple(made)


def measure(
    model: str,
    config: ModelConfig,
    *,
    batches: Sequence[int],
    context: int,
    retrieval_heads: int = 32,
    policy: SelectionPolicy | None = None,
    page_size: int = 64,
    dtype: Any = jnp.bfloat16,
    quantize: Quantization | None = None,
    implementation: str | None = None,
    kv_dtype: KVDtype | None = None,
    modes: Sequence[Mode] | None = None,
    repeats: int = 7,
    tensor_parallel: int = 1,
    report: Callable[[str], None] = lambda line: None,
) -> list[StepRow]:
    """Time a decode step at each batch size: a row for the hybrid step, with the dense baselines in it.

    A sample is the mean of 3 × 16 steps that are sent without waiting, as `generate` does. `modes`: by default all,
    but cuDNN on one device alone.

    Raises:
        UserError: fewer devices, or fewer retrieval heads than layer 0 has.
    """
    if modes is None:
        modes = ("hybrid", "dense", "cudnn") if tensor_parallel == 1 else ("hybrid", "dense")
    policy = policy or SelectionPolicy()
    most = max(config.max_position_embeddings, context)
    config = dataclasses.replace(config, max_position_embeddings=most, quantize=quantize)
    head_map = spread_heads(config, retrieval_heads)
    layout = layout_for(config, tensor_parallel, head_map.roles)
    spec, shapes = ModelSpec.abstract(config, dtype, layout)
    programs: dict[tuple[int, Mode], _Program] = {}
    for batch, mode in itertools.product(batches, modes):
        if mode == "cudnn":
            programs[batch, mode] = _Contiguous.lower(spec, shapes, batch, context)
        else:
            plan = DecodePlan(head_map if mode == "hybrid" else None, policy, _STEPS, implementation)
            programs[batch, mode] = _Paged.lower(spec, shapes, plan, batch, context, page_size, kv_dtype)
    report(f"{model}: {len(programs)} programs are compiled")
    # Side by side, and before anything is timed.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for done in [pool.submit(getattr, program, "compiled") for program in programs.values()]:
            done.result()
    _, weights = random_model(config, dtype, layout)
    weight_bytes = sum(leaf.nbytes for leaf in weights)
    read_bytes = weight_bytes / tensor_parallel
    if not config.tie_word_embeddings:  # one row of it is read
        read_bytes -= config.vocab_size * config.hidden_size * jnp.dtype(dtype).itemsize / tensor_parallel
    rows = []
    for batch in batches:
        times: dict[str, list[float]] = {}
        peak, copies, held = None, 0, 0
        for mode in modes:
            report(f"{model}, batch {batch}, {mode}")
            program = programs.pop((batch, mode))
            times[mode] = _samples(program.runner(weights), repeats)
            if isinstance(program, _Paged):
                peak = peak_bytes(peak)
                copies, held = max(copies, program.pool_copies), program.cache_bytes
        us = float(np.median(times["hybrid"]))
        page = cache_bytes(config, 1, page_size, dtype, kv_dtype) // (config.num_layers * config.num_kv_heads)
        pages = pages_for(context, page_size)
        read = pages_read(head_map, layout, pages, min(pages, policy.budget // page_size))
        roofline = 1e6 * (read_bytes + batch * read * page) / READ_BANDWIDTH
        rivals = {
            {"dense": "dense", "cudnn": "dense_cudnn"}[mode]: float(np.median(values))
            for mode, values in times.items()
            if mode != "hybrid"
        }
        rows.append(
            StepRow(
                "decode_step", model, str(jnp.dtype(dtype)), batch, context, head_map.num_retrieval,
                config.num_layers * config.num_kv_heads, page_size, policy.budget // page_size, us, times["hybrid"],
                rivals, roofline, us / roofline, weight_bytes, held, peak, copies,
                quantize or str(jnp.dtype(dtype)), kv_dtype or str(jnp.dtype(dtype)), tensor_parallel,
            )
        )  # fmt: skip
    return rows


def pages_read(head_map: HeadMap, layout: Layout | None, all_pages: int, picked: int) -> int:
    """Pages that the device which reads most reads of a sequence, layer by layer."""
    every, total = range(head_map.num_kv_heads), 0
    for retrieval in head_map.retrieval:
        sparse = [head for head in every if head not in retrieval]
        shares = zip(*((layout.heads_by_device(own) if layout else [own]) for own in (retrieval, sparse)), strict=True)
        total += max(len(reads) * all_pages + len(others) * picked for reads, others in shares)
    return total


def random_pools(pools: Pools, key: jax.Array) -> Pools:
    """Pools of these shapes with normal numbers, made one by one where they are to lie."""
    shapes = pools[0]

    @functools.partial(jax.jit, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes))
    def make(key: jax.Array) -> KVPages:
        if shapes.quantized is None:
            return KVPages(jax.random.normal(key, shapes.data.shape, shapes.data.dtype))
        # Without the highest bit of the exponent: bytes of e4m3 below 2, and none of them NaN.
        words = jax.random.bits(key, shapes.data.shape, jnp.uint16) & jnp.uint16(0xBFBF)
        return KVPages(words, None if shapes.scales is None else jnp.full(shapes.scales.shape, 1 / 32, jnp.float32))

    return tuple(make(each) for each in jax.random.split(key, len(pools)))


def peak_bytes(before: int | None) -> int | None:
    """The most device memory that this process has held, as far as the device tells; `before` if that was more."""
    stats = jax.devices()[0].memory_stats() or {}
    return max(before or 0, stats["peak_bytes_in_use"]) if "peak_bytes_in_use" in stats else None


def _samples(run: Callable[[int], None], repeats: int) -> list[float]:
    """Microseconds of a step."""
    run(1)
    run(3)
    samples = []
    for _ in range(repeats):
        started = time.perf_counter()
        run(3)
        samples.append(1e6 * (time.perf_counter() - started) / (3 * _STEPS))
    return samples


def pool_copies(program: str, pool: jax.Array | jax.ShapeDtypeStruct) -> int:
    """How many instructions of a compiled program copy a whole pool, or its scales.

    Raises:
        ValueError: no array of this kind is in the program.
    """
    kind = {
        "bfloat16": "bf16", "float16": "f16", "float32": "f32", "uint16": "u16", "int8": "s8",
        "float8_e4m3fn": "f8e4m3fn",
    }[str(pool.dtype)]  # fmt: skip
    shape = f"{kind}[{','.join(map(str, pool.shape))}]"
    if shape not in program:
        raise ValueError(f"{shape} is not in the program, which would pass for copying nothing")
    shape = re.escape(shape)
    return len(re.findall(rf"= {shape}\S* (?:copy|copy-start|dynamic-update-slice|transpose)\(", program))


@dataclasses.dataclass
class _Program:
    """A decode step in a loop: lowered from shapes alone, compiled, and then run over a cache of random content."""

    lowered: jax.stages.Lowered

    @functools.cached_property
    def compiled(self) -> jax.stages.Compiled:
        """Compiled when it is first asked for, on whatever thread."""
        return self.lowered.compile()

    def runner(self, weights: tuple[jax.Array, ...]) -> Callable[[int], None]:
        """Make a cache; returns what runs so many blocks of steps over it."""
        raise NotImplementedError


@dataclasses.dataclass
class _Paged(_Program):
    """As the engine decodes: the shapes of the pools, the state of the rows, and the arguments beside them.

    `everywhere`: all devices, where there are several.
    """

    pools: Pools
    rows: Rows
    rest: tuple[Any, ...]
    everywhere: Any

    @classmethod
    def lower(
        cls,
        spec: ModelSpec,
        weights: tuple[Any, ...],
        plan: DecodePlan,
        batch: int,
        context: int,
        page_size: int,
        kv_dtype: KVDtype | None,
    ) -> "_Paged":
        """Lower `decode_block` for the last tokens of the context."""
        config = spec.config
        width = max(batch, EngineConfig.of(jax.default_backend(), config).min_rows)
        slots = max(width, EngineOptions().max_num_seqs)
        each = pages_for(context, page_size)
        held, layout = config if spec.layout is None else spec.layout.whole(config), spec.layout
        pools = jax.eval_shape(lambda: make_pools(held, batch * each + width, page_size, weights[0].dtype, kv_dtype))
        pools = pools if layout is None else layout.shapes(pools, POOLS)
        table = np.zeros((width, max_pages(context, page_size)), np.int32)
        table[:batch, :each] = np.arange(batch * each).reshape(batch, each)
        busy = np.arange(slots) < batch
        rows = make_rows(slots, config.vocab_size, MAX_EOS_IDS)._replace(
            position=np.where(busy, context - _STEPS, 0).astype(np.int32), active=busy,
            remaining=np.full((slots,), np.iinfo(np.int32).max, np.int32),
        )  # fmt: skip
        number = np.where(np.arange(width) < batch, np.arange(width), slots).astype(np.int32)
        numbers = context - _STEPS + np.arange(_STEPS)[None].repeat(width, 0)
        forced = np.full((width, _STEPS), -1, np.int32)
        rest = (number, table, *_rotary(config, numbers), forced, np.zeros((width,), bool))
        given = rows, *rest
        if layout is not None:
            given = jax.tree.map(layout.shape_of, given)
        everywhere = None if layout is None else layout.sharding(EVERYWHERE)
        return cls(decode_block.lower(spec, plan, weights, pools, *given), pools, rows, rest, everywhere)

    @property
    def cache_bytes(self) -> int:
        """Of all pools."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.pools))

    @property
    def pool_copies(self) -> int:
        """How many instructions copy a whole pool, or a device's share of one."""
        program = self.compiled.as_text() or ""
        return sum(pool_copies(program, share_of(leaf)) for leaf in jax.tree.leaves(self.pools[0]))

    def runner(self, weights: tuple[jax.Array, ...]) -> Callable[[int], None]:
        pools = random_pools(self.pools, jax.random.key(1))
        rows = jax.device_put(jax.tree.map(jnp.array, self.rows), self.everywhere)
        held: dict[str, Any] = {"pools": pools, "rows": rows}

        def run(count: int) -> None:
            block: Any = None
            for _ in range(count):
                # Every block writes the same last tokens of the context.
                rows = held["rows"]._replace(position=self.rows.position, remaining=self.rows.remaining)
                held["pools"], held["rows"], block, _ = self.compiled(weights, held["pools"], rows, *self.rest)
            jax.block_until_ready(block)

        return run


@dataclasses.dataclass(frozen=True)
class _OverCaches:
    """One new token a row over caches `[B, S, K, H]`, all rows equally long, by cuDNN."""

    position: Int[Array, ""]

    def __call__(
        self, index: int, q: jax.Array, k: jax.Array, v: jax.Array, state: tuple[tuple[jax.Array, jax.Array], ...]
    ) -> tuple[jax.Array, tuple[tuple[jax.Array, jax.Array], ...]]:
        keys, values = state[index]
        start = (0, self.position, 0, 0)
        keys, values = (jax.lax.dynamic_update_slice(old, new, start) for old, new in ((keys, k), (values, v)))
        batch, length, kv_heads, groups, head_dim = q.shape
        lengths = jnp.full((batch,), self.position + 1, jnp.int32)
        # JAX's own code mixes types where cuDNN is not used.
        with jax.numpy_dtype_promotion("standard"):
            out = jax.nn.dot_product_attention(
                q.reshape(batch, length, kv_heads * groups, head_dim), keys, values, scale=attention_scale(head_dim),
                key_value_seq_lengths=lengths, implementation="cudnn" if jax.default_backend() == "gpu" else "xla",
            )  # fmt: skip
        return out.reshape(q.shape), (*state[:index], (keys, values), *state[index + 1 :])


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(2,))
def _contiguous_block(
    spec: ModelSpec,
    weights: tuple[jax.Array, ...],
    caches: tuple[tuple[jax.Array, jax.Array], ...],
    first: Int[Array, ""],
    cos: Float[Array, "1 steps half"],
    sin: Float[Array, "1 steps half"],
) -> tuple[Any, Int[Array, " B"]]:
    model = spec.merge(weights)

    def step(i: jax.Array, carry: Any) -> Any:
        caches, token = carry
        cos_i, sin_i = (jax.lax.dynamic_slice_in_dim(table, i, 1, axis=1) for table in (cos, sin))
        hidden, caches = model(token[:, None], cos_i, sin_i, _OverCaches(first + i), caches)
        return caches, jnp.argmax(model.logits(hidden[:, 0]), axis=-1).astype(jnp.int32)

    token = jnp.zeros((caches[0][0].shape[0],), jnp.int32)
    return jax.lax.fori_loop(0, cos.shape[1], step, (caches, token))


@dataclasses.dataclass
class _Contiguous(_Program):
    """Contiguous caches, and cuDNN."""

    cache: jax.ShapeDtypeStruct
    layers: int
    rest: tuple[Any, ...]

    @classmethod
    def lower(cls, spec: ModelSpec, weights: tuple[Any, ...], batch: int, context: int) -> "_Contiguous":
        """Lower `_contiguous_block`."""
        config = spec.config
        cache = jax.ShapeDtypeStruct((batch, context, config.num_kv_heads, config.head_dim), weights[0].dtype)
        caches = tuple((cache, cache) for _ in range(config.num_layers))
        rest = (
            jnp.int32(context - _STEPS),
            *map(jnp.asarray, _rotary(config, context - _STEPS + np.arange(_STEPS)[None])),
        )
        lowered = _contiguous_block.lower(spec, weights, caches, *rest)
        return cls(lowered, cache, config.num_layers, rest)

    def runner(self, weights: tuple[jax.Array, ...]) -> Callable[[int], None]:
        make = jax.jit(lambda key: jax.random.normal(key, self.cache.shape, self.cache.dtype))
        keys = jax.random.split(jax.random.key(1), 2 * self.layers)
        held: dict[str, Any] = {"caches": tuple((make(keys[2 * i]), make(keys[2 * i + 1])) for i in range(self.layers))}

        def run(count: int) -> None:
            token: Any = None
            for _ in range(count):
                held["caches"], token = self.compiled(weights, held["caches"], *self.rest)
            jax.block_until_ready(token)

        return run


def _rotary(config: ModelConfig, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rotary_tables(config.rope, config.head_dim, config.max_position_embeddings, numbers, numbers + 1)


def table(rows: Sequence[StepRow]) -> str:
    """The rows as text."""
    lines = [
        f"{'model':<12} {'batch':>5} {'hybrid µs':>10} {'bytes allow':>11} {'ratio':>6}  dense (µs, and over hybrid)"
    ]
    for row in rows:
        rivals = ", ".join(f"{name} {us:.0f} ({us / row.us:.2f}×)" for name, us in row.rivals.items())
        lines.append(
            f"{row.model:<12} {row.batch:>5} {row.us:>10.0f} {row.roofline_us:>11.0f} {row.ratio_to_roofline:>6.2f}  "
            f"{rivals}"
        )
    return "\n".join(lines)
