"""Converted folders as they are read: of today's format, and of the first one, which shared no kernels."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float, Shaped

from checkpoints_convert import store
from checkpoints_convert.keys import Key, Part, Target, keys, targets
from checkpoints_convert.source import MARKER, describe, first_line
from checkpoints_convert.weights import NUMPY_DTYPES, cast
from lychee_jax.config import ModelConfig
from lychee_jax.errors import UserError
from lychee_jax.files import check_tensor_path, read_json_object
from lychee_jax.models.quantization import quantize_kernel

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
        # Path of a kernel that has 8 bits here → the kernel and its scales.
        self._small = {each.path: each for each in targets(self._keys, self.config) if each.quantize is not None}
        self._check(folder)

    def load_all(self, config: ModelConfig) -> Iterator[tuple[str, Shaped[np.ndarray, ...]]]:
        """Path and array of everything that a model of `config` stores, cast, rounded to 8 bits, or as it is here.

        A layer at a time, because each call of Orbax takes a while.

        Raises:
            UserError: a damaged file, or a number that the dtype or the 8 bits cannot hold.
        """
        groups = collections.defaultdict(list)
        for target in targets(self._keys, config):
            parts = target.path.split(".")
            groups[tuple(parts[: 2 if parts[0] == "layers" else 1])].append(target)
        for group in groups.values():
            try:
                arrays = store.read(self._weights, {path for target in group for path in self._holds(target)})
            except (OSError, ValueError) as error:
                raise UserError(f"{self._weights} is damaged: {first_line(error)}") from error
            for target in group:
                yield from self._made(target, arrays).items()

    def _holds(self, target: Target) -> dict[str, tuple[tuple[int, ...], str | None]]:
        """Path → shape and dtype of the tensors here that a target is made of; None: any dtype."""
        small = self._small.get(target.path)
        if small is not None:
            return dict(small.tensors)
        return {part.path: (part.shape, None) for part in self._keys[target.key]}

    def _made(
        self, target: Target, arrays: Mapping[str, Shaped[np.ndarray, ...]]
    ) -> dict[str, Shaped[np.ndarray, ...]]:
        if target.path in self._small:
            return {path: arrays[path] for path in target.tensors}
        if target.quantize is None:
            return {target.path: self._put_together(target.key, arrays, target.dtype)}
        try:
            kernel, scale = quantize_kernel(self._put_together(target.key, arrays, "float32"), target.quantize)
        except UserError as error:
            raise UserError(f"{target.path}: {error}") from error
        return {target.path: kernel, target.scale: scale}

    def _put_together(
        self, key: Key, arrays: Mapping[str, Float[np.ndarray, ...]], dtype: str
    ) -> Float[np.ndarray, ...]:
        """One parameter from its parts."""
        first, *others = self._keys[key]
        if not others and not first.input_major:
            return cast(arrays[first.path], dtype, first.path)
        result = np.empty(key.shape, NUMPY_DTYPES[dtype])
        for part in (first, *others):
            result[part.rows] = cast(part.rows_of(arrays[part.path]), dtype, part.path)
        return result

    def _check(self, folder: Path) -> None:
        wanted = {
            path: kind for target in targets(self._keys, self.config) for path, kind in self._holds(target).items()
        }
        try:
            found = store.shapes(self._weights)
        except (OSError, ValueError) as error:
            raise UserError(f"{self._weights} is no whole Orbax checkpoint: {first_line(error)}") from error
        problems = {
            "missing": [path for path in wanted if path not in found],
            "extra": [path for path in found if path not in wanted],
            "misshapen": [path for path in wanted if path in found and found[path][0] != wanted[path][0]],
            "of another dtype": [
                f"{path} ({found[path][1]} instead of {dtype})"
                for path, (_, dtype) in wanted.items()
                if dtype is not None and path in found and found[path][1] != dtype
            ],
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
