"""Time to the first token after a long prompt, which the engine reads chunk after chunk; the weights are random."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lychee_jax.benchmarks.rooflines import MATRIX_RATE
from lychee_jax.benchmarks.step import peak_bytes, random_model
from lychee_jax.cache.allocator import pages_for
from lychee_jax.cache.pages import cache_bytes
from lychee_jax.config import ModelConfig
from lychee_jax.engine.options import EngineConfig, EngineOptions, GenerateOptions
from lychee_jax.llm import LLM
from lychee_jax.parallel.layouts import layout_for
from pallas_kernels.types import KVDtype


@dataclasses.dataclass(frozen=True)
class PrefillRow:
    """One prompt length; `operations` counts products once with their sums twice, attention's causally.

    `share` is of the tensor cores' 989 TFLOP/s (bfloat16, H200) of each device.
    """

    name: str
    model: str
    dtype: str
    kv: str
    context: int
    page_size: int
    seconds: float
    samples_s: list[float]
    operations: float
    attention_operations: float
    tflops: float
    share: float
    peak_bytes: int | None
    devices: int = 1


def operations(config: ModelConfig, context: int) -> tuple[float, float]:
    """Floating-point operations of a prefill: all, and attention's, in which token t reads t + 1 keys.

    The logits of the last token and what is done once for an element (norms, rotation, softmax) are left out.
    """
    embed, head_dim = config.hidden_size, config.head_dim
    layer = 2 * embed * head_dim * (config.num_heads + config.num_kv_heads) + 3 * embed * config.intermediate_size
    attention = 4.0 * config.num_layers * config.num_heads * head_dim * context * (context + 1) / 2
    return 2.0 * config.num_layers * layer * context + attention, attention


def measure(
    model: str,
    config: ModelConfig,
    *,
    context: int,
    page_size: int = 64,
    dtype: Any = jnp.bfloat16,
    kv_dtype: KVDtype | None = None,
    repeats: int = 3,
    tensor_parallel: int = 1,
    report: Callable[[str], None] = lambda line: None,
) -> PrefillRow:
    """Read a random prompt `repeats` times after one that compiles; the median counts."""
    config = dataclasses.replace(config, max_position_embeddings=max(config.max_position_embeddings, context + 1))
    layout = layout_for(config, tensor_parallel)
    spec, weights = random_model(config, dtype, layout)
    share = config if layout is None else layout.share(config)
    # Room for this prompt alone, and nothing of it is found again.
    engine_config = EngineConfig.of(jax.default_backend(), config)
    pages = pages_for(context + 1, page_size) + engine_config.batch_bucket(1, 1)
    engine_options = EngineOptions(
        max_num_seqs=1, cache_memory=cache_bytes(share, pages, page_size, dtype, kv_dtype), prefix_cache=False
    )
    llm = LLM(Path(model), config, spec.merge(weights), None, (), engine_config, engine_options)
    del weights
    options = GenerateOptions("dense", page_size=page_size, max_new_tokens=1, kv_dtype=kv_dtype)
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, context).tolist()
    samples = []
    for index in range(repeats + 1):
        report(f"{model}, {context} tokens, run {index} of {repeats}")
        seconds = llm.generate_tokens([prompt], options).timing.prefill_s
        if index:
            samples.append(seconds)
    seconds = float(np.median(samples))
    total, attention = operations(config, context)
    return PrefillRow(
        "prefill", model, str(jnp.dtype(dtype)), kv_dtype or str(jnp.dtype(dtype)), context, page_size, seconds,
        samples, total, attention, total / seconds / 1e12, total / seconds / MATRIX_RATE / tensor_parallel,
        peak_bytes(None), tensor_parallel,
    )  # fmt: skip


def table(rows: list[PrefillRow]) -> str:
    """The rows as text."""
    lines = [
        f"{'model':<12} {'tokens':>8} {'seconds':>8} {'TFLOP/s':>8} {'of 989':>7}  attention's part of the operations"
    ]
    for row in rows:
        lines.append(
            f"{row.model:<12} {row.context:>8} {row.seconds:>8.2f} {row.tflops:>8.1f} {row.share:>7.1%}  "
            f"{row.attention_operations / row.operations:.0%}"
        )
    return "\n".join(lines)
