"""What the commands of the studies share: options that are lists of numbers, and how a command ends."""

from __future__ import annotations

from collections.abc import Callable

import typer

from lychee_jax.errors import UserError
from lychee_jax.process import prepare_process


def numbers(option: str, text: str) -> list[int]:
    """Whole numbers with commas between them.

    Raises:
        UserError: anything else.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text}: give whole numbers with commas between them") from None


def pair(option: str, text: str) -> tuple[int, int]:
    """Two whole numbers.

    Raises:
        UserError: anything else.
    """
    found = numbers(option, text)
    if len(found) != 2:
        raise UserError(f"{option} {text}: give two numbers")
    return found[0], found[1]


def main(run: Callable[..., None]) -> int:
    """Run a study's command; returns the exit status: 0, 2 after bad input, 130 after Ctrl-C."""
    prepare_process()
    app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    app.command()(run)
    try:
        app(standalone_mode=False)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted: the same command resumes", err=True)
        return 130
    return 0
