"""Reads a converted checkpoint again and compares it with where it came from."""

import collections
from pathlib import Path

from checkpoints_convert import store
from checkpoints_convert.progress import Progress
from checkpoints_convert.source import describe, first_line
from checkpoints_convert.weights import NOT_FINITE, Weights
from lychee_jax.errors import UserError


def verify(weights: Weights, folder: Path, dtype: str, progress: Progress | None = None) -> None:
    """Compare every tensor under `folder / "weights"`, one at a time, to the bit, with its source cast to `dtype`.

    Raises:
        UserError: the list of tensors that are missing, cannot be read or differ, and of the source's that are not
            finite.
    """
    written = store.shapes(folder / store.WEIGHTS)
    problems: dict[str, list[str]] = collections.defaultdict(list)
    done = 0
    for path, key in weights.keys.items():
        if progress is not None:
            progress("verify", done, weights.tensors)
        done += len(key.parts)
        if written.get(path) != (key.shape, dtype):
            problems["missing or misshapen"].append(path)
            continue
        try:
            array = store.read(folder / store.WEIGHTS, [path])[path]
        except (OSError, ValueError) as error:
            problems["unreadable"].append(f"{path} ({first_line(error)})")
            continue
        for kind, names in weights.compare(path, array).items():
            problems[kind] += names
    if progress is not None:
        progress("verify", done, weights.tensors)
    not_finite = problems.pop(NOT_FINITE, [])
    if problems:
        raise UserError(f"what was written differs from the checkpoint: {describe(problems)}")
    if not_finite:
        raise UserError(f"{weights.source.path}: {describe({NOT_FINITE: not_finite})}")
