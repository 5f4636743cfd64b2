"""Hugging Face checkpoints in, Orbax checkpoints out."""

from checkpoints_convert.convert import ConversionReport, convert
from lychee_jax.cli.console import progress_bar

__all__ = ["ConversionReport", "convert", "progress_bar"]
