"""How long a whole decode step takes on a TPU that is not here: products with weights by the compiler's own estimates,
attention by the schedules of its kernels.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from rich.table import Table

from lychee_jax.benchmarks.shapes import MODELS
from lychee_jax.benchmarks.tpu_compiler import Chip, compile_for
from lychee_jax.models.layers import contract

if TYPE_CHECKING:
    from lychee_jax.benchmarks.tpu_schedule import ScheduleRow

RETRIEVAL = 1 / 8
"""Of the KV heads, how many retrieve."""
STORED = (("bfloat16", "bfloat16"), ("int8", "bfloat16"), ("int8", "int8"), ("int8", "fp8"))
"""What rows hold weights and the cache in."""


@dataclasses.dataclass(frozen=True)
class TpuStepRow:
    """A step of one sequence, hybrid attention; times in microseconds.

    Attributes:
        weights: what the kernels of the layers are stored as; the output head is bfloat16.
        kv: what the cache holds.
        weights_us: products with weights, each as long as it issues or as its bytes take.
        attention_us: the kernels of all layers, by `ScheduleRow.predicted_us`.
        predicted_us: both.
        roofline_us: all bytes that must be read, at the chip's bandwidth.
        ratio: predicted over roofline.
        bound: which of issue and DMA takes longer in the part that takes longer.
        fits: whether weights and the cache are within the chip's memory.
    """

    chip: str
    model: str
    weights: str
    kv: str
    context: int
    weights_us: float
    attention_us: float
    predicted_us: float
    roofline_us: float
    ratio: float
    bound: str
    fits: bool


def predict(chip: Chip, model: str, rows: list[ScheduleRow]) -> list[TpuStepRow]:
    """A row for each of `STORED`, from the rows of the chip's kernels."""
    config = MODELS[model]
    qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    width, mlp = config.hidden_size, config.intermediate_size
    kernels = [(qkv, width), (width, config.num_heads * config.head_dim), (2 * mlp, width), (width, mlp)]
    head = _product(chip, (config.vocab_size, width), "bfloat16")
    numbers = config.num_layers * sum(outputs * inputs for outputs, inputs in kernels)
    embedding = config.vocab_size * width * 2
    found = []
    products = {weights: [_product(chip, shape, weights) for shape in kernels] for weights in ("bfloat16", "int8")}
    for weights, kv in STORED:
        of = {row.op: row for row in rows if (row.chip, row.model, row.kv) == (chip.name, model, kv)}
        of |= {row.op: row for row in rows if (row.chip, row.model, row.op) == (chip.name, model, "select_pages")}
        each = [*(cost for cost in products[weights] for _ in range(config.num_layers)), head]
        weights_us = sum(max(cost) for cost in each)
        layer_us = _attention(of, "predicted_us") + of["select_pages"].predicted_us
        attention_us = config.num_layers * layer_us
        reading = sum(cost[1] for cost in each) + config.num_layers * _attention(of, "roofline_us")
        dense = of["dense_decode"]
        cache = config.num_layers * dense.roofline_us * 1e-6 * chip.bandwidth * chip.cores
        held = numbers * jnp.dtype(weights).itemsize + embedding * (1 if config.tie_word_embeddings else 2) + cache
        issue = sum(cost[0] for cost in each) > sum(cost[1] for cost in each)
        bound = ("issue" if issue else "DMA") if weights_us > attention_us else dense.bound
        whole = weights_us + attention_us
        row = TpuStepRow(
            chip.name, model, weights, kv, dense.context, round(weights_us, 1), round(attention_us, 1), round(whole, 1),
            round(reading, 1), round(whole / reading, 3), bound, held <= chip.memory,
        )  # fmt: skip
        found.append(row)
    return found


def _attention(of: Mapping[str, ScheduleRow], field: str) -> float:
    """A layer's attention, as many of its heads dense as retrieve."""
    dense, sparse = getattr(of["dense_decode"], field), getattr(of["sparse_decode"], field)
    return RETRIEVAL * dense + (1 - RETRIEVAL) * sparse


def _product(chip: Chip, shape: tuple[int, int], dtype: str) -> tuple[float, float]:
    """(what the compiler expects, what the bytes take) of a row times a kernel, in microseconds."""
    row: Any = jax.ShapeDtypeStruct((1, 1, shape[1]), jnp.bfloat16)
    kernel: Any = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    compiled = compile_for(chip, jax.jit(lambda x, kernel: contract(x, kernel, jnp.float32)), row, kernel)
    cycles = sum(int(each) for each in re.findall(r'"estimated_cycles":"(\d+)"', compiled.as_text() or ""))
    bytes_read = shape[0] * shape[1] * jnp.dtype(dtype).itemsize
    return cycles / (chip.clock_ghz * 1e3), bytes_read / (chip.bandwidth * chip.cores) * 1e6


def table(rows: list[TpuStepRow]) -> Table:
    """The rows for a terminal."""
    shown = Table(
        "chip", "model", "weights", "cache", "weights", "attention", "predicted", "roofline", "ratio", "bound", "fits",
        title="A whole step of one sequence, hybrid attention", title_justify="left",
    )  # fmt: skip
    for row in rows:
        shown.add_row(
            row.chip, row.model, row.weights, row.kv, f"{row.weights_us:,.0f} µs", f"{row.attention_us:,.0f} µs",
            f"{row.predicted_us:,.0f} µs", f"{row.roofline_us:,.0f} µs", f"{row.ratio:.2f}", row.bound,
            "yes" if row.fits else "no",
        )  # fmt: skip
    return shown
