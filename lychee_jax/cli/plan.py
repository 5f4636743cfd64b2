"""`lychee plan`: on how many devices a model and its cache fit, and how fast they can be there."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from lychee_jax.cli import options as shared


def plan(
    context: Annotated[int, typer.Option(metavar="N", help="Tokens of each sequence.")],
    device_memory: Annotated[float, typer.Option(metavar="GB", help="Memory of each device.")],
    devices: Annotated[int, typer.Option(metavar="N", help="How many there are; they need not be here.")] = 1,
    batch: Annotated[int, typer.Option(metavar="N", help="Sequences that decode together.")] = 1,
    bandwidth: Annotated[
        float, typer.Option(metavar="GB/S", help="What each device reads a second; 4,600 was seen on an H200.")
    ] = 4600.0,
    model: shared.ModelOption = None,
    dtype: shared.DtypeOption = None,
    quantize: shared.QuantizeOption = "none",
    quantize_head: shared.QuantizeHeadOption = False,
    kv_dtype: shared.KVDtypeOption = "auto",
    heads: shared.HeadsOption = None,
    page_size: shared.PageSizeOption = 64,
    budget: shared.BudgetOption = 4096,
    sink: shared.SinkOption = 128,
    recent: shared.RecentOption = 256,
) -> None:
    """Say what weights and cache take on each device, what fits, and how long a step must take by its bytes.

    No weights are loaded.

    [b]Example[/b]

    [cyan]lychee plan --model my-8b --context 131072 --devices 4 --device-memory 80[/cyan]
    """
    from lychee_jax.attention.selection import SelectionPolicy
    from lychee_jax.benchmarks.plan import Wish, table
    from lychee_jax.benchmarks.plan import plan as make
    from lychee_jax.llm import choose_heads
    from lychee_jax.loading import find_heads, read_config
    from lychee_jax.models.quantization import check_quantization

    config = read_config(model)
    chosen = config.quantize if quantize == "none" else quantize
    config = dataclasses.replace(
        config, dtype=dtype or config.dtype, quantize=check_quantization(chosen, quantize_head),
        quantize_head=quantize_head or config.quantize_head,
    )  # fmt: skip
    wish = Wish(
        config, choose_heads(config, find_heads(model, config), heads), context, batch,
        SelectionPolicy(budget, sink, recent), page_size, shared.kv_dtype_of(kv_dtype),
    )  # fmt: skip
    rows = make(wish, devices, memory=1e9 * device_memory, bandwidth=1e9 * bandwidth)
    print(table(wish, rows, shared.model_name(model)))
