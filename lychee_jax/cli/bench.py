"""`lychee bench …`: what is fast, how fast, and beside what."""

import dataclasses
import importlib.metadata
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lychee_jax.cli import options as shared
from lychee_jax.cli.console import load_model
from lychee_jax.errors import UserError
from lychee_jax.files import json_text, read_json_object, write_text

app = typer.Typer(help="Measure speed on this machine.", rich_markup_mode="rich")

Shape = Literal["llama-3-8b", "qwen3-8b", "qwen2.5-7b", "qwen2.5-3b", "bundled"]
JsonOption = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write the numbers there as JSON; - is standard output.")
]
BatchOption = Annotated[str, typer.Option("--batch", metavar="N,…", help="Batch sizes, each measured by itself.")]


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} is {text!r}; give whole numbers such as 1,4,8") from None


def _batches(text: str) -> list[int]:
    batches = _numbers("--batch", text)
    if min(batches) < 1:
        raise UserError(f"--batch is {text!r}; every batch needs at least one row")
    return batches


def _show(report: Any, target: str | None, text: str) -> None:
    """Print `text`, and put `report` into a file; or print the report alone."""
    if target == "-":
        print(json_text(report))
        return
    if target is not None:
        write_text(target, json_text(report, indent=1) + "\n")
    print(text)


def _device() -> dict[str, str]:
    import jax

    return {"device": jax.devices()[0].device_kind, "jax": jax.__version__}


@app.command("decode")
def bench_decode(
    model: shared.ModelOption = None,
    dtype: shared.DtypeOption = None,
    quantize: shared.QuantizeOption = "none",
    kv_dtype: shared.KVDtypeOption = "auto",
    tensor_parallel: shared.TensorParallelOption = 1,
    implementation: shared.ImplementationOption = None,
    heads: shared.HeadsOption = None,
    page_size: shared.PageSizeOption = 64,
    budget: shared.BudgetOption = 2048,
    sink: shared.SinkOption = 128,
    recent: shared.RecentOption = 256,
    context: Annotated[int, typer.Option(metavar="N", help="Tokens in the cache when decoding starts.")] = 32768,
    shape: Annotated[
        Shape | None, typer.Option(help="Instead of a model: random weights of this shape, for the whole step alone.")
    ] = None,
    retrieval_heads: Annotated[
        int, typer.Option(metavar="N", help="With --shape: retrieval heads, those of layer 0 included.")
    ] = 32,
    batch: BatchOption = "1",
    rivals: Annotated[
        bool,
        typer.Option(help="With --shape: also with cuDNN over caches of --dtype without pages, of the same weights."),
    ] = True,
    repeats: Annotated[
        int | None, typer.Option(metavar="N", help="With --shape: samples, of which the median is shown.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Time a decoded token, dense and hybrid, in the same run; attention alone as well.

    With --shape nothing is downloaded: an 8 B model takes 16 GB of the device, and 17 GB for each sequence of 131,072
    tokens. Dense attention is then also timed with cuDNN over caches without pages.

    [b]Example[/b]

    [cyan]lychee bench decode --shape llama-3-8b --context 131072 --budget 4096 --batch 1,4,6[/cyan]
    """
    from lychee_jax.attention.selection import SelectionPolicy

    policy = SelectionPolicy(budget, sink, recent)
    policy.validate(page_size)
    if shape is None:
        if batch != "1":
            raise UserError("--batch needs --shape; a model is measured with one sequence")
        if repeats is not None:
            raise UserError("--repeats needs --shape; a model is measured token by token")
        if tensor_parallel != 1:
            raise UserError("--tensor-parallel needs --shape; a model is measured with attention alone, on one device")
        from lychee_jax.benchmarks import decode
        from lychee_jax.engine.options import GenerateOptions

        options = GenerateOptions(
            "hybrid", policy=policy, page_size=page_size, implementation=implementation,
            kv_dtype=shared.kv_dtype_of(kv_dtype),
        )  # fmt: skip
        loaded = load_model(model, dtype, quantize=quantize)
        options = dataclasses.replace(options, heads=loaded.choose_heads(heads))
        report = decode.run(loaded, options, context=context)
        _show(dataclasses.asdict(report), json_file, str(report))
        return
    if model is not None:
        raise UserError("--model and --shape exclude each other; give one")
    if repeats is not None and repeats < 1:
        raise UserError("--repeats must be at least 1")
    # JAX would leave a quarter of the device alone; six sequences of 131,072 tokens need more than the rest.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    from lychee_jax.benchmarks import step
    from lychee_jax.benchmarks.shapes import MODELS

    rows = step.measure(
        shape, MODELS[shape], batches=_batches(batch), context=context, retrieval_heads=retrieval_heads, policy=policy,
        page_size=page_size, dtype=dtype or "bfloat16", quantize=None if quantize == "none" else quantize,
        implementation=implementation, kv_dtype=shared.kv_dtype_of(kv_dtype),
        modes=None if rivals else ("hybrid", "dense"), repeats=repeats or 7, tensor_parallel=tensor_parallel,
        report=_tell,
    )  # fmt: skip
    _show(_device() | {"rows": [dataclasses.asdict(row) for row in rows]}, json_file, step.table(rows))


@app.command("prefill")
def bench_prefill(
    shape: Annotated[Shape, typer.Option(help="Random weights of this shape.")] = "llama-3-8b",
    dtype: shared.DtypeOption = None,
    kv_dtype: shared.KVDtypeOption = "auto",
    tensor_parallel: shared.TensorParallelOption = 1,
    context: Annotated[int, typer.Option(metavar="N", help="Tokens of the prompt.")] = 131072,
    page_size: shared.PageSizeOption = 64,
    repeats: Annotated[int, typer.Option(metavar="N", help="Samples, of which the median is shown.")] = 3,
    json_file: JsonOption = None,
) -> None:
    """Time reading a long prompt, chunk after chunk, as the share of the tensor cores' rate.

    [b]Example[/b]

    [cyan]lychee bench prefill --shape llama-3-8b --context 131072[/cyan]
    """
    if context < 1 or page_size < 1 or repeats < 1:
        raise UserError("--context, --page-size and --repeats must be at least 1")
    from lychee_jax.benchmarks import prefill
    from lychee_jax.benchmarks.shapes import MODELS

    row = prefill.measure(
        shape, MODELS[shape], context=context, page_size=page_size, dtype=dtype or "bfloat16",
        kv_dtype=shared.kv_dtype_of(kv_dtype), repeats=repeats, tensor_parallel=tensor_parallel, report=_tell,
    )  # fmt: skip
    _show(_device() | {"rows": [dataclasses.asdict(row)]}, json_file, prefill.table([row]))


@app.command("train")
def bench_train(
    shape: Annotated[Shape, typer.Option(help="Random weights of this shape.")] = "llama-3-8b",
    dtype: shared.DtypeOption = None,
    context: Annotated[int, typer.Option(metavar="N", help="Tokens of the prompts.")] = 10240,
    loss: Annotated[Literal["hidden", "logits"], typer.Option(help="What is to stay as under dense attention.")] = (
        "hidden"
    ),
    batch: Annotated[
        int | None, typer.Option(metavar="N", show_default="one a device", help="Documents a step.")
    ] = None,
    retrieval_heads: Annotated[int, typer.Option(metavar="N", help="Of the head map that would be learned.")] = 32,
    repeats: Annotated[int, typer.Option(metavar="N", help="Samples, of which the median is shown.")] = 5,
    json_file: JsonOption = None,
) -> None:
    """Time a training step of the gates, and the memory that it takes.

    [b]Example[/b]

    [cyan]lychee bench train --shape llama-3-8b --context 10240[/cyan]
    """
    if context < 1 or repeats < 1:
        raise UserError("--context and --repeats must be at least 1")
    import jax

    from lychee_jax.benchmarks import train
    from lychee_jax.benchmarks.shapes import MODELS
    from lychee_jax.training.learn_heads import TrainingPlan

    batch = len(jax.devices()) if batch is None else batch
    plan = TrainingPlan(retrieval_heads, batch=batch, loss=loss, min_length=1, max_length=context)
    row = train.measure(shape, MODELS[shape], plan, dtype=dtype or "bfloat16", repeats=repeats, report=_tell)
    _show(_device() | {"rows": [dataclasses.asdict(row)]}, json_file, train.table([row]))


@app.command("serve")
def bench_serve(
    offline: Annotated[
        bool, typer.Option("--offline", help="Through the engine in this process: the scenarios below.")
    ] = False,
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Through a server: streams of --new-tokens each. Only --requests and --seed go with it."
        ),
    ] = None,
    at_once: Annotated[
        str, typer.Option(metavar="N,…", help="With --url: how many streams run together, one after the other.")
    ] = "1,4,16,64",
    guided: Annotated[
        int, typer.Option(metavar="N", help="With --url: streams that are guided, beside which others are timed.")
    ] = 0,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", envvar="LYCHEE_API_KEY", help="With --url: what the server wants to see."),
    ] = None,
    scenario: Annotated[
        Literal["full-batch", "long-prompt", "mixed", "long-batch", "shared-prefix", "guided"],
        typer.Option(
            help="[b]full-batch[/b]: requests of one length, all at once. [b]long-prompt[/b]: one arrives while others "
            "decode. [b]mixed[/b]: random arrivals and lengths. [b]long-batch[/b]: a few very long prompts, hybrid and "
            "dense. [b]shared-prefix[/b]: prompts that begin alike. [b]guided[/b]: a full batch without and with one "
            "guided row. The options below change it."
        ),
    ] = "mixed",
    read_again: Annotated[
        bool,
        typer.Option(help="In long-batch dense attention reads the prompts itself, too, for its times end to end."),
    ] = True,
    model: shared.ModelOption = None,
    shape: Annotated[Shape | None, typer.Option(help="Instead of a model: random weights of this shape.")] = None,
    dtype: shared.DtypeOption = None,
    kv_dtype: shared.KVDtypeOption = "auto",
    tensor_parallel: shared.TensorParallelOption = 1,
    implementation: shared.ImplementationOption = None,
    requests: Annotated[
        int | None, typer.Option(metavar="N", show_default="the scenario's", help="Requests to serve.")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(metavar="R", show_default="the scenario's", help="Arrivals a second; inf: all at once."),
    ] = None,
    prompt_lengths: Annotated[
        str | None,
        typer.Option(metavar="N,…", show_default="the scenario's", help="Each prompt's length is one of these."),
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(metavar="N", show_default="the scenario's", help="Tokens that each request gets.")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(metavar="N", help="Sequences that decode together.")] = 16,
    cache_memory: Annotated[
        int | None, typer.Option(metavar="BYTES", show_default="most of what is free", help="Of the KV cache.")
    ] = None,
    attention: shared.AttentionOption = "auto",
    heads: shared.HeadsOption = None,
    page_size: shared.PageSizeOption = 64,
    budget: shared.BudgetOption = 4096,
    sink: shared.SinkOption = 128,
    recent: shared.RecentOption = 256,
    seed: Annotated[int, typer.Option(help="Of arrivals, lengths and prompts.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the numbers there as JSON.")
    ] = None,
    append: Annotated[
        bool, typer.Option("--append", help="Add to the numbers of an --output that is there already.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as one JSON object.")] = False,
) -> None:
    """Serve requests as they come: tokens a second, time to the first token, and how long rows stall.

    The same requests come again until nothing is compiled any more. Then one comes alone, in the same engine.

    [b]Example[/b]

    [cyan]lychee bench serve --offline --shape llama-3-8b --scenario long-prompt[/cyan]

    [cyan]lychee bench serve --url http://127.0.0.1:8000[/cyan]
    """
    from lychee_jax.attention.head_map import HeadMap
    from lychee_jax.attention.selection import SelectionPolicy
    from lychee_jax.cli.console import progress_bar
    from lychee_jax.engine.options import AttentionOptions, EngineOptions

    if offline == (url is not None):
        raise UserError("give either --offline, the engine in this process, or the --url of a server")
    if url is not None:
        numbers = tuple(_numbers("--at-once", at_once))
        _bench_url(url, numbers, requests, new_tokens, guided, api_key, seed, output, append=append, as_json=as_json)
        return
    # As for decode: six sequences of 131,072 tokens need nearly all of the device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    if model is not None and shape is not None:
        raise UserError("--model and --shape exclude each other; give one")
    if cache_memory is not None and cache_memory < 1:
        raise UserError(f"--cache-memory is {cache_memory}; it must be at least 1")
    if seed < 0:
        raise UserError(f"--seed is {seed}; it must not be negative")
    policy = SelectionPolicy(budget, sink, recent)
    policy.validate(page_size)
    engine_options = EngineOptions(
        page_size, implementation=implementation, max_num_seqs=max_num_seqs, cache_memory=cache_memory,
        kv_dtype=shared.kv_dtype_of(kv_dtype),
    )  # fmt: skip
    chosen: dict[str, Any] = {
        "requests": requests,
        "rate": rate,
        "prompt_lengths": tuple(_numbers("--prompt-lengths", prompt_lengths)) if prompt_lengths is not None else None,
        "new_tokens": new_tokens,
    }
    import jax

    from lychee_jax.benchmarks import serve
    from lychee_jax.benchmarks.shapes import MODELS
    from lychee_jax.benchmarks.step import random_model, spread_heads
    from lychee_jax.parallel.layouts import layout_for

    loaded = None
    if shape is not None:
        config = MODELS[shape]
    else:
        loaded = load_model(model, dtype, tensor_parallel=tensor_parallel, heads=heads)
        config = loaded.config
    changes = {name: value for name, value in chosen.items() if value is not None}
    traffic = serve.scenario(scenario, config, jax.default_backend(), **changes)
    serve.arrivals(traffic, config, seed)  # refused before weights are made
    if loaded is not None:
        name, spec, weights, head_map = loaded.name, loaded.spec, loaded.weights, loaded.choose_heads(heads)
    else:
        name = str(shape)
        named = {
            None: spread_heads(config, max(config.num_kv_heads, config.num_layers * config.num_kv_heads // 8)),
            "all": HeadMap.all(config),
            "none": HeadMap.none(config),
        }
        head_map = named[heads] if heads in named else HeadMap.load(str(heads), config)
        layout = layout_for(config, tensor_parallel, head_map.roles)
        spec, weights = random_model(config, dtype or "bfloat16", layout)
    with progress_bar() as progress:
        rows = serve.measure(
            scenario, name, spec, weights, traffic, AttentionOptions(attention, head_map, policy), engine_options,
            seed=seed, read_again=read_again, progress=progress,
        )  # fmt: skip
    report = _device() | {
        "command": shlex.join(["lychee", *sys.argv[1:]]),
        "rows": [row.to_json() for row in rows],
        "targets": serve.targets(scenario, rows),
    }
    if output is not None:
        _write_results(report, output, append=append)
    print(json_text(report) if as_json else serve.table(rows))


def _bench_url(
    url: str,
    at_once: tuple[int, ...],
    requests: int | None,
    new_tokens: int | None,
    guided: int,
    api_key: str | None,
    seed: int,
    output: Path | None,
    *,
    append: bool,
    as_json: bool,
) -> None:
    """What a server's clients notice."""
    from lychee_jax.benchmarks import http_serve
    from lychee_jax.cli.console import progress_bar

    load = http_serve.HttpLoad(
        url.rstrip("/"), at_once, requests or 2, new_tokens=new_tokens or 64, guided=guided, api_key=api_key
    )
    with progress_bar() as progress:
        rows = http_serve.measure(load, seed=seed, progress=progress)
    report = {
        "device": f"a server at {url}, {os.cpu_count()} CPU cores",
        "jax": importlib.metadata.version("jax"),  # not asked itself: the server has the device
        "command": shlex.join(["lychee", *sys.argv[1:]]),
        "rows": [dataclasses.asdict(row) for row in rows],
        "targets": http_serve.targets(rows),
    }
    if output is not None:
        _write_results(report, output, append=append)
    print(json_text(report) if as_json else http_serve.table(rows))


def _write_results(report: dict[str, Any], output: Path, *, append: bool) -> None:
    """A results file; with `append` what it had before comes first, and each row says on which device it was made."""
    if append:
        report["rows"] = [{"device": report["device"], **row} for row in report["rows"]]
    if append and output.exists():
        before = read_json_object(output)
        for name in ("rows", "targets"):
            report[name] = [*before.get(name, []), *report[name]]
        for name in ("device", "jax", "command"):
            parts = str(before.get(name, report[name])).split("; ")
            report[name] = "; ".join(dict.fromkeys([*parts, report[name]]))
    write_text(output, json_text(report, indent=1) + "\n")


@app.command("kernels")
def bench_kernels(
    implementation: shared.ImplementationOption = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], typer.Option(help="Of queries and cache.")
    ] = "bfloat16",
    kv_dtype: shared.KVDtypeOption = "auto",
    context: Annotated[int, typer.Option(metavar="N", help="Cached tokens of every sequence.")] = 131072,
    page_size: shared.PageSizeOption = 64,
    pages: Annotated[int, typer.Option(metavar="N", help="Pages that a sparse head reads.")] = 64,
    batch: BatchOption = "1,4,8",
    rivals: Annotated[bool, typer.Option(help="Time XLA, cuDNN and torch, too, as far as they are here.")] = True,
    repeats: Annotated[int, typer.Option(metavar="N", help="Samples, of which the median is shown.")] = 15,
    working_set: Annotated[
        int, typer.Option(metavar="BYTES", help="Of the caches that take turns: several times the device's L2 cache.")
    ] = 1 << 30,
    json_file: JsonOption = None,
) -> None:
    """Time each op for a layer of Llama-3-8B, and its baselines in the same run."""
    # torch, where it is, needs room beside JAX.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if min(context, page_size, repeats, working_set) < 1 or pages < 7:
        raise UserError("--context, --page-size, --repeats and --working-set must be at least 1, --pages at least 7")
    from lychee_jax.benchmarks import kernels

    rows = kernels.measure(
        kernels.Shape(page_size=page_size, pages=pages, dtype=dtype, kv=shared.kv_dtype_of(kv_dtype)),
        batches=_batches(batch), context=context, implementation=implementation, rivals=rivals, repeats=repeats,
        working_set=working_set, report=_tell,
    )  # fmt: skip
    _show(_device() | {"rows": [dataclasses.asdict(row) for row in rows]}, json_file, kernels.table(rows))


@app.command("tpu")
def bench_tpu(
    chip: Annotated[Literal["v5e", "v5p", "v6e", "all"], typer.Option(help="To compile for; none is needed.")] = "all",
    json_file: JsonOption = None,
) -> None:
    """Predict the TPU kernels' times from the compiler's own schedule, on any Linux machine.

    Needs libtpu (pip install libtpu), which compiles for TPUs without one. The assumptions are printed below the table.
    """
    from lychee_jax.benchmarks import tpu_schedule
    from lychee_jax.cli.console import progress_bar

    chips = ["v5e", "v5p", "v6e"] if chip == "all" else [chip]
    with progress_bar() as progress:
        report = tpu_schedule.run(chips, on_row=lambda done, total: progress("compile", done, total))
    _show(dataclasses.asdict(report), json_file, str(report).rstrip("\n"))


@app.command("targets")
def bench_targets(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="Results as JSON, with the targets they list.")],
) -> None:
    """Print the targets that results files miss.

    [b]Example[/b]

    [cyan]lychee bench targets docs/results/engine.json docs/results/h200.json[/cyan]
    """
    from lychee_jax.benchmarks import targets

    print(targets.table(files))


def _tell(line: str) -> None:
    """Progress, where nobody parses it."""
    if sys.stderr.isatty():
        print(line, file=sys.stderr)
