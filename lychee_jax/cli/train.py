"""`lychee train-heads`: gates between 0 and 1 are trained against dense attention, and become a head map."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lychee_jax.cli import options as shared
from lychee_jax.cli.console import hash_weights, load_model
from lychee_jax.cli.heads import print_balance, print_map
from lychee_jax.errors import UserError

if TYPE_CHECKING:
    from lychee_jax.attention.selection import SelectionPolicy
    from lychee_jax.training.learn_heads import OnStep

_GATES, _ASKED, _READS, _RUN = "Gates", "What is asked", "What sparse heads read while gates are trained", "The run"


def train_heads(
    retrieval_heads: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="How many KV heads retrieve in the end, all of layer 0 included. The paper: 32 of the 256 of an 8 B "
            "model. Gates are pressed down to this share, and the N with the highest mean make the map.",
            rich_help_panel=_GATES,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Where map, gates, numbers, pictures and checkpoints go. The same run is resumed; one with other "
            "weights, texts or settings is refused.",
            rich_help_panel=_RUN,
        ),
    ],
    model: shared.ModelOption = None,
    dtype: shared.DtypeOption = None,
    gates: Annotated[
        Literal["hardkuma", "hardconcrete", "plain"],
        typer.Option(
            help="What a gate is: the paper's [b]hardkuma[/b], [b]hardconcrete[/b], or a [b]plain[/b] number that is "
            "rounded at the end.",
            rich_help_panel=_GATES,
        ),
    ] = "hardkuma",
    loss: Annotated[
        Literal["hidden", "logits"],
        typer.Option(
            help="What must not change on the answers: the last [b]hidden[/b] states (mean square, relative) or the "
            "[b]logits[/b] (KL divergence).",
            rich_help_panel=_GATES,
        ),
    ] = "hidden",
    learning_rate: Annotated[
        float,
        typer.Option(
            help="The learning rate of the gates. It rises over the first fifth of the steps and falls over the last.",
            rich_help_panel=_GATES,
        ),
    ] = 0.01,
    multiplier: Annotated[
        float,
        typer.Option(
            help="λ at the start: the penalty for more retrieval heads than asked for.", rich_help_panel=_GATES
        ),
    ] = 2.0,
    multiplier_rate: Annotated[
        float,
        typer.Option(help="How fast λ grows while there are too many (never above 20).", rich_help_panel=_GATES),
    ] = 0.001,
    data: Annotated[
        Literal["passkeys", "mixed", "multi-hop"],
        typer.Option(
            help="[b]passkeys[/b] of 32 words (the paper's), [b]mixed[/b]: passkeys, look-ups and variables, short "
            "and long, or [b]multi-hop[/b]: chains of variables, or --questions-file.",
            rich_help_panel=_ASKED,
        ),
    ] = "passkeys",
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default="generated prose",
            help="A UTF-8 text in which facts are hidden: best of the kind that the model is to read.",
            rich_help_panel=_ASKED,
        ),
    ] = None,
    questions_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="For multi-hop: questions with their paragraphs, HotpotQA's JSON or one such object a line.",
            rich_help_panel=_ASKED,
        ),
    ] = None,
    facts: Annotated[
        int, typer.Option(metavar="N", help="How many facts are hidden in each text.", rich_help_panel=_ASKED)
    ] = 10,
    questions: Annotated[
        int,
        typer.Option(metavar="N", help="At most so many questions are asked about each text.", rich_help_panel=_ASKED),
    ] = 10,
    min_length: Annotated[
        int, typer.Option(metavar="N", help="Tokens in the shortest prompts.", rich_help_panel=_ASKED)
    ] = 1024,
    max_length: Annotated[
        int, typer.Option(metavar="N", help="Tokens in the longest prompts.", rich_help_panel=_ASKED)
    ] = 10240,
    room: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Tokens kept free behind a prompt, for the questions and their answers.",
            rich_help_panel=_ASKED,
        ),
    ] = 768,
    page_size: Annotated[
        int, typer.Option(*shared.PAGE_SIZE_NAMES, help="Tokens in one page of the KV cache.", rich_help_panel=_READS)
    ] = 64,
    budget: Annotated[
        int | None,
        typer.Option(
            show_default="no limit",
            help="A head that does not retrieve reads at most this many tokens; a multiple of the page size. "
            "--rule budget needs it.",
            rich_help_panel=_READS,
        ),
    ] = None,
    sink: Annotated[
        int, typer.Option(help="So many tokens at the start of the text are always read.", rich_help_panel=_READS)
    ] = 128,
    recent: Annotated[
        int, typer.Option(help="So many tokens at the end of the text are always read.", rich_help_panel=_READS)
    ] = 256,
    rule: Annotated[
        shared.Rule,
        typer.Option(
            help="How many pages are picked; a [b]ratio[/b] suits texts of different lengths.", rich_help_panel=_READS
        ),
    ] = "ratio",
    ratio: Annotated[
        float, typer.Option(help="For --rule ratio: the share of all pages that is read.", rich_help_panel=_READS)
    ] = 0.3,
    top_p_mass: Annotated[
        float,
        typer.Option(
            help="For --rule top_p: the share of the attention that the pages read must hold.", rich_help_panel=_READS
        ),
    ] = 0.95,
    threshold: Annotated[
        float,
        typer.Option(
            help="For --rule threshold: pages with at least this share of the attention are read.",
            rich_help_panel=_READS,
        ),
    ] = 0.001,
    page_score: Annotated[
        shared.PageScore,
        typer.Option(
            help="What ranks a page: its best token ([b]max[/b]) or all of its attention ([b]lse[/b] or [b]mass[/b]).",
            rich_help_panel=_READS,
        ),
    ] = "max",
    steps: Annotated[int, typer.Option(metavar="N", help="How many training steps.", rich_help_panel=_RUN)] = 3000,
    batch: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            show_default="one for each device",
            help="Texts in one step, divided among all devices.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            help="The same seed gives the same texts, the same random gates and the same map.", rich_help_panel=_RUN
        ),
    ] = 0,
    checkpoint_every: Annotated[
        int, typer.Option(metavar="N", help="Save a checkpoint every N steps.", rich_help_panel=_RUN)
    ] = 100,
    keep: Annotated[int, typer.Option(metavar="N", help="Keep the newest N checkpoints.", rich_help_panel=_RUN)] = 3,
    balance: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Prefer maps that N devices share evenly: of each layer a multiple of N heads retrieve, none, or all.",
            rich_help_panel=_GATES,
        ),
    ] = 1,
) -> None:
    """Learn which KV heads of a model retrieve (LycheeDecode, arXiv 2602.04541).

    Every KV head above layer 0 gets a gate z: z = 1 reads the whole cache,
    z = 0 only the pages that were picked below. The model stays as it is; gates
    learn to keep its own answers about long texts, and each that is not 0 has a
    price. What comes out is a head map, for --heads or for the model's folder.

    While it runs: [b]density[/b] is the mean chance that a gate is not 0, [b]λ[/b] its price,
    [b]loss[/b] how much the answers' tokens differ from dense attention's, [b]kept[/b] the
    share of them that are the same.

    Ctrl-C ends it after the step in hand (twice: at once) and saves a checkpoint;
    the same command goes on, to the same result to the last bit.

    [b]Examples[/b]

    [cyan]lychee train-heads --model my-8b --output learned --retrieval-heads 32[/cyan]

    [cyan]lychee train-heads --model my-8b --output learned --retrieval-heads 32 --text books.txt --steps 1000[/cyan]

    [cyan]lychee generate --model my-8b --heads learned/heads.json --prompt-file book.txt[/cyan]
    """
    import jax

    from lychee_jax.training.learn_heads import FILES, TrainingPlan, learn

    plan = TrainingPlan(
        retrieval_heads, steps, len(jax.devices()) if batch is None else batch, seed, gates, loss, data, facts,
        questions, str(text) if text else None, str(questions_file) if questions_file else None, min_length, max_length,
        room, learning_rate, multiplier, multiplier_rate,
        _policy(page_size, budget, sink, recent, rule, ratio, top_p_mass, threshold, page_score, max_length + room),
        page_size,
    )  # fmt: skip
    loaded = load_model(model, dtype)
    hash_weights(loaded)
    total = loaded.config.num_layers * loaded.config.num_kv_heads
    try:
        with _progress(steps) as on_step:
            learned = learn(
                loaded, plan, output, checkpoint_every=checkpoint_every, keep=keep, on_step=on_step, balance=balance
            )  # fmt: skip
    except KeyboardInterrupt:
        if (output / "plan.json").exists():
            print(f"saved; the same command goes on from {output}", file=sys.stderr)
        raise
    print_map(learned.head_map, "learned")
    which = "highest" if balance == 1 else f"that suit {balance} devices (E[z] {learned.lost:.3f} lower in all)"
    print(f"E[z] is above 1/2 for {learned.above_half} of {total} heads; the {retrieval_heads} {which} make the map")
    if balance > 1:
        print_balance(learned.head_map, balance)
    print(f"{output}: {', '.join(FILES)}")


def _policy(
    page_size: int,
    budget: int | None,
    sink: int,
    recent: int,
    rule: shared.Rule,
    ratio: float,
    top_p_mass: float,
    threshold: float,
    page_score: shared.PageScore,
    longest: int,
) -> SelectionPolicy:
    """What sparse heads read; without a budget it is one that holds the longest row."""
    from lychee_jax.attention.selection import SelectionPolicy

    if page_size < 1:
        raise UserError(f"page size is {page_size}; it must be at least 1")
    if budget is None:
        if rule == "budget":
            raise UserError("--rule budget needs --budget: the tokens that a sparse head reads")
        budget = page_size * (
            -(-max(longest, 1) // page_size) + sum(-(-max(n, 0) // page_size) for n in (sink, recent))
        )
    return SelectionPolicy(budget, sink, recent, rule, ratio, top_p_mass, threshold, page_score)


@contextlib.contextmanager
def _progress(steps: int) -> Iterator[OnStep]:
    """A bar over all steps on standard error, with the newest numbers."""
    from rich import progress
    from rich.console import Console

    columns = (  # no wider than a terminal of 80 columns
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=10),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("compiling", total=steps)

        def on_step(done: int, metrics: dict[str, float]) -> None:
            shown = (
                f"density {metrics['density']:.3f} · λ {metrics['multiplier']:.2f} · loss {metrics['loss']:.4f} · "
                f"kept {metrics['kept']:.0%}"
                if metrics
                else "compiling"
            )
            bar.update(task, completed=done, description=shown)

        yield on_step
