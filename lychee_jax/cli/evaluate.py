"""`lychee eval`: benchmarks of what a model answers, with several variants of attention at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lychee_jax.cli.console import hash_weights, reading, stages
from lychee_jax.cli.evaluation_options import (
    ASKED,
    RUN,
    Answering,
    BatchOption,
    Chat,
    DecodeLastOption,
    MessagesOption,
    split_names,
    spread,
    whole_numbers,
)
from lychee_jax.errors import UserError
from lychee_jax.files import json_text

if TYPE_CHECKING:
    from lychee_jax.evaluation.cases import Cell, Task
    from lychee_jax.evaluation.report import Style
    from lychee_jax.evaluation.runner import EvaluationPlan
    from lychee_jax.llm import LLM
    from lychee_jax.text.chat import ChatOptions

eval_app = typer.Typer(
    help="Score what a model answers, dense and hybrid on the same prompts, in one run that can be resumed.",
    rich_markup_mode="rich",
)

LengthsOption = Annotated[
    str, typer.Option("--lengths", metavar="N,N,…", help="How long the prompts are, in tokens.", rich_help_panel=ASKED)
]
SamplesOption = Annotated[
    int, typer.Option(metavar="N", help="How many prompts for each task, length and depth.", rich_help_panel=ASKED)
]
SeedOption = Annotated[int, typer.Option(help="The same seed gives the same prompts.", rich_help_panel=ASKED)]
OutputOption = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        help="Where answers, prompts and the report go. The same run is resumed; one with other weights, texts or "
        "settings is refused.",
        rich_help_panel=RUN,
    ),
]


@eval_app.command("passkey")
@spread
def eval_passkey(
    *,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="A,B,…",
            help="What is hidden: passkey, long-passkey, only-passkey, lookup, variable.",
            rich_help_panel=ASKED,
        ),
    ] = "passkey",
    lengths: LengthsOption = "4096,8192,16384",
    depths: Annotated[
        str,
        typer.Option(
            metavar="D,D,…",
            help="Where in the text it stands, 0 (start) to 1 (end); [b]any[/b]: anywhere.",
            rich_help_panel=ASKED,
        ),
    ] = "0,0.25,0.5,0.75,1",
    samples: SamplesOption = 10,
    facts: Annotated[
        int, typer.Option(metavar="N", help="Facts hidden in a prompt, of which one is asked.", rich_help_panel=ASKED)
    ] = 16,
    chat: Chat,
    messages: MessagesOption = None,
    seed: SeedOption = 0,
    answering: Answering,
    decode_last: DecodeLastOption = 0,
    batch: BatchOption = 8,
    output: OutputOption = Path("eval-passkey"),
) -> None:
    """Facts hidden in long text: a grid of length and depth, with a heatmap.

    [b]Example[/b]

    [cyan]lychee eval passkey --lengths 4096,16384 --samples 20 --budget 1/8,1024[/cyan]
    """
    from lychee_jax.evaluation.cases import Cell
    from lychee_jax.evaluation.passkey import STYLE, Passkey
    from lychee_jax.evaluation.runner import EvaluationPlan, tokenizer_of

    variants = answering.variants()
    sizes, places = whole_numbers("--lengths", lengths), _depths(depths)
    asked = chat.options(messages)
    loaded, options = answering.load()
    made = [Passkey(tokenizer_of(loaded), name, facts, seed, chat=asked) for name in split_names("--tasks", tasks)]
    cells = [Cell(task, length, samples, depth) for length in sizes for task in made for depth in places]
    plan = EvaluationPlan(cells, variants, options, batch, decode_last)
    _evaluate(loaded, STYLE, plan, output, {"seed": seed, "facts": facts, **_settings(asked, loaded)})


@eval_app.command("ruler")
@spread
def eval_ruler(
    *,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="A,B,…",
            help="[b]all[/b] 13, [b]free[/b] (the six that need no data), or names: niah_single_1 to 3, "
            "niah_multikey_1 to 3, niah_multivalue, niah_multiquery, vt, cwe, fwe, qa_1, qa_2.",
            rich_help_panel=ASKED,
        ),
    ] = "free",
    lengths: LengthsOption = "8192",
    samples: SamplesOption = 20,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Holds PaulGrahamEssays.json, squad.json and hotpotqa.json, as RULER's scripts fetch them.",
            rich_help_panel=ASKED,
        ),
    ] = None,
    chat: Chat,
    messages: MessagesOption = None,
    seed: SeedOption = 42,
    answering: Answering,
    decode_last: DecodeLastOption = 0,
    batch: BatchOption = 8,
    output: OutputOption = Path("eval-ruler"),
) -> None:
    """RULER (arXiv 2404.06654): 13 tasks of retrieval, tracing, counting and question answering.

    Lengths include the tokens to be generated. Published figures use 500 samples of each task.

    [b]Example[/b]

    [cyan]lychee eval ruler --model my-8b --chat --tasks all --data ruler-data --lengths 32768 --budget 1024,4096[/cyan]
    """
    from lychee_jax.evaluation.cases import Cell
    from lychee_jax.evaluation.ruler import NEED_NO_DATA, STYLE, TASKS, Ruler
    from lychee_jax.evaluation.ruler_data import Files
    from lychee_jax.evaluation.runner import EvaluationPlan, tokenizer_of

    variants = answering.variants()
    sizes, groups = whole_numbers("--lengths", lengths), {"all": TASKS, "free": NEED_NO_DATA}
    names = [name for word in split_names("--tasks", tasks) for name in groups.get(word, (word,))]
    asked = chat.options(messages)
    (loaded, options), files = answering.load(), Files(data)
    made = [Ruler(tokenizer_of(loaded), name, files, seed, asked) for name in names]
    cells = [Cell(task, length, samples) for length in sizes for task in made]
    plan = EvaluationPlan(cells, variants, options, batch, decode_last)
    _evaluate(loaded, STYLE, plan, output, {"seed": seed, "chat": False, **_settings(asked, loaded)})


@eval_app.command("longbench")
@spread
def eval_longbench(
    *,
    data: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Holds LongBench's JSONL files, one a task: data.zip of the dataset THUDM/LongBench, unpacked.",
            rich_help_panel=ASKED,
        ),
    ],
    tasks: Annotated[
        str,
        typer.Option(
            metavar="A,B,…",
            show_default="all but trec",
            help="Of multifieldqa_en, narrativeqa, qasper, 2wikimqa, hotpotqa, qmsum, triviaqa, "
            "passage_retrieval_en, and trec.",
            rich_help_panel=ASKED,
        ),
    ] = "",
    lengths: Annotated[
        str,
        typer.Option(
            metavar="N,N,…",
            show_default="the model's limit",
            help="Tokens of a prompt at most; longer ones lose their middle.",
            rich_help_panel=ASKED,
        ),
    ] = "",
    samples: Annotated[
        int, typer.Option(metavar="N", help="The first N lines of each file at most.", rich_help_panel=ASKED)
    ] = 200,
    chat: Chat,
    messages: MessagesOption = None,
    answering: Answering,
    decode_last: DecodeLastOption = 0,
    batch: BatchOption = 8,
    output: OutputOption = Path("eval-longbench"),
) -> None:
    """LongBench v1 (arXiv 2308.14508): question answering, summaries and retrieval in real texts.

    [b]Example[/b]

    [cyan]lychee eval longbench --model my-8b --chat --data longbench --budget 1024,4096 --decode-last 32[/cyan]
    """
    from lychee_jax.evaluation.cases import Cell
    from lychee_jax.evaluation.longbench import STYLE, TASKS, LongBench
    from lychee_jax.evaluation.prompts import LONGBENCH
    from lychee_jax.evaluation.runner import EvaluationPlan, tokenizer_of

    variants = answering.variants()
    asked = chat.options(messages)
    names = split_names("--tasks", tasks) if tasks else list(TASKS)
    sizes = whole_numbers("--lengths", lengths) if lengths else []
    loaded, options = answering.load()
    made = [LongBench(tokenizer_of(loaded), name, data, asked) for name in names]
    # One limit for all tasks, so that the table has one row a variant.
    sizes = sizes or [loaded.config.max_tokens - max(LONGBENCH[name].max_new_tokens for name in names)]
    cells = [Cell(task, length, min(samples, len(task.lines))) for length in sizes for task in made]
    plan = EvaluationPlan(cells, variants, options, batch, decode_last)
    _evaluate(loaded, STYLE, plan, output, {"chat": False, **_settings(asked, loaded)})


@eval_app.command("perplexity")
@spread
def eval_perplexity(
    *,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            show_default="documents with questions in the bundled model's language",
            help="A UTF-8 text; may be given several times.",
            rich_help_panel=ASKED,
        ),
    ] = None,
    lengths: LengthsOption = "4096,8192",
    scored: Annotated[
        int,
        typer.Option(
            metavar="N", help="Tokens after each length that are decoded one by one and scored.", rich_help_panel=ASKED
        ),
    ] = 256,
    samples: Annotated[
        int, typer.Option(metavar="N", help="Windows of each text and length.", rich_help_panel=ASKED)
    ] = 8,
    seed: SeedOption = 0,
    answering: Answering,
    batch: BatchOption = 8,
    output: OutputOption = Path("eval-perplexity"),
) -> None:
    """Perplexity of any text, token by token through the decode path: dense against hybrid.

    Each window is a stretch of `--lengths` tokens that is read densely, and `--scored` tokens that are decoded.

    [b]Example[/b]

    [cyan]lychee eval perplexity --model my-8b --text book.txt --lengths 8192,32768 --budget 1024,4096[/cyan]
    """
    from lychee_jax.evaluation.cases import Cell
    from lychee_jax.evaluation.perplexity import STYLE, OwnPerplexity, file_tasks
    from lychee_jax.evaluation.runner import EvaluationPlan, tokenizer_of

    variants = answering.variants()
    sizes = whole_numbers("--lengths", lengths)
    if scored < 1:
        raise UserError(f"--scored is {scored}; at least one token must be scored")
    loaded, options = answering.load()
    tokenizer = tokenizer_of(loaded)
    made: list[Task] = [*file_tasks(tokenizer, text or (), scored, samples)]
    made = made or [OwnPerplexity(tokenizer, scored, seed)]
    cells = [Cell(task, length, samples) for task in made for length in sizes]
    plan = EvaluationPlan(cells, variants, options, batch)
    settings = {"seed": seed, "scored": scored, **({"windows": samples} if text else {})}
    _evaluate(loaded, STYLE, plan, output, settings)


@eval_app.command("picks")
@spread
def eval_picks(
    *,
    lengths: LengthsOption = "8192",
    samples: SamplesOption = 4,
    seed: SeedOption = 0,
    answering: Answering,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="One JSON object on standard output instead of lines.", rich_help_panel=RUN),
    ] = False,
) -> None:
    """How many of the pages that sparse heads pick differ over a quantised cache (--kv-dtype int8 or fp8).

    Prompts are those of [b]eval passkey[/b]; the step after each is watched with and without quantisation. Pages that
    are always read do not count.

    [b]Example[/b]

    [cyan]lychee eval picks --model my-8b --kv-dtype int8 --lengths 8192,32768 --budget 1024,4096[/cyan]
    """
    import dataclasses

    from lychee_jax.evaluation.passkey import Passkey
    from lychee_jax.evaluation.picks import compare_picks
    from lychee_jax.evaluation.runner import tokenizer_of

    variants = [variant for variant in answering.variants() if variant.budget is not None]
    sizes = whole_numbers("--lengths", lengths)
    if samples < 1:
        raise UserError(f"--samples is {samples}; it must be at least 1")
    if not variants:
        raise UserError("--attention dense picks nothing; give hybrid")
    if answering.kv_dtype == "auto":
        raise UserError("there is nothing to compare: --kv-dtype is auto; give int8 or fp8")
    loaded, options = answering.load()
    task = Passkey(tokenizer_of(loaded), seed=seed, facts=1)
    rows: list[dict[str, object]] = []
    with stages() as bars:
        for length in sizes:
            prompts = [task.case(length, None, index).tokens for index in range(samples)]
            for variant in variants:
                asked = variant.options(options, length, 1)
                where = f"{length:,}, {variant.label}"
                found = compare_picks(
                    loaded, prompts, asked,
                    lambda done, where=where: bars.show("readings", done, 2 * samples, "prompts", where),
                )  # fmt: skip
                rows.append(
                    {"length": length, "budget": asked.policy.budget, **dataclasses.asdict(found), "share": found.share}
                )
                if not as_json:
                    print(f"{length:,} tokens, budget {asked.policy.budget}, {found.kv_dtype}: {found}")
    if as_json:
        print(json_text({"rows": rows}))


def _evaluate(loaded: LLM, style: Style, plan: EvaluationPlan, output: Path, settings: Mapping[str, object]) -> None:
    """Run with a progress bar, then print the table and where everything is."""
    from lychee_jax.evaluation.session import evaluate

    done = 0
    hash_weights(loaded)
    with stages() as bars:

        def on_progress(cell: Cell, answers: int) -> None:
            nonlocal done
            done += answers
            where = "" if cell.depth is None else f", depth {cell.depth:g}"
            bars.show("answers", done, plan.answers, "answers", f"{cell.task.name} at {cell.length:,}{where}")

        report = evaluate(loaded, style, plan, output, dict(settings), on_progress, reading(bars))
    print(report.markdown())
    print(f"\n{output}: results.json, results.md, results.png, answers.jsonl, prompts.jsonl")


def _settings(chat: ChatOptions | None, loaded: LLM) -> dict[str, object]:
    """What a run's folder keeps of the chat."""
    from lychee_jax.files import digest_of, json_text

    if chat is None or loaded.tokenizer is None:
        return {}
    return {**chat.to_json(), "chat_template": digest_of(json_text(loaded.tokenizer.chat_template))}


def _depths(text: str) -> list[float | None]:
    found: list[float | None] = []
    for name in split_names("--depths", text):
        try:
            depth = None if name == "any" else float(name)
        except ValueError as error:
            raise UserError(f"--depths has {name!r}; give numbers from 0 to 1, or any") from error
        if depth is not None and not 0.0 <= depth <= 1.0:
            raise UserError(f"--depths has {name}; give numbers from 0 to 1, or any")
        found.append(depth)
    return found
