"""The command line: it parses and prints, and decides nothing. Commands import JAX themselves, so --help is quick."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer.main import get_command

from lychee_jax.cli import options as shared
from lychee_jax.cli.bench import app as bench_app
from lychee_jax.cli.console import load_model
from lychee_jax.cli.evaluate import eval_app
from lychee_jax.cli.generate import generate
from lychee_jax.cli.harness import eval_harness
from lychee_jax.cli.heads import heads_app
from lychee_jax.cli.plan import plan
from lychee_jax.cli.serve import serve
from lychee_jax.cli.train import train_heads
from lychee_jax.errors import UserError
from lychee_jax.notices import notices_on_stderr
from lychee_jax.process import prepare_process

app = typer.Typer(
    name="lychee",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Long-context text generation for Llama and Qwen checkpoints, with attention heads that have roles.

    Start with [cyan]lychee demo[/cyan], or with a checkpoint of your own:

    [cyan]lychee convert Qwen/Qwen3-8B my-8b[/cyan]

    [cyan]lychee generate --model my-8b --chat -p "Who wrote Faust?"[/cyan]""",
)
app.add_typer(heads_app, name="heads")
app.add_typer(bench_app, name="bench")
eval_app.command("harness")(eval_harness)
app.add_typer(eval_app, name="eval")
app.command()(generate)
app.command()(serve)
app.command()(plan)
app.command()(train_heads)


def _show_version(wanted: bool) -> bool:
    if wanted:
        from importlib.metadata import version

        print(f"lychee-jax {version('lychee-jax')}")
        raise typer.Exit
    return wanted


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of the program itself."""


@app.command()
def convert(
    src: Annotated[
        str, typer.Argument(metavar="SRC", help="A Hugging Face folder, a GGUF file, or a model's id on the Hub.")
    ],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The folder to make.")],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(show_default="the checkpoint's, bfloat16 if it is quantised", help="Of the converted weights."),
    ] = None,
    quantize: Annotated[
        Literal["none", "int8", "fp8"],
        typer.Option(
            help="Kernels of 8 bits, a scale for each output channel; norms, biases and embedding stay as they are."
        ),
    ] = "none",
    quantize_head: Annotated[bool, typer.Option("--quantize-head", help="The output head, too.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read everything again and compare every tensor, to the bit.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DST if it exists, once the new folder is whole.")
    ] = False,
) -> None:
    """Convert a Hugging Face checkpoint or a GGUF file (llama, qwen2, qwen3), tokenizer included.

    One tensor is in memory at a time. DST appears whole or not at all.

    [b]Example[/b]

    [cyan]lychee convert Qwen/Qwen3-8B my-8b --dtype bfloat16 --verify[/cyan]

    [cyan]lychee convert Qwen/Qwen3-8B my-8b --quantize int8[/cyan]

    [cyan]lychee convert Qwen3-8B-Q4_K_M.gguf my-8b[/cyan]
    """
    from checkpoints_convert.convert import convert as run
    from lychee_jax.cli.console import progress_bar

    with progress_bar() as progress:
        report = run(
            src, dst, dtype=dtype, quantize=None if quantize == "none" else quantize, quantize_head=quantize_head,
            verify=verify, overwrite=overwrite, progress=progress,
        )  # fmt: skip
    print(report)


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where the picture of the head roles goes.")
    ] = Path("demo-output"),
    model: shared.ModelOption = None,
    seed: Annotated[int, typer.Option(help="Of the document and its hidden facts.")] = 0,
) -> None:
    """Ask the same questions about a long document, dense and hybrid, side by side."""
    from lychee_jax.cli import demo as demonstration

    print(demonstration.run(load_model(model, None), output, seed=seed))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 after bad input, 130 after Ctrl-C."""
    prepare_process()
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        with notices_on_stderr():
            status = get_command(app).main(arguments, "lychee", standalone_mode=False)
        sys.stdout.flush()
    except (UserError, NotImplementedError) as error:  # the latter: a named implementation that does not cover this
        return _fail(str(error))
    except typer.TyperException as error:  # unknown options and commands, values of the wrong type
        context = getattr(error, "ctx", None)
        hint = f"; see {context.command_path} --help" if context is not None else ""
        return _fail(error.format_message().replace("Value error, ", "").rstrip(".") + hint)
    except BrokenPipeError:  # the reader of a pipe has gone; the interpreter's last flush must not complain either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            return _fail(f"not enough memory: {error}")
        raise
    except SystemExit as error:  # the way in which typer and rich leave a broken pipe
        return error.code if isinstance(error.code, int) else 1
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    if status == 130:
        print("interrupted", file=sys.stderr)
    return status if isinstance(status, int) else 0


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2
