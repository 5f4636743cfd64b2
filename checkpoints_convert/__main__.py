"""`python -m checkpoints_convert SRC DST …` converts as `lychee convert` does, without the rest of the program."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, get_args

from checkpoints_convert.convert import convert
from lychee_jax.config import DTYPES, Quantization
from lychee_jax.errors import UserError
from lychee_jax.notices import notices_on_stderr
from lychee_jax.tpu_environment import has_tpu, without_tpu


class _Parser(argparse.ArgumentParser):
    """Tells errors in one line, as everything here does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see python -m checkpoints_convert --help\n")


def parser() -> argparse.ArgumentParser:
    """The arguments, which are those of `lychee convert`."""
    made = _Parser(
        prog="python -m checkpoints_convert",
        description="Convert a Hugging Face checkpoint or a GGUF file, tokenizer included. DST appears whole or not.",
        allow_abbrev=False,
    )
    made.add_argument("src", metavar="SRC", help="a Hugging Face folder, a GGUF file, or a model's id on the Hub")
    made.add_argument("dst", metavar="DST", type=Path, help="the folder to make")
    made.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the converted weights (default: the checkpoint's, bfloat16 if it is quantised)",
    )
    made.add_argument(
        "--quantize",
        choices=("none", *get_args(Quantization)),
        default="none",
        help="kernels of 8 bits, with a scale for each output channel; norms, biases and embedding stay as they are",
    )
    made.add_argument("--quantize-head", action="store_true", help="the output head, too")
    made.add_argument("--verify", action="store_true", help="read everything again and compare every tensor")
    made.add_argument("--overwrite", action="store_true", help="replace DST if it exists, once the new folder is whole")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 2 after bad input, 130 after Ctrl-C."""
    arguments = parser().parse_args(argv)
    if not has_tpu():  # libtpu may be there to compile with; it would complain on standard error
        without_tpu()
    progress = _show if sys.stderr.isatty() else None
    try:
        with notices_on_stderr():
            quantize = None if arguments.quantize == "none" else arguments.quantize
            report = convert(**{**vars(arguments), "quantize": quantize}, progress=progress)
        print(report)
    except UserError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except MemoryError as error:
        return _fail(f"not enough memory: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _show(stage: str, done: int, total: int) -> None:
    """One line on the terminal, written over and removed at the end of a stage."""
    print(f"\r\x1b[K{stage} {done}/{total}" if done < total else "\r\x1b[K", end="", file=sys.stderr, flush=True)


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
