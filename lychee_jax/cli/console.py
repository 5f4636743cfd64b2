"""What the command line shows on a terminal: progress bars."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Literal

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)  # fmt: skip
from rich.progress import Progress as Bars

if TYPE_CHECKING:
    from checkpoints_convert.progress import Progress
    from lychee_jax.llm import LLM
    from lychee_jax.loading import BeforeWeights

_LONG = 2048  # tokens of a prompt


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


class Stages:
    """Bars on standard error for what takes long, with the share done and the time left; a finished stage disappears.

    Programs that are being compiled have a bar of their own, without being told.
    """

    def __init__(self, bars: _PolledBars) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def show(self, stage: str, done: int, total: int, unit: str = "", label: str | None = None) -> None:
        """How far a stage has come; `unit` says of what, "bytes" of bytes; `label` is its name if that changes."""
        if done >= total:
            if stage in self._tasks:
                self._bars.remove_task(self._tasks.pop(stage))
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total, amount="")
        self._bars.update(
            self._tasks[stage], completed=done, total=total, description=label or stage,
            amount=_amount(done, total, unit),
        )  # fmt: skip

    def stop(self) -> None:
        """Make way for text."""
        self._bars.stop()


@contextlib.contextmanager
def stages(console: Console | None = None) -> Iterator[Stages]:
    """Bars on standard error; nothing where that is no terminal."""
    from lychee_jax.engine.compile_timer import count_programs

    console = console or Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        TextColumn("{task.fields[amount]}", markup=False),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    shows = console.is_interactive and console.is_terminal
    bars = _PolledBars(*columns, console=console, transient=True, redirect_stdout=False, disable=not shows)
    compiling = bars.add_task("Compiling", total=0, amount="", visible=False)

    def poll() -> None:
        done, total = count_programs()
        amount = _amount(done, total, "programs")
        bars.update(compiling, completed=done, total=total, visible=done < total, amount=amount)

    bars.poll = poll
    with bars:
        yield Stages(bars)


class _PolledBars(Bars):
    """Bars that ask how far things are, each time that they are drawn."""

    poll: Callable[[], None] = staticmethod(lambda: None)

    def get_renderables(self) -> Iterable[RenderableType]:
        """What is drawn."""
        self.poll()
        yield from super().get_renderables()


def _amount(done: int, total: int, unit: str) -> str:
    if unit == "bytes":
        scale, name = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
        return f"{done / scale:.1f} of {total / scale:.1f} {name}"
    return f"{done:,} of {total:,} {unit}"


def load_model(
    model: str | None,
    dtype: str | None,
    before_weights: BeforeWeights | None = None,
    bars: Stages | None = None,
    *,
    quantize: Literal["none", "int8", "fp8"] = "none",
    quantize_head: bool = False,
    tensor_parallel: int = 1,
    heads: str | None = None,
) -> LLM:
    """Load what --model names, as --dtype and --quantize say, with bars on standard error where that is a terminal.

    On several devices the heads are shared out for the map that --heads names.
    """
    from lychee_jax.loading import find, load

    folder = find(model)  # a download shows its own progress
    stage = f"Loading {model or 'the bundled model'}"
    with contextlib.nullcontext(bars) if bars is not None else stages() as shown:
        return load(
            folder, dtype, quantize=None if quantize == "none" else quantize, quantize_head=quantize_head,
            tensor_parallel=tensor_parallel, heads=heads, before_weights=before_weights,
            on_progress=lambda done, total: shown.show(stage, done, total, "bytes"),
        )  # fmt: skip


def reading(bars: Stages) -> Callable[[int, int], None]:
    """What shows how much of long prompts has been read; a bar for short ones would only flicker."""

    def show(done: int, total: int) -> None:
        if total >= _LONG:
            bars.show("Reading the prompts", done, total, "tokens")

    return show


def hash_weights(loaded: LLM) -> None:
    """Find out what tells the model's weights apart, with a bar on standard error: for a run that keeps its results."""
    with stages() as bars:
        loaded.weights_digest(lambda done, total: bars.show("Hashing the weights", done, total, "bytes"))
