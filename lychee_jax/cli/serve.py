"""`lychee serve`: a model behind OpenAI's protocol."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from lychee_jax.cli import options as shared
from lychee_jax.cli.console import load_model
from lychee_jax.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from lychee_jax.attention.head_map import HeadMap
    from lychee_jax.config import ModelConfig
    from lychee_jax.server.model import ServedModel

_SERVER, _ENGINE = "Server", "Engine"


def serve(
    model: shared.ModelOption = None,
    dtype: shared.DtypeOption = None,
    quantize: shared.QuantizeOption = "none",
    quantize_head: shared.QuantizeHeadOption = False,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.", rich_help_panel=_SERVER)
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one.", rich_help_panel=_SERVER)] = 8000,
    served_model_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", show_default="the folder's", help="How clients call the model.", rich_help_panel=_SERVER
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar="LYCHEE_API_KEY",
            help="What clients must show; /health is open to all.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    max_queue: Annotated[
        int,
        typer.Option(help="Sequences that may wait; beyond, clients are told to try again.", rich_help_panel=_SERVER),
    ] = 256,
    default_max_tokens: Annotated[
        int, typer.Option(help="New tokens of a chat whose client names no limit.", rich_help_panel=_SERVER)
    ] = 2048,
    drain_seconds: Annotated[
        float,
        typer.Option(help="How long running requests may go on after SIGTERM.", rich_help_panel=_SERVER),
    ] = 30.0,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences that decode together.", rich_help_panel=_ENGINE)] = 16,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            metavar="N", show_default="the model's limit", help="Tokens of prompt and answer.", rich_help_panel=_ENGINE
        ),
    ] = None,
    cache_memory: Annotated[
        float | None,
        typer.Option(
            metavar="GIB",
            show_default="85 % of what is free on an accelerator, 2 on a CPU",
            help="Of the KV cache.",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    kv_dtype: shared.KVDtypeOption = "auto",
    tensor_parallel: shared.TensorParallelOption = 1,
    implementation: shared.ImplementationOption = None,
    attention: shared.AttentionOption = "auto",
    heads: shared.HeadsOption = None,
    page_size: shared.PageSizeOption = 64,
    budget: shared.BudgetOption = 4096,
    sink: shared.SinkOption = 128,
    recent: shared.RecentOption = 256,
    rule: shared.RuleOption = "budget",
    ratio: shared.RatioOption = 0.125,
    top_p_mass: shared.TopPMassOption = 0.95,
    threshold: shared.ThresholdOption = 0.001,
    page_score: shared.PageScoreOption = "max",
    correct_every: shared.CorrectEveryOption = 0,
) -> None:
    """Answer OpenAI's protocol over HTTP: completions, chats, streams, log-probabilities.

    SIGTERM or Ctrl-C lets running requests finish; a second one ends at once.

    [b]Examples[/b]

    [cyan]lychee serve[/cyan]

    [cyan]lychee serve --model my-8b --port 9000 --max-num-seqs 32[/cyan]
    """
    from lychee_jax.attention.selection import SelectionPolicy
    from lychee_jax.engine.options import EngineOptions, GenerateOptions
    from lychee_jax.llm import choose_heads

    try:
        from lychee_jax.server.process import bind
        from lychee_jax.server.process import serve as run
        from lychee_jax.server.settings import ServerConfig
    except ModuleNotFoundError as error:
        raise UserError(f"serving needs {error.name}: pip install 'lychee-jax[serve]'") from error

    defaults = GenerateOptions(
        attention=attention,
        policy=SelectionPolicy(budget, sink, recent, rule, ratio, top_p_mass, threshold, page_score),
        page_size=page_size,
        correct_every=correct_every,
        implementation=implementation,
        kv_dtype=shared.kv_dtype_of(kv_dtype),
    )
    if cache_memory is not None and not 0 < cache_memory < 1 << 20:
        raise UserError(f"--cache-memory is {cache_memory}; it must be above 0, in GiB")
    engine = EngineOptions(
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        cache_memory=None if cache_memory is None else int(cache_memory * (1 << 30)),
    )
    config = ServerConfig(
        host=host,
        port=port,
        api_key=api_key,
        model_name=served_model_name or shared.model_name(model),
        max_queue=max_queue,
        default_max_tokens=default_max_tokens,
        drain_seconds=drain_seconds,
    )
    listener = bind(host, port)

    def load() -> ServedModel:
        """In the engine's thread, while the event loop answers that the model is loading."""
        import dataclasses

        from lychee_jax.server.model import ServedModel
        from lychee_jax.server.warmup import warm_up

        chosen = defaults

        def choose(folder: Path, config: ModelConfig, own: HeadMap | None, *_: object) -> None:
            nonlocal chosen
            chosen = dataclasses.replace(defaults, heads=choose_heads(config, own, heads))
            if heads is None and own is None and attention != "dense":
                print(f"notice: {folder} has no heads.json, so every head retrieves (--heads all)", file=sys.stderr)

        served = ServedModel.of(
            load_model(
                model, dtype, choose, quantize=quantize, quantize_head=quantize_head, tensor_parallel=tensor_parallel,
                heads=heads,
            ),
            chosen, engine,
        )  # fmt: skip
        return dataclasses.replace(served, readiness=warm_up(served.engine, served.defaults.attention_options))

    run(config, listener, load)
