"""Hugging Face checkpoints and GGUF files in, Orbax checkpoints out."""

from checkpoints_convert.convert import ConversionReport, convert

__all__ = ["ConversionReport", "convert"]
