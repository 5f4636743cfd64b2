"""`python -m lychee_jax.studies.real_model --model DIR --text BOOK …`: one model's study; the same command resumes."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from lychee_jax.errors import UserError
from lychee_jax.studies.command import main, numbers, pair

STAGES = ("prompts", "learn", "score", "generate", "report")
_ASKED, _LEARNED, _RUN = "What is asked", "What is learned", "The run"


def run(
    model: Annotated[str, typer.Option(metavar="DIR", rich_help_panel=_RUN, help="Folder of the model.")],
    text: Annotated[Path, typer.Option(metavar="FILE", rich_help_panel=_ASKED,
        help="An English book: haystack of the prompts, and what perplexity is measured on.")],
    training_text: Annotated[Path, typer.Option(metavar="FILE", rich_help_panel=_LEARNED,
        help="Another book: haystack of the training texts.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", rich_help_panel=_RUN,
        help="Folder of the study: resumed if it holds this one, made if it is missing.")],
    stages: Annotated[str, typer.Option(metavar="A,B,…", rich_help_panel=_RUN,
        help="prompts: write them for other systems. learn: train the maps. score: every variant. generate: answers "
        "of the engine. report: the tables.")] = ",".join(STAGES),
    lengths: Annotated[str, typer.Option(metavar="N,N,…", rich_help_panel=_ASKED,
        help="Tokens of the prompts.")] = "2048,4096,7680",
    budgets: Annotated[str, typer.Option(metavar="N,N,…", rich_help_panel=_ASKED,
        help="Tokens that a sparse head reads.")] = "256,512,1024,2048",
    compared: Annotated[int, typer.Option(metavar="N", rich_help_panel=_ASKED,
        help="The budget at which maps are compared.")] = 512,
    samples: Annotated[int, typer.Option(metavar="N", rich_help_panel=_ASKED,
        help="Prompts of each task at the longest length.")] = 500,
    others: Annotated[int, typer.Option(metavar="N", rich_help_panel=_ASKED,
        help="Prompts of each task at the other lengths.")] = 200,
    windows: Annotated[int, typer.Option(metavar="N", rich_help_panel=_ASKED,
        help="Windows of text, for perplexity.")] = 64,
    rows: Annotated[int, typer.Option(metavar="N", rich_help_panel=_RUN, help="Prompts at a time.")] = 64,
    retrieval_heads: Annotated[str, typer.Option(metavar="N,N,…", rich_help_panel=_LEARNED,
        help="Of the maps, the main number first.")] = "16,12,24",
    seeds: Annotated[str, typer.Option(metavar="N,N,…", rich_help_panel=_LEARNED,
        help="Of trainings and random maps.")] = "0,1,2",
    steps: Annotated[int, typer.Option(metavar="N", rich_help_panel=_LEARNED, help="Of each training.")] = 200,
    train_lengths: Annotated[str, typer.Option(metavar="N,N", rich_help_panel=_LEARNED,
        help="Shortest and longest training prompt, in tokens.")] = "5400,7168",
    ratio: Annotated[float, typer.Option(rich_help_panel=_LEARNED,
        help="Share of the pages that sparse heads read in training.")] = 0.1,
    data: Annotated[str, typer.Option(rich_help_panel=_LEARNED, help="What is asked in training.")] = "passkeys",
    rivals: Annotated[Path | None, typer.Option(metavar="FILE", rich_help_panel=_RUN,
        help="Answers of other systems to the same prompts (tests/hardware/kvpress_answers.py).")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", rich_help_panel=_RUN,
        help="Write the results there too.")] = None,
) -> None:  # fmt: skip
    """Learn head maps of a real model, and compare hybrid attention with dense attention and with other systems."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from lychee_jax.files import write_text
    from lychee_jax.loading import load
    from lychee_jax.run_folder import read_lines, write_json
    from lychee_jax.studies.real_model.prompts import Prompts
    from lychee_jax.studies.real_model.report import markdown, read_rivals, targets
    from lychee_jax.studies.real_model.study import PROMPTS, Sizes, Study
    from lychee_jax.studies.real_model.variants import Grid

    wanted = [stage.strip() for stage in stages.split(",")]
    if unknown := [stage for stage in wanted if stage not in STAGES]:
        raise UserError(f"--stages {unknown[0]} is unknown; use some of {', '.join(STAGES)}")
    grid = Grid(
        numbers("--retrieval-heads", retrieval_heads), numbers("--seeds", seeds), numbers("--budgets", budgets),
        compared,
    )  # fmt: skip
    sizes = Sizes(
        tuple(numbers("--lengths", lengths)), samples, others, windows, rows, steps=steps,
        train_lengths=pair("--train-lengths", train_lengths), ratio=ratio, data=data,
    )  # fmt: skip
    loaded = load(model)
    if loaded.tokenizer is None:
        raise UserError(f"{model} has no tokenizer, and the study is about text")
    bars = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage)
            progress.update(bars[stage], completed=done, total=total)

        study = Study(loaded, Prompts(loaded.tokenizer, text), training_text, grid, sizes, output, report)
        if "prompts" in wanted:
            study.write_prompts()
        if "learn" in wanted:
            study.learn()
        if "score" in wanted:
            study.score()
        if "generate" in wanted:
            study.generate()
    if "report" not in wanted:
        return
    results = study.results(f"python -m lychee_jax.studies.real_model {shlex.join(sys.argv[1:])}")
    if rivals is not None:
        asked = {
            (line["task"], line["length"], line["index"]): line["references"][0]
            for line in read_lines(output / PROMPTS)
        }
        results["rivals"] = read_rivals(rivals, asked)
    results["targets"] = targets(results)
    write_json(output / "results.json", results)
    write_text(output / "report.md", markdown(results))
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(output / "results.json", json_file)
    typer.echo(output / "report.md")


if __name__ == "__main__":
    raise SystemExit(main(run))
