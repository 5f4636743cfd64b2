"""What tells weights apart: a digest of the numbers themselves, wherever they were read from."""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from lychee_jax.files import digest_of, json_text
from lychee_jax.models.spec import ModelSpec
from lychee_jax.parallel.layouts import Axes

_WORKERS = 8  # each holds one tensor of an accelerator in the host's memory


def weights_digest(
    spec: ModelSpec,
    weights: Sequence[Shaped[jax.Array, ...]],
    on_progress: Callable[[int, int], None] | None = None,
) -> str:
    """One digest of all tensors: names, dtypes, shapes and every byte.

    Files would say less: a folder may be overwritten after it was read, and one model lies in files of several formats.
    On how many devices the weights lie does not matter.
    SHA-256 keeps up with the copy from the device; tensors are hashed side by side.

    Args:
        spec: what names the tensors.
        weights: the tensors, in its order.
        on_progress: called with the bytes that are hashed, and all of them.
    """
    total, done = sum(array.nbytes for array in weights), 0
    tensors: list[list[Any]] = []
    with concurrent.futures.ThreadPoolExecutor(min(_WORKERS, os.cpu_count() or 1)) as pool:
        found = pool.map(functools.partial(_describe, spec), spec.axes, weights)
        for name, array, told in zip(spec.names, weights, found, strict=True):
            tensors.append([name, *told])
            done += array.nbytes
            if on_progress is not None:
                on_progress(done, total)
    return digest_of(json_text(tensors))


def _describe(spec: ModelSpec, axes: Axes, array: Shaped[jax.Array, ...]) -> tuple[str, list[int], str]:
    """Dtype, shape and hash."""
    # JAX keeps what it copied to the host beside an array, so it must be another array that is asked and forgotten.
    asked = array.addressable_data(0) if array.is_fully_replicated else array.copy()
    whole = np.asarray(asked) if spec.layout is None else spec.layout.restore(axes, asked, spec.config)
    told = str(array.dtype), list(whole.shape)
    return *told, hashlib.sha256(np.ascontiguousarray(whole).view(np.uint8)).hexdigest()
