"""One model on one GPU and on several of one host: the same tokens, and how long a step takes. About three minutes.

First a small model with attention that is peaked, hybrid and dense, by kernels in bfloat16 and by XLA in float32: log-
probabilities agree up to the first token that differs, whose two best lie close together. Then the step of an 8 B model
after 131,072 tokens, random weights, 32 of 256 KV heads retrieve.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.benchmarks import step
from lychee_jax.benchmarks.shapes import MODELS
from lychee_jax.config import ModelConfig
from lychee_jax.engine.engine import Engine
from lychee_jax.engine.options import AttentionOptions, EngineOptions
from lychee_jax.engine.outputs import RequestOutput
from lychee_jax.engine.request import Request
from lychee_jax.errors import UserError
from lychee_jax.models.spec import ModelSpec
from lychee_jax.parallel.layouts import layout_for
from tests.support.company import collect

CONFIG = ModelConfig("qwen3", 4099, 1024, 2048, 4, 32, 8, 128, 8192, qk_norm=True)
HEADS = HeadMap(4, 8, (tuple(range(8)), (), (5,), (0, 1, 4, 6)))
POLICY = SelectionPolicy(1024, 128, 256)
LENGTHS, NEW = (63, 64, 1500, 4001), 33
# (dtype, implementation, largest difference of a log-probability); in bfloat16 rounding changes picks, too.
PATHS: list[tuple[str, str | None, dict[str, float]]] = [
    ("bfloat16", None, {"dense": 1e-1, "hybrid": 3e-1}), ("float32", "xla", {"dense": 2e-4, "hybrid": 2e-4}),
]  # fmt: skip


def weights() -> dict[str, np.ndarray]:
    """Random ones under which attention is peaked."""
    spec, shapes = ModelSpec.abstract(CONFIG, "float32")
    rng = np.random.default_rng(0)
    drawn = {}
    for name, shape in zip(spec.names, shapes, strict=True):
        value = rng.standard_normal(shape.shape, np.float32)
        if name.endswith("scale"):
            value = (2.0 if "attention" in name else 1.0) * (1 + 0.3 * value)
        else:
            value = value / np.sqrt(shape.shape[-1])
        drawn[name] = value.astype(np.float32)
    return drawn


def answers(drawn: dict[str, np.ndarray], devices: int, dtype: str, implementation: str | None) -> Any:
    """What every request got, by mode and prompt."""
    layout = layout_for(CONFIG, devices, HEADS.roles)
    spec, _ = ModelSpec.abstract(CONFIG, dtype, layout)
    arrays = [drawn[name].astype(jnp.dtype(dtype)) for name in spec.names]
    placed = tuple(
        jax.device_put(array) if layout is None else layout.place(axes, array, CONFIG)
        for axes, array in zip(spec.axes, arrays, strict=True)
    )
    engine = Engine(spec, placed, EngineOptions(64, 0, implementation, 4, 4096 + 64, 1 << 28, prefix_cache=False))
    found: dict[str, RequestOutput] = {}
    rng = np.random.default_rng(1)
    for length in LENGTHS:
        prompt = tuple(rng.integers(0, CONFIG.vocab_size, length).tolist())
        for mode in ("hybrid", "dense"):
            attention = AttentionOptions(mode, HEADS, POLICY)
            engine.add_request(Request(f"{mode} {length}", prompt, NEW, attention=attention, top_logprobs=2))
    collect(engine, found)
    engine.close()
    return found


def compare(one: RequestOutput, other: RequestOutput, tolerance: float) -> tuple[int, float, bool]:
    """Tokens that agree, the largest difference of their log-probabilities, and whether all is as it may be."""
    same = next((i for i, pair in enumerate(zip(one.tokens, other.tokens, strict=True)) if pair[0] != pair[1]), NEW)
    gaps = [abs(a - b) for a, b in zip(one.logprobs[:same], other.logprobs[:same], strict=True)]
    gap = max(gaps, default=0.0)
    close = same == NEW or one.top[same][0][1] - one.top[same][1][1] < 2 * tolerance
    return same, gap, gap <= tolerance and close


def check(devices: int) -> int:
    """Compare and time; 2 with fewer GPUs."""
    try:
        layout_for(CONFIG, devices)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{devices} of {jax.device_count()} {jax.devices()[0].device_kind}, JAX {jax.__version__}", flush=True)
    bad, drawn = 0, weights()
    for dtype, implementation, tolerances in PATHS:
        one, several = (answers(drawn, count, dtype, implementation) for count in (1, devices))
        for name in one:
            same, gap, good = compare(one[name], several[name], tolerances[name.split()[0]])
            bad += not good
            print(
                f"{'ok ' if good else 'BAD'} {dtype} {name}: {same} of {NEW} tokens agree, log-probabilities to "
                f"{gap:.1e}",
                flush=True,
            )
    times = []
    for count in (1, devices):
        (row,) = step.measure(
            "llama-3-8b", MODELS["llama-3-8b"], batches=[1], context=131072, modes=("hybrid",), tensor_parallel=count
        )
        times.append(row.us)
        print(
            f"8 B, 131,072 tokens, hybrid step on {count}: {row.us / 1e3:.2f} ms, by bytes {row.roofline_us / 1e3:.2f} "
            f"({times[0] / row.us:.2f}×), pools copied: {row.pool_copies}",
            flush=True,
        )
        bad += row.pool_copies > 0
    return 1 if bad else 0
