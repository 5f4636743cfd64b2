"""Reads a converted checkpoint again and compares it with where it came from."""

from pathlib import Path

from checkpoints_convert import store
from checkpoints_convert.progress import Progress
from checkpoints_convert.source import describe, first_line
from checkpoints_convert.weights import Weights
from lychee_jax.errors import UserError


def verify(weights: Weights, folder: Path, dtype: str, progress: Progress | None = None) -> None:
    """Compare every tensor under `folder / "weights"`, one at a time, to the bit, with its source cast to `dtype`.

    Raises:
        UserError: the list of tensors that are missing, cannot be read, or differ.
    """
    written = store.shapes(folder / store.WEIGHTS)
    problems: dict[str, list[str]] = {}
    for done, (path, key) in enumerate(weights.keys.items()):
        if progress is not None:
            progress("verify", done, len(weights.keys))
        if written.get(path) != (key.shape, dtype):
            problems.setdefault("missing or misshapen", []).append(path)
            continue
        try:
            array = store.read(folder / store.WEIGHTS, [path])[path]
        except (OSError, ValueError) as error:
            problems.setdefault("unreadable", []).append(f"{path} ({first_line(error)})")
            continue
        if not weights.equal(path, array):
            problems.setdefault("different", []).append(path)
    if progress is not None:
        progress("verify", len(weights.keys), len(weights.keys))
    if problems:
        raise UserError(f"what was written differs from the checkpoint: {describe(problems)}")
