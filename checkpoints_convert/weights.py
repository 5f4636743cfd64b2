"""A Hugging Face checkpoint whose tensors were all checked against its config, ready to be read in our layout."""

import collections
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, Shaped

from checkpoints_convert.config import DEFAULT, ConvertConfig
from checkpoints_convert.gguf import GGUFSource
from checkpoints_convert.keys import EMBEDDING, LM_HEAD, Part, Target, is_derived, is_quantised, keys, renaming, targets
from checkpoints_convert.quantized import QuantizedFolder
from checkpoints_convert.rounding import RoundingError, rounded
from checkpoints_convert.source import FolderSource, Source, describe, show_shape
from lychee_jax.config import DTYPES, ModelConfig
from lychee_jax.errors import UserError
from lychee_jax.files import read_json_object
from lychee_jax.models.quantization import STORED
from lychee_jax.quantization_config import stored_quantization

NUMPY_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}

_log = logging.getLogger(__name__)

NOT_FINITE = "not finite (NaN or infinity)"
"""A kind of problem: a tensor that was converted faithfully, and is worth nothing."""


class Weights:
    """Every parameter that the config asks for, once and in its right shape, of a Hugging Face folder or a GGUF file.

    Attributes:
        config: the checkpoint's config; `tie_word_embeddings` is what its tensors say, and `dtype` theirs where the
            config names none.
        keys: dotted path → where and how the parameter is stored.

    Raises:
        UserError: no checkpoint, an unsupported config, or the list of everything wrong with the tensors.
    """

    def __init__(self, path: str | Path, convert_config: ConvertConfig = DEFAULT):
        path = Path(path)
        self.source: Source
        if path.is_file():
            self.source = file = GGUFSource(path, convert_config)
            self.raw_config: dict[str, Any] = file.raw_config
            config = file.config
        else:
            config = ModelConfig.from_folder(path)
            self.raw_config = read_json_object(path / "config.json")
            stored = stored_quantization(self.raw_config)
            self.source = (
                FolderSource(path, convert_config)
                if stored is None
                else QuantizedFolder(path, stored.block, convert_config)
            )
            if config.quantize is not None:
                raise UserError(f"{path}: what its config.json says of quantization is said of converted folders alone")
        if config.tie_word_embeddings and self._has_own_head():
            config = dataclasses.replace(config, tie_word_embeddings=False)
        there = self.source.tensors.keys() | self.source.lost
        rename = renaming(there, tied=config.tie_word_embeddings)
        self.keys = {key.path: key.renamed(rename) for key in keys(config)}
        self._check(tied=config.tie_word_embeddings)
        if all(self.raw_config.get(key) is None for key in ("dtype", "torch_dtype")):
            config = dataclasses.replace(config, dtype=str(self.source.dtype(rename(EMBEDDING))))
        self.config = config

    @property
    def tensors(self) -> int:
        """How many tensors of the checkpoint are wanted; several may be one parameter."""
        return sum(len(key.parts) for key in self.keys.values())

    def read(self, path: str, dtype: str) -> Float[np.ndarray, "..."]:
        """One parameter in our layout; what takes memory is the result alone.

        Raises:
            UserError: a number that float16 cannot hold, or a file that cannot be read any more.
        """
        key = self.keys[path]
        array = np.empty(key.shape, NUMPY_DTYPES[dtype])
        for part in key.parts:
            for target, block in self._blocks(part, array):
                target[...] = cast(block, dtype, part.name)
        return array

    def targets(self, config: ModelConfig) -> tuple[Target, ...]:
        """Everything that a model of `config` stores of these weights."""
        return targets(self.keys.values(), config)

    def load(self, target: Target, error: RoundingError) -> dict[str, Shaped[np.ndarray, "..."]]:
        """Path → array of what a model stores of one parameter; what takes memory is the result alone.

        Args:
            target: one of `targets`.
            error: where to count the error of what is rounded a second time.

        Raises:
            UserError: a number that the dtype or the 8 bits cannot hold, or a file that cannot be read any more.
        """
        if target.quantize is None:
            return {target.path: self.read(target.key.path, target.dtype)}
        kernel = np.empty(target.key.shape, STORED[target.quantize])
        scale = np.empty(target.key.shape[0], np.float32)
        for part in target.key.parts:
            for first, rows, channels in rounded(self.source, part.name, target.quantize, error):
                kernel[part.rows][first : first + len(rows)] = rows
                scale[part.rows][first : first + len(rows)] = channels
        return {target.path: kernel, target.scale: scale}

    def load_all(self, config: ModelConfig) -> Iterator[tuple[str, Shaped[np.ndarray, "..."]]]:
        """Path and array of everything that a model of `config` stores, a parameter at a time; see `load`."""
        error = RoundingError()
        for target in self.targets(config):
            yield from self.load(target, error).items()
        self.tell(error)

    def tell(self, error: RoundingError) -> None:
        """Log how far numbers moved that were rounded a second time, if there are any."""
        if error.channels:
            _log.warning("%s", f"{self.source.path} is quantised already, and was rounded again: {error}")

    def compare(self, path: str, array: Float[np.ndarray, "..."]) -> dict[str, list[str]]:
        """What is wrong with a parameter as it was written: kind of problem → names of the checkpoint's tensors.

        Raises:
            UserError: a file that cannot be read any more.
        """
        problems: dict[str, list[str]] = {}
        bits = f"u{array.dtype.itemsize}"
        for part in self.keys[path].parts:
            different = not_finite = False
            for stored, block in self._blocks(part, array):
                wanted = cast(block, array.dtype.name, part.name)
                different |= not np.array_equal(stored.view(bits), wanted.view(bits))
                not_finite |= not np.isfinite(wanted).all()
            if different:
                problems.setdefault("different", []).append(part.name)
            if not_finite:
                problems.setdefault(NOT_FINITE, []).append(part.name)
        return problems

    def compare_kernel(
        self, target: Target, kernel: Shaped[np.ndarray, "out in"], scale: Float32[np.ndarray, " out"]
    ) -> dict[str, list[str]]:
        """What is wrong with a kernel of 8 bits as it was written, beside the rounding that is expected: see `compare`.

        Raises:
            UserError: as `load`.
        """
        assert target.quantize is not None
        problems: dict[str, list[str]] = {}
        for part in target.key.parts:
            wrong = 0
            for first, rows, channels in rounded(self.source, part.name, target.quantize, RoundingError()):
                block = slice(part.rows.start + first, part.rows.start + first + len(rows))
                same = (kernel[block].view(np.uint8) == rows.view(np.uint8)).all(axis=1)
                wrong += int((~same | (scale[block].view(np.uint32) != channels.view(np.uint32))).sum())
            if wrong:
                problems.setdefault("different", []).append(f"{part.name} ({wrong} of {part.shape[0]} channels)")
        return problems

    def _blocks(
        self, part: Part, array: Shaped[np.ndarray, "..."]
    ) -> Iterator[tuple[Shaped[np.ndarray, "..."], Shaped[np.ndarray, "..."]]]:
        """Rows of a part, in an array of the whole parameter and beside it in the checkpoint, a block at a time."""
        rows = array[part.rows]
        for first, block in self.source.blocks(part.name):
            yield rows[first : first + len(block)], block

    def _has_own_head(self) -> bool:
        """Whether a checkpoint that calls itself tied holds an output head that differs from its embedding."""
        if not {LM_HEAD, EMBEDDING} <= self.source.tensors.keys():
            return False
        return not self.source.equal(LM_HEAD, EMBEDDING)

    def _check(self, *, tied: bool) -> None:
        """Raise UserError with everything that is missing, extra, misshapen or unreadable."""
        tensors, lost, unlisted = self.source.tensors, self.source.lost, self.source.unlisted
        wanted = {part.name: part for key in self.keys.values() for part in key.parts}
        known = wanted.keys() | ({LM_HEAD} if tied else set())
        if quantised := sorted(name for name in tensors if is_quantised(name)):
            raise UserError(
                f"{self.source.path}: quantised checkpoints ({quantised[0]} is one of {len(quantised)} such "
                "tensors) are not supported; use the unquantised one"
            )
        accounted_for = tensors.keys() | lost | unlisted.keys()
        found: dict[str, list[str]] = {
            "missing": [name for name in wanted if name not in accounted_for],
            "not in the index": [f"{name} (in {unlisted[name]})" for name in wanted if name in unlisted],
            "extra": [name for name in tensors if name not in known and not is_derived(name)],
            "misshapen": [
                f"{name} ({show_shape(tensors[name].shape)} instead of {show_shape(part.shape)})"
                for name, part in wanted.items()
                if name in tensors and tensors[name].shape != part.shape
            ],
            "unsupported dtype": [
                f"{name} ({tensors[name].dtype})"
                for name in wanted
                if name in tensors and self.source.dtype(name) is None
            ],
        }
        problems = collections.defaultdict(list, self.source.problems)
        for kind, names in found.items():
            if names:
                problems[kind] = [*problems[kind], *names]
        if problems:
            raise UserError(f"{self.source.path}: {describe(problems)}")
        if strange := [name for name in unlisted if not is_derived(name)]:
            _log.warning("%s", f"{self.source.path}: {describe({'not in the index, so not used': strange})}")


def check_dtype(dtype: str | None) -> None:
    """Raise UserError for a dtype that weights cannot have; None stands for the checkpoint's."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not supported; use one of {', '.join(DTYPES)}")


def cast(array: Float[np.ndarray, "..."], dtype: str, name: str) -> Float[np.ndarray, "..."]:
    """`array` in another dtype, rounded to nearest.

    Raises:
        UserError: a number of the tensor `name` that float16 cannot hold.
    """
    with np.errstate(over="ignore"):
        result = array.astype(NUMPY_DTYPES[dtype], copy=False)
    if dtype == "float16" and array.dtype != np.float16 and (np.isinf(result) & np.isfinite(array)).any():
        raise UserError(f"{name} has numbers that float16 cannot hold (65504 is its largest); use bfloat16 or float32")
    return result
