"""`lychee eval harness`: the tasks of lm-evaluation-harness, answered by the engine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lychee_jax.cli.console import progress_bar
from lychee_jax.cli.evaluation_options import (
    ASKED,
    RUN,
    Answering,
    BatchOption,
    Chat,
    DecodeLastOption,
    MessagesOption,
    spread,
)
from lychee_jax.files import json_text


@spread
def eval_harness(
    *,
    tasks: Annotated[
        list[str],
        typer.Argument(
            metavar="TASKS …",
            help="Tasks, groups or tags of lm-evaluation-harness, patterns such as [b]mmlu_*[/b], or YAML files.",
            show_default=False,
        ),
    ],
    include: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A folder with tasks of your own as YAML files.", rich_help_panel=ASKED),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", show_default="all", help="Questions of each task.", rich_help_panel=ASKED),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            show_default="as the task says",
            help="Examples in front of every question.",
            rich_help_panel=ASKED,
        ),
    ] = None,
    chat: Chat,
    messages: MessagesOption = None,
    answering: Answering,
    decode_last: DecodeLastOption = 0,
    batch: BatchOption = 16,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            show_default="nothing is kept",
            help="Where answers, samples and results go; a run that is there already is resumed.",
            rich_help_panel=RUN,
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="One JSON object on standard output instead of a table.", rich_help_panel=RUN),
    ] = False,
) -> None:
    """The tasks and metrics of lm-evaluation-harness (install with the extra [b]eval[/b]).

    Tasks fetch their data from the Hugging Face Hub, unless they name files. A budget that is a share counts from the
    largest power of two in a prompt's tokens.

    [b]Examples[/b]

    [cyan]lychee eval harness hellaswag arc_easy --model my-8b --limit 200[/cyan]

    [cyan]lychee eval harness my_task --include tasks --model my-8b --attention dense,hybrid --budget 1024[/cyan]
    """
    from lychee_jax.evaluation.harness import evaluate

    variants, asked = answering.variants(), chat.options(messages)
    loaded, options = answering.load()
    with progress_bar() as progress:
        report = evaluate(
            loaded, tasks, variants, options, include=include, limit=limit, num_fewshot=num_fewshot, chat=asked,
            decode_last=decode_last, batch=batch, output=output, on_progress=progress,
        )  # fmt: skip
    if as_json:
        print(json_text(report.to_json()))
        return
    print(report.markdown())
    if output is not None:
        print(f"\n{output}: results.json, answers.jsonl, samples.jsonl", file=sys.stderr)
