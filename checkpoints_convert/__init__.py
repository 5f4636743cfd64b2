"""Hugging Face checkpoints and GGUF files in, Orbax checkpoints out."""

import logging

from checkpoints_convert.convert import ConversionReport, convert

__all__ = ["ConversionReport", "convert"]

logging.getLogger(__name__).addHandler(logging.NullHandler())
