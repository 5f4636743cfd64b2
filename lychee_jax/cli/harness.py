"""`lychee eval harness`: the tasks of lm-evaluation-harness, answered by the engine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lychee_jax.cli import evaluate as others
from lychee_jax.cli import options as shared
from lychee_jax.cli.console import load_model, progress_bar
from lychee_jax.files import json_text

_ASKED, _RUN = "What is asked", "The run"


def eval_harness(
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
        typer.Option(metavar="DIR", help="A folder with tasks of your own as YAML files.", rich_help_panel=_ASKED),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", show_default="all", help="Questions of each task.", rich_help_panel=_ASKED),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            show_default="as the task says",
            help="Examples in front of every question.",
            rich_help_panel=_ASKED,
        ),
    ] = None,
    chat: shared.ChatOption = False,
    system: shared.SystemOption = None,
    template_kwargs: shared.TemplateKwargsOption = None,
    model: shared.ModelOption = None,
    dtype: shared.DtypeOption = None,
    implementation: shared.ImplementationOption = None,
    attention: others.AttentionOption = "dense",
    heads: shared.HeadsOption = None,
    page_size: shared.PageSizeOption = 64,
    budget: others.BudgetOption = "1/8",
    sink: shared.SinkOption = 128,
    recent: shared.RecentOption = 256,
    rule: shared.RuleOption = "budget",
    ratio: shared.RatioOption = 0.125,
    top_p_mass: shared.TopPMassOption = 0.95,
    threshold: shared.ThresholdOption = 0.001,
    page_score: shared.PageScoreOption = "max",
    correct_every: shared.CorrectEveryOption = 0,
    decode_last: others.DecodeLastOption = 0,
    batch: others.BatchOption = 16,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            show_default="nothing is kept",
            help="Where answers, samples and results go; a run that is there already is resumed.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="One JSON object on standard output instead of a table.", rich_help_panel=_RUN),
    ] = False,
) -> None:
    """The tasks and metrics of lm-evaluation-harness (the extra [b]eval[/b]: pip install 'lychee-jax[[eval]').

    Tasks fetch their data from the Hugging Face Hub, unless they name files. A budget that is a share of the length
    counts from the largest power of two in a prompt's tokens.

    [b]Examples[/b]

    [cyan]lychee eval harness hellaswag arc_easy --model my-8b --limit 200[/cyan]

    [cyan]lychee eval harness my_task --include tasks --model my-8b --attention dense,hybrid --budget 1024[/cyan]
    """
    from lychee_jax.evaluation.harness import evaluate
    from lychee_jax.evaluation.variants import variants_of

    variants = variants_of(others._names("--attention", attention), others._names("--budget", budget))
    asked = others._chat(chat, system, None, template_kwargs)
    options = others._options(
        page_size, sink, recent, rule, ratio, top_p_mass, threshold, page_score, correct_every, implementation
    )
    loaded = load_model(model, dtype)
    with progress_bar() as progress:
        report = evaluate(
            loaded, tasks, variants, others._of_model(loaded, options, heads), include=include, limit=limit,
            num_fewshot=num_fewshot, chat=asked, decode_last=decode_last, batch=batch, output=output,
            on_progress=progress,
        )  # fmt: skip
    if as_json:
        print(json_text(report.to_json()))
        return
    print(report.markdown())
    if output is not None:
        print(f"\n{output}: results.json, answers.jsonl, samples.jsonl", file=sys.stderr)
