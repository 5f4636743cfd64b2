"""Reads a converted checkpoint again and compares it with where it came from."""

import collections
from pathlib import Path

from checkpoints_convert import store
from checkpoints_convert.progress import Progress
from checkpoints_convert.source import describe, first_line
from checkpoints_convert.weights import NOT_FINITE, Weights
from lychee_jax.config import ModelConfig
from lychee_jax.errors import UserError


def verify(weights: Weights, folder: Path, config: ModelConfig, progress: Progress | None = None) -> None:
    """Compare everything under `folder / "weights"`, a parameter at a time, to the bit, with what was to be written.

    That is the source cast to the dtype of `config`, or rounded to its 8 bits, channel by channel.

    Raises:
        UserError: the list of tensors that are missing, cannot be read or differ, and of the source's that are not
            finite.
    """
    written = store.shapes(folder / store.WEIGHTS)
    problems: dict[str, list[str]] = collections.defaultdict(list)
    done, targets = 0, weights.targets(config)
    total = sum(len(target.key.parts) for target in targets)
    for target in targets:
        if progress is not None:
            progress("verify", done, total)
        done += len(target.key.parts)
        if wrong := [path for path, kind in target.tensors.items() if written.get(path) != kind]:
            problems["missing or misshapen"] += wrong
            continue
        try:
            arrays = store.read(folder / store.WEIGHTS, target.tensors)
        except (OSError, ValueError) as error:
            problems["unreadable"].append(f"{target.path} ({first_line(error)})")
            continue
        found = (
            weights.compare(target.key.path, arrays[target.path])
            if target.quantize is None
            else weights.compare_kernel(target, arrays[target.path], arrays[target.scale])
        )
        for kind, names in found.items():
            problems[kind] += names
    if progress is not None:
        progress("verify", done, total)
    not_finite = problems.pop(NOT_FINITE, [])
    if problems:
        raise UserError(f"what was written differs from the checkpoint: {describe(problems)}")
    if not_finite:
        raise UserError(f"{weights.source.path}: {describe({NOT_FINITE: not_finite})}")
