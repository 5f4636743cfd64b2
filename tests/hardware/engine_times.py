"""The engine at the shape of Llama-3-8B on one GPU: `PYTHONPATH=. python tests/hardware/engine_times.py`.

Random weights, 32 of 256 KV heads retrieve, budget 4096. Prints how long its programs took to compile, a 128 K prompt
and decoding after it, a full batch of 16, and how long rows stall while a 128 K prompt is read beside them. With
JAX_COMPILATION_CACHE_DIR set, a second run finds the programs on disk. About five minutes, most of it compiling.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.benchmarks.shapes import MODELS
from lychee_jax.benchmarks.step import random_model, spread_heads
from lychee_jax.engine.engine import Engine
from lychee_jax.engine.options import AttentionOptions, EngineConfig, EngineOptions
from lychee_jax.engine.request import Request

type Log = list[tuple[float, str, int]]

CONFIG = MODELS["llama-3-8b"]
RNG = np.random.default_rng(0)
ATTENTION = AttentionOptions("hybrid", spread_heads(CONFIG, 32), SelectionPolicy())


def request(name: str, length: int, new: int) -> Request:
    """A prompt of random tokens."""
    return Request(name, tuple(RNG.integers(0, CONFIG.vocab_size, length).tolist()), new, attention=ATTENTION)


def serve(engine: Engine, requests: list[Request], watch: Callable[[Log], None] | None = None) -> Log:
    """(seconds, request, tokens) of every delivery."""
    for each in requests:
        engine.add_request(each)
    log, started = [], time.perf_counter()
    while engine.has_work:
        for output in engine.step():
            log.append((time.perf_counter() - started, output.request_id, len(output.tokens)))
            if watch is not None:
                watch(log)
    return log


def alone(engine: Engine) -> None:
    """One prompt of 128 K, and its decoding."""
    one = request("alone", 130_900, 97)
    started = time.perf_counter()
    engine.prepare([one])
    compiled = engine.compile_seconds
    log = serve(engine, [one])
    waited = engine.compile_seconds - compiled
    steady = (log[-1][0] - log[3][0]) / sum(tokens for _, _, tokens in log[4:])
    print(
        f"alone: prompt {log[0][0] - waited:.2f} s, waited {waited:.1f} s for compilers, {1e3 * steady:.2f} ms a token"
    )
    print(f"       {time.perf_counter() - started:.1f} s in all")


def full_batch(engine: Engine) -> None:
    """16 rows of 4096 tokens: tokens/s while all of them decode."""
    log = serve(engine, [request(f"full{row}", 4096, 513) for row in range(16)])
    first: dict[str, float] = {}
    for now, name, _ in log:
        first.setdefault(name, now)
    start, stop = max(first.values()), min({name: now for now, name, _ in log}.values())
    tokens = sum(count for now, _, count in log if start < now <= stop)
    print(f"full batch: {tokens / (stop - start):.0f} tokens/s, {16e3 * (stop - start) / tokens:.2f} ms a step")


def stall(engine: Engine) -> None:
    """4 rows of 8 K decode; a prompt of 128 K arrives when each has 128 tokens."""
    arrived: list[float] = []

    def watch(log: Log) -> None:
        if not arrived and sum(count for _, _, count in log) >= 4 * 128:
            arrived.append(log[-1][0])
            engine.add_request(request("late", 131_056, 16))

    log = serve(engine, [request(f"row{row}", 8192, 2049) for row in range(4)], watch)
    read = next(now for now, name, _ in log if name == "late")
    gaps: dict[bool, list[float]] = {False: [], True: []}
    last: dict[str, float] = {}
    for now, name, _ in log:
        if name in last and name != "late":
            gaps[arrived[0] < now <= read].append(now - last[name])
        last[name] = now
    usual, longest = statistics.median(gaps[False]), max(gaps[True])
    print(
        f"stall: a block takes {1e3 * usual:.0f} ms, beside the prompt at most {1e3 * longest:.0f} "
        f"({longest / usual:.2f} times); the prompt takes {read - arrived[0]:.1f} s"
    )


def main() -> None:
    """Measure; what is measured in turn runs once before, so that nothing is compiled meanwhile."""
    spec, weights = random_model(CONFIG, jnp.bfloat16)
    platform = jax.default_backend()
    alone(Engine(spec, weights, EngineOptions(cache_memory=32 << 30)))
    # One size of batch and of page table: what is timed is the engine, not the compiler.
    config = dataclasses.replace(EngineConfig.of(platform, CONFIG), min_rows=16, table_factor=1 << 20)
    engine = Engine(spec, weights, EngineOptions(cache_memory=64 << 30), config)
    for measure in (full_batch, full_batch, stall, stall):
        measure(engine)


if __name__ == "__main__":
    main()
