"""What tells weights apart: a digest of the numbers themselves, wherever they were read from."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Shaped

from lychee_jax.files import digest_of, json_text

_WORKERS = 8  # each holds one tensor of an accelerator in the host's memory


def weights_digest(
    names: Sequence[str],
    weights: Sequence[Shaped[jax.Array, ...]],
    on_progress: Callable[[int, int], None] | None = None,
) -> str:
    """One digest of all tensors: names, dtypes, shapes and every byte.

    Files would say less: a folder may be overwritten after it was read, and one model lies in files of several formats.
    SHA-256 keeps up with the copy from the device; tensors are hashed side by side.

    Args:
        names: of the tensors.
        weights: the tensors, in the same order.
        on_progress: called with the bytes that are hashed, and all of them.
    """
    total, done = sum(array.nbytes for array in weights), 0
    hashes: list[str] = []
    with concurrent.futures.ThreadPoolExecutor(min(_WORKERS, os.cpu_count() or 1)) as pool:
        for array, found in zip(weights, pool.map(_hash, weights), strict=True):
            hashes.append(found)
            done += array.nbytes
            if on_progress is not None:
                on_progress(done, total)
    tensors = [
        [name, str(array.dtype), list(array.shape), found]
        for name, array, found in zip(names, weights, hashes, strict=True)
    ]
    return digest_of(json_text(tensors))


def _hash(array: Shaped[jax.Array, ...]) -> str:
    # JAX keeps what it copied to the host beside an array, so it must be another array that is asked and forgotten.
    asked = array.addressable_data(0) if array.is_fully_replicated else array.copy()
    return hashlib.sha256(np.ascontiguousarray(np.asarray(asked)).view(np.uint8)).hexdigest()
