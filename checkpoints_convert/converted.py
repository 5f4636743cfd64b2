"""Converted folders as they are read: of today's format, and of the first one, which shared no kernels."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Container, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float

from checkpoints_convert import store
from checkpoints_convert.keys import Key, Part, keys
from checkpoints_convert.source import MARKER, describe, first_line
from checkpoints_convert.weights import NUMPY_DTYPES, cast
from lychee_jax.config import ModelConfig
from lychee_jax.errors import UserError
from lychee_jax.files import check_tensor_path, read_json_object

FORMAT = "lychee-checkpoint/2"
_FIRST_FORMAT = "lychee-checkpoint/1"


class Converted:
    """The weights of a converted folder; opening it reads metadata only.

    Attributes:
        config: the folder's.

    Raises:
        UserError: another format, no Orbax checkpoint, or every tensor that is missing, extra or misshapen.
    """

    def __init__(self, folder: Path):
        check_tensor_path(folder)
        found = read_json_object(folder / MARKER).get("format")
        if found not in (FORMAT, _FIRST_FORMAT):
            raise UserError(f"{folder / MARKER} has format {found!r}; this version reads {_FIRST_FORMAT} and {FORMAT}")
        self.config = ModelConfig.from_folder(folder)
        self._weights = folder / store.WEIGHTS
        stored = _stored if found == FORMAT else _stored_at_first
        self._keys = {key: stored(key, self.config) for key in keys(self.config)}
        self._check(folder)

    def read(self, dtype: str, wide: Container[str] = ()) -> Iterator[tuple[str, Float[np.ndarray, ...]]]:
        """Path and array of every parameter; a layer at a time, because each call of Orbax takes a while.

        Args:
            dtype: of the arrays.
            wide: paths that come in float32.

        Raises:
            UserError: a damaged file, or a number that float16 cannot hold.
        """
        groups = collections.defaultdict(list)
        for key in self._keys:
            parts = key.path.split(".")
            groups[tuple(parts[: 2 if parts[0] == "layers" else 1])].append(key)
        for group in groups.values():
            try:
                arrays = store.read(self._weights, [part.path for key in group for part in self._keys[key]])
            except (OSError, ValueError) as error:
                raise UserError(f"{self._weights} is damaged: {first_line(error)}") from error
            for key in group:
                yield key.path, self._put_together(key, arrays, "float32" if key.path in wide else dtype)

    def _put_together(self, key: Key, arrays: dict[str, Float[np.ndarray, ...]], dtype: str) -> Float[np.ndarray, ...]:
        """One parameter from its parts, which are taken out of `arrays`."""
        first, *others = self._keys[key]
        if not others and not first.input_major:
            return cast(arrays.pop(first.path), dtype, first.path)
        result = np.empty(key.shape, NUMPY_DTYPES[dtype])
        for part in (first, *others):
            result[part.rows] = cast(part.rows_of(arrays.pop(part.path)), dtype, part.path)
        return result

    def _check(self, folder: Path) -> None:
        wanted = {part.path: part.shape for parts in self._keys.values() for part in parts}
        try:
            found = store.shapes(self._weights)
        except (OSError, ValueError) as error:
            raise UserError(f"{self._weights} is no whole Orbax checkpoint: {first_line(error)}") from error
        problems = {
            "missing": [path for path in wanted if path not in found],
            "extra": [path for path in found if path not in wanted],
            "misshapen": [path for path in wanted if path in found and found[path][0] != wanted[path]],
        }
        if any(problems.values()):
            raise UserError(f"{folder}: {describe({kind: paths for kind, paths in problems.items() if paths})}")


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A tensor of the folder that holds rows of a parameter."""

    path: str
    shape: tuple[int, ...]
    rows: slice
    input_major: bool = False

    def rows_of(self, array: Float[np.ndarray, ...]) -> Float[np.ndarray, ...]:
        """The tensor as the rows that it holds."""
        count = self.rows.stop - self.rows.start
        return array.reshape(-1, count).T if self.input_major else array.reshape(count)


def _stored(key: Key, config: ModelConfig) -> tuple[_Stored, ...]:
    return (_Stored(key.path, key.shape, slice(0, key.shape[0])),)


def _stored_at_first(key: Key, config: ModelConfig) -> tuple[_Stored, ...]:
    """The first format: a kernel for each of Hugging Face's, `[*in, *out]`, with heads and head_dim as two axes."""
    *modules, _, leaf = key.path.split(".")
    if leaf not in ("kernel", "bias"):
        return _stored(key, config)

    def stored(part: Part) -> _Stored:
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads, "v_proj": config.num_kv_heads}
        out: tuple[int, ...] = part.shape[:1]
        into: tuple[int, ...] = part.shape[1:]
        if part.module in heads:
            out = (heads[part.module], config.head_dim)
        if part.module == "o_proj" and leaf == "kernel":
            into = (config.num_heads, config.head_dim)
        return _Stored(".".join([*modules, part.module, leaf]), (*into, *out), part.rows, input_major=leaf == "kernel")

    return tuple(map(stored, key.parts))
