"""Time of a decoded token over a long cache: dense, hybrid and auto side by side, and their attention alone.

The cache is filled with random keys and values: no prefill is needed, and the picked pages are spread over it.
The modes take turns and every number is a median, so that whatever else the machine does slows all of them alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from rich.console import Console
from rich.table import Table

from lychee_jax.attention.decode import Decode
from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.benchmarks.step import random_pools
from lychee_jax.cache.allocator import pages_for
from lychee_jax.cache.pages import Pools, cache_bytes
from lychee_jax.engine.options import AttentionMode, AttentionOptions, EngineConfig, GenerateOptions
from lychee_jax.engine.request import Request
from lychee_jax.engine.runner import Runner
from lychee_jax.engine.scheduler import Chunk, DecodeRow, DecodeWork, PrefillWork
from lychee_jax.errors import UserError
from lychee_jax.llm import LLM
from pallas_kernels import KVPages
from pallas_kernels.xla.quantized import keys_and_values

_MODES: tuple[AttentionMode, ...] = ("dense", "hybrid", "auto")
# JAX's own attention, over contiguous keys and values: the baseline of a paged cache.
_RIVAL = "jax.nn"


@dataclasses.dataclass(frozen=True)
class DecodeReport:
    """What was measured; times are medians in milliseconds for each backend, shares and speedups plain ratios.

    Attributes:
        step_ms: a whole decoded token: dense, hybrid, auto.
        step_samples_ms: what `step_ms` are the medians of.
        attention_ms: the attention of all layers for one token, all else left out: dense, hybrid, and
            `jax.nn.dot_product_attention` over contiguous keys and values.
        kv_read_share: the share of the cache that a step read.
        speedup: dense over hybrid: measured for a step and for the attention, and what the bytes read allow for both.
    """

    model: str
    device: str
    dtype: str
    weights: str
    kv: str
    context: int
    page_size: int
    budget: int
    sink: int
    recent: int
    retrieval_heads: int
    kv_heads: int
    tokens: int
    step_ms: dict[str, float]
    step_samples_ms: dict[str, list[float]]
    attention_ms: dict[str, float]
    kv_read_share: dict[str, float]
    weight_bytes: int
    kv_bytes: int
    speedup: dict[str, float]

    @property
    def _dtypes(self) -> str:
        parts = {"weights": self.weights, "cache": self.kv}
        others = [f"{name} {kind}" for name, kind in parts.items() if kind != self.dtype]
        return ", ".join([self.dtype, *others])

    def __str__(self) -> str:
        table = Table(
            "", "a token", "tokens/s", "attention alone", "cache read",
            title=f"Decoding after {self.context:,} tokens: {self.model}, {self._dtypes}, {self.device}",
            title_justify="left",
        )  # fmt: skip
        for column in table.columns[1:]:
            column.justify = "right"
        for mode in _MODES:
            step, share = self.step_ms[mode], self.kv_read_share[mode]
            attention = f"{self.attention_ms[mode]:.2f} ms" if mode in self.attention_ms else ""
            read = f"{share:.1%}, {share * self.kv_bytes / 2**20:,.0f} MiB"
            table.add_row(mode, f"{step:.2f} ms", f"{1e3 / step:.1f}", attention, read)
        table.add_row(_RIVAL, "", "", f"{self.attention_ms[_RIVAL]:.2f} ms", "all, not paged")
        speedup = {name: f"{ratio:.2f}×" for name, ratio in self.speedup.items()}
        others = f", the others read at most {self.budget} tokens" if self.retrieval_heads < self.kv_heads else ""
        console = Console()
        with console.capture() as capture:
            console.print(table)
        return (
            f"{capture.get()}hybrid over dense: {speedup['step']} a token (the bytes that are read allow "
            f"{speedup['step_bytes']}), {speedup['attention']} in attention ({speedup['attention_bytes']})\n"
            f"{self.retrieval_heads} of {self.kv_heads} KV heads retrieve{others}; "
            f"{_RIVAL} is jax.nn.dot_product_attention"
        )


def run(
    model: LLM, options: GenerateOptions, *, context: int = 32768, tokens: int = 16, repeats: int = 5
) -> DecodeReport:
    """Measure one sequence of `context` cached tokens; a sample of a mode is the mean over `tokens` decoded ones.

    Of `options`, the roles, the policy, the page size and the implementation count.

    Raises:
        UserError: a context that is not positive or, with the tokens that are decoded, beyond the model's limit.
    """
    if context < 1:
        raise UserError(f"context is {context}; it must be at least 1")
    # The first token comes from the prefill's last hidden state, before any decode step.
    options = dataclasses.replace(options, heads=options.heads or HeadMap.all(model.config), eos_ids=())
    options = dataclasses.replace(options, max_new_tokens=tokens + 1)
    model.check_prompts([[0] * context], options.max_new_tokens)
    runner = _random_cache(model, context, options)
    steps = _samples({mode: functools.partial(_step, runner, context, options, mode) for mode in _MODES}, repeats)
    with jax.default_matmul_precision("highest") if model.dtype == np.float32 else contextlib.nullcontext():
        attention = _samples(_attention_calls(runner, context, options), repeats)
    return _report(model, options, context, steps, attention)


def _random_cache(model: LLM, context: int, options: GenerateOptions) -> Runner:
    """A cache as `context` tokens leave it, but with random content, made on the device; the pages are in order."""
    config = model.engine_config or EngineConfig.of(jax.default_backend(), model.config)
    most = context + options.max_new_tokens
    runner = Runner(
        model.spec, model.weights, dataclasses.replace(options.engine, max_num_seqs=1), config,
        num_pages=pages_for(most, options.page_size) + config.batch_bucket(1, 1), max_model_len=most,
    )  # fmt: skip
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), runner.pools
    )
    runner.pools = ()  # freed before the others are made
    runner.pools = random_pools(shapes, jax.random.key(0))
    return runner


def _samples(
    calls: Mapping[str, Callable[[], tuple[float, float]]], repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """What each call returned, taking turns, after a first round that compiles."""
    for call in calls.values():
        call()
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            samples[name].append(call())
    return samples


def _step(runner: Runner, context: int, options: GenerateOptions, mode: AttentionMode) -> tuple[float, float]:
    """Decode as the engine does, blocks sent ahead: seconds for a token, and the share of the cache that was read."""
    attention = AttentionOptions(mode, options.heads, options.policy)
    request = Request("timed", (0,) * context, options.max_new_tokens, options.sampling, attention)
    page_size = options.page_size
    pages = tuple(range(pages_for(context + options.max_new_tokens, page_size)))
    # The last page of the prompt is read, for a first token; all before it is random.
    start = (context - 1) // page_size * page_size
    chunk = Chunk(request, 0, pages, start, context - start, last=True)
    _, (first,) = runner.prefill(PrefillWork((chunk,), page_size))
    jax.block_until_ready((first, runner.pools))
    started = time.perf_counter()
    blocks = [
        runner.decode(DecodeWork(attention, (DecodeRow(request, 0, pages, context + step - 1, step),))).block
        for step in range(1, options.max_new_tokens, runner.block_steps)
    ]
    jax.block_until_ready(blocks)
    seconds = time.perf_counter() - started
    model, tokens = runner.spec.config, options.max_new_tokens - 1
    held = sum(pages_for(context + step, page_size) for step in range(1, tokens + 1))
    read = sum(int(block.pages_read[:, 0].sum()) for block in blocks)
    if not read:
        raise UserError("the logits are not finite, so nothing is decoded; convert --verify finds weights that are not")
    return seconds / tokens, read / (model.num_layers * model.num_kv_heads * held)


def _attention_calls(
    runner: Runner, context: int, options: GenerateOptions
) -> dict[str, Callable[[], tuple[float, float]]]:
    """The attention of all layers for the last token of the context, its key and value appended; uses up the cache."""
    config = runner.spec.config
    shape = (config.num_layers, 1, 1, config.num_kv_heads, config.groups + 2, config.head_dim)
    qkv = jax.random.normal(jax.random.key(1), shape, runner.dtype)
    positions = jnp.asarray([context - 1], jnp.int32)
    count = pages_for(context + options.max_new_tokens, options.page_size)
    table = jnp.pad(jnp.arange(count, dtype=jnp.int32), (0, runner.max_pages - count))[None]
    held = [runner.pools]
    runner.pools = ()

    def paged(head_map: HeadMap | None) -> jax.Array:
        held[0], out = _paged(head_map, options.policy, options.implementation, held[0], table, positions, qkv)
        return out

    paged(None)  # appends what every later call appends again
    # The keys and values of every layer, contiguous, as a cache without pages has them.
    plain = tuple(_contiguous(pool, table, context, runner.dtype) for pool in held[0])
    # Where a call may be shorter than its dispatch, several are in flight at once.
    calls = 1 if jax.default_backend() == "cpu" else 8

    def timed(call: Callable[[], jax.Array]) -> tuple[float, float]:
        started = time.perf_counter()
        jax.block_until_ready([call() for _ in range(calls)])
        return (time.perf_counter() - started) / calls, 1.0

    return {
        "dense": lambda: timed(lambda: paged(None)),
        "hybrid": lambda: timed(lambda: paged(options.heads)),
        _RIVAL: lambda: timed(lambda: _plain(plain, qkv)),
    }


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _paged(
    head_map: HeadMap | None,
    policy: SelectionPolicy,
    implementation: str | None,
    pools: Pools,
    page_table: Int[Array, "1 P"],
    positions: Int[Array, 1],
    qkv: Float[Array, "L 1 1 K GKV H"],
) -> tuple[Pools, Float[Array, "L 1 1 K G H"]]:
    """One token through the attention of all layers; `qkv` has for each KV head its G queries, a key and a value."""
    backend = Decode(page_table, positions, jnp.ones((1,), bool), head_map, policy, implementation)
    state, outs = backend.start(pools), []
    for index in range(len(pools)):
        q, k, v = qkv[index, ..., :-2, :], qkv[index, ..., -2, :], qkv[index, ..., -1, :]
        out, state = backend(index, q, k, v, state)
        outs.append(out)
    return state.pools, jnp.stack(outs)


@jax.jit
def _plain(cache: tuple[tuple[jax.Array, jax.Array], ...], qkv: Float[Array, "L 1 1 K GKV H"]) -> jax.Array:
    """`jax.nn.dot_product_attention` over keys and values `[1, S, K, H]`."""
    low = qkv.dtype in (jnp.bfloat16, jnp.float16)
    implementation = "cudnn" if jax.default_backend() == "gpu" and low else "xla"
    outs = []
    for index, (keys, values) in enumerate(cache):
        q = qkv[index, ..., :-2, :].reshape(1, 1, -1, qkv.shape[-1])
        outs.append(jax.nn.dot_product_attention(q, keys, values, implementation=implementation))
    return jnp.stack(outs)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _contiguous(
    pool: KVPages, page_table: Int[Array, "1 P"], length: int, dtype: np.dtype
) -> tuple[Float[Array, "1 S K H"], Float[Array, "1 S K H"]]:
    """Keys and values in the activations' dtype, whatever the pool's: what there is without pages is not quantised."""
    pages = page_table[0, : pages_for(length, pool.page_size)]
    if pool.quantized is None:
        keys, values = jnp.split(pool.data[pages], 2, axis=-1)
    else:
        keys, values = keys_and_values(pool.data[pages], pool.quantized, dtype)
        if pool.scales is not None:
            scales = pool.scales[pages].reshape(*keys.shape[:2], 2, pool.page_size, 1).astype(dtype)
            keys, values = keys * scales[:, :, 0], values * scales[:, :, 1]

    def in_order(tiles: jax.Array) -> jax.Array:
        tiles = tiles.transpose(0, 2, 1, 3)
        return tiles.reshape(1, -1, *tiles.shape[2:])[:, :length]

    return in_order(keys), in_order(values)


def _report(
    model: LLM,
    options: GenerateOptions,
    context: int,
    steps: dict[str, list[tuple[float, float]]],
    attention: dict[str, list[tuple[float, float]]],
) -> DecodeReport:
    config, heads, policy = model.config, options.heads, options.policy
    assert heads is not None
    samples = {mode: [1e3 * seconds for seconds, _ in pairs] for mode, pairs in steps.items()}
    step_ms = {mode: statistics.median(values) for mode, values in samples.items()}
    attention_ms = {name: 1e3 * statistics.median(seconds for seconds, _ in pairs) for name, pairs in attention.items()}
    share = {mode: statistics.mean(share for _, share in pairs) for mode, pairs in steps.items()}
    weight_bytes = sum(leaf.nbytes for leaf in model.weights)
    if not config.tie_word_embeddings:
        weight_bytes -= config.vocab_size * config.hidden_size * model.dtype.itemsize  # one row of it is read
    pages = pages_for(context, options.page_size)
    kv_bytes = cache_bytes(config, pages, options.page_size, model.dtype, options.kv_dtype)
    device = jax.devices()[0]
    return DecodeReport(
        model=model.name,
        device=f"{os.cpu_count()} CPU cores" if device.platform == "cpu" else device.device_kind,
        dtype=str(model.dtype),
        weights=config.quantize or str(model.dtype),
        kv=options.kv_dtype or str(model.dtype),
        context=context,
        page_size=options.page_size,
        budget=policy.budget,
        sink=policy.sink,
        recent=policy.recent,
        retrieval_heads=heads.num_retrieval,
        kv_heads=heads.num_layers * heads.num_kv_heads,
        tokens=options.max_new_tokens - 1,
        step_ms=step_ms,
        step_samples_ms=samples,
        attention_ms=attention_ms,
        kv_read_share=share,
        weight_bytes=weight_bytes,
        kv_bytes=kv_bytes,
        speedup={
            "step": step_ms["dense"] / step_ms["hybrid"],
            "step_auto": step_ms["dense"] / step_ms["auto"],
            "attention": attention_ms["dense"] / attention_ms["hybrid"],
            "step_bytes": (weight_bytes + kv_bytes) / (weight_bytes + share["hybrid"] * kv_bytes),
            "attention_bytes": 1 / share["hybrid"],
        },
    )
