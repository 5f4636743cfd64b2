"""What the command line shows on a terminal: progress bars and spinners."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

if TYPE_CHECKING:
    from checkpoints_convert.progress import Progress
    from lychee_jax.llm import LLM
    from lychee_jax.loading import BeforeWeights


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on stderr for each stage; nothing where stderr is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield show


def load_model(model: str | None, dtype: str | None, before_weights: BeforeWeights | None = None) -> LLM:
    """Load what --model and --dtype name, with a spinner on standard error where that is a terminal."""
    from rich.markup import escape

    from lychee_jax.loading import find, load

    folder = find(model)  # a download shows its own progress
    with Console(stderr=True).status(f"Loading {escape(model) if model else 'the bundled model'}"):
        return load(folder, dtype, before_weights=before_weights)
