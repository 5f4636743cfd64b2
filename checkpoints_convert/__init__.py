"""Hugging Face checkpoints in, Orbax checkpoints out."""
