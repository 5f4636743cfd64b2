"""`python -m lychee_jax.studies.head_maps --output DIR`: trains, compares and reports; the same command resumes."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from lychee_jax.studies.command import main, numbers, pair

_ASKED, _LEARNED, _RUN = "What is asked", "What is learned", "The run"


def run(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", rich_help_panel=_RUN,
        help="Folder of the study: resumed if it holds this one, made if it is missing.")],
    model: Annotated[str | None, typer.Option(metavar="DIR", show_default="the bundled model", rich_help_panel=_RUN,
        help="Folder of a model with the bundled model's vocabulary.")] = None,
    points: Annotated[str, typer.Option(metavar="N,N,…", rich_help_panel=_ASKED,
        help="1: budgets. 2: methods of choosing heads. 3: pages, rules, cache correction. 4: gates over training.",
    )] = "1,2,3,4",
    tasks: Annotated[str, typer.Option(metavar="A,B,…", rich_help_panel=_ASKED,
        help="Some of only-passkey, passkey, lookup, variable.")] = "only-passkey,passkey,lookup,variable",
    contexts: Annotated[str, typer.Option(metavar="N,N,…", rich_help_panel=_ASKED,
        help="Tokens of the prompts.")] = "8192,16384,32768",
    samples: Annotated[int, typer.Option(metavar="N", rich_help_panel=_ASKED,
        help="Prompts of each task and context.")] = 100,
    dialogues: Annotated[int, typer.Option(metavar="N", rich_help_panel=_ASKED,
        help="Long generations, for cache correction.")] = 16,
    dialogue_tokens: Annotated[int, typer.Option(metavar="N", rich_help_panel=_ASKED,
        help="Tokens of each of them.")] = 2000,
    seeds: Annotated[str, typer.Option(metavar="N,N,…", rich_help_panel=_LEARNED,
        help="Of trainings, of random maps, of what layers are chosen on. Prompts are the same for all.")] = "0,1,2",
    retrieval_heads: Annotated[int, typer.Option(metavar="N", rich_help_panel=_LEARNED,
        help="Of every map, layer 0 included: whole layers of them.")] = 8,
    steps: Annotated[int, typer.Option(metavar="N", rich_help_panel=_LEARNED, help="Of each training.")] = 400,
    batch: Annotated[int, typer.Option(metavar="N", rich_help_panel=_LEARNED, help="Documents a step.")] = 1,
    learning_rate: Annotated[float, typer.Option(rich_help_panel=_LEARNED, help="Of the gates.")] = 0.01,
    loss: Annotated[Literal["hidden", "logits"], typer.Option(rich_help_panel=_LEARNED,
        help="What is to stay as under dense attention.")] = "hidden",
    ratio: Annotated[float, typer.Option(rich_help_panel=_LEARNED,
        help="Share of the pages that sparse heads read in training.")] = 0.3,
    train_lengths: Annotated[str, typer.Option(metavar="N,N", rich_help_panel=_LEARNED,
        help="Shortest and longest training prompt, in tokens.")] = "6145,8192",
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", rich_help_panel=_RUN,
        help="Write the results there too.")] = None,
    chunk_tokens: Annotated[int | None, typer.Option(metavar="N", min=1, rich_help_panel=_RUN,
        show_default="16384 on a CPU, else 262144", help="Prompt tokens that are read at once.")] = None,
    publish: Annotated[Path | None, typer.Option(metavar="DOCS", rich_help_panel=_RUN,
        help="Put results, report and pictures into this folder's results/ as heads*.")] = None,
) -> None:  # fmt: skip
    """Train gates of three families, and compare the maps with others and with dense attention.

    Everything is a row of results.json; report.md has tables, heads_*.png pictures. The defaults are for a GPU; a
    small form for two cores:

    [cyan]python -m lychee_jax.studies.head_maps -o study --contexts 1024 --samples 4 --seeds 0 --steps 6
    --train-lengths 512,1024 --dialogues 1 --dialogue-tokens 200[/cyan]
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from lychee_jax.files import write_text
    from lychee_jax.loading import load
    from lychee_jax.studies.head_maps.pictures import draw
    from lychee_jax.studies.head_maps.report import markdown
    from lychee_jax.studies.head_maps.rows import Grid
    from lychee_jax.studies.head_maps.study import RESULTS, Sizes, Study

    shortest, longest = pair("--train-lengths", train_lengths)
    grid = Grid(
        numbers("--points", points), [task.strip() for task in tasks.split(",")], numbers("--contexts", contexts),
        numbers("--seeds", seeds), retrieval_heads,
    )  # fmt: skip
    sizes = Sizes(
        samples=samples, retrieval_heads=retrieval_heads, steps=steps, batch=batch, learning_rate=learning_rate,
        loss=loss, ratio=ratio, lengths=(shortest, longest), dialogues=dialogues, dialogue_tokens=dialogue_tokens,
    )  # fmt: skip
    bars = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage)
            progress.update(bars[stage], completed=done, total=total)

        study = Study(load(model), grid, sizes, output, report, chunk_tokens=chunk_tokens)
        results = study.run(f"python -m lychee_jax.studies.head_maps {shlex.join(sys.argv[1:])}")
    write_text(output / "report.md", markdown(results))
    pictures = draw(results, output)
    copies = [(output / RESULTS, json_file)] if json_file else []
    if publish is not None:
        folder = publish / "results"
        copies += [(output / RESULTS, folder / "heads.json"), (output / "report.md", folder / "heads.md")]
        copies += [(picture, folder / picture.name) for picture in pictures]
    for source, target in copies:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    typer.echo(output / "report.md")


if __name__ == "__main__":
    raise SystemExit(main(run))
