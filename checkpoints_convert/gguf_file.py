"""What a GGUF file, whole or split, says in its headers: metadata, and where every tensor lies."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType
from jaxtyping import Float

from checkpoints_convert.source import Stored, first_line
from lychee_jax.errors import UserError

_MAGIC = b"GGUF"
_PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_FLOATS = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The key-value pairs of a file, checked as they are asked for.

    Attributes:
        path: the file, for messages.
        values: key → number, text, flag or list.
    """

    path: Path
    values: Mapping[str, Any]

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number.

        Raises:
            UserError: it is missing, with no default, or something else.
        """
        return self._get(key, (int,), "a whole number", default)

    def number(self, key: str, default: float | None = None) -> float:
        """A number; of a float32 the shortest decimal that means it, which is the one that was written."""
        value = self._get(key, (int, float), "a number", default)
        return float(str(np.float32(value)))

    def text(self, key: str, default: str | None = None) -> str:
        """A text."""
        return self._get(key, (str,), "a text", default)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        return self._get(key, (bool,), "true or false", default)

    def array(self, key: str) -> list[Any]:
        """A list."""
        return self._get(key, (list,), "a list", None)

    def token(self, key: str) -> int | None:
        """The id of a token; None where the file names none."""
        return (
            self.integer(f"tokenizer.ggml.{key}_token_id") if f"tokenizer.ggml.{key}_token_id" in self.values else None
        )

    def _get(self, key: str, kinds: tuple[type, ...], meant: str, default: Any) -> Any:
        value = self.values.get(key, default)
        if value is None:
            raise UserError(f"{self.path} has no {key}, which a model's file must have")
        if type(value) not in kinds:
            raise UserError(f"{self.path}: {key} must be {meant}, not {str(value)[:40]}")
        return value


@dataclasses.dataclass(frozen=True)
class GGUFTensor(Stored):
    """One tensor as the header of its file describes it; `dtype` is the name of its `type`."""

    type: GGMLQuantizationType

    @property
    def loaded_dtype(self) -> np.dtype | None:
        """What its numbers are once they are read: quantised ones become float32; None: gguf cannot dequantise it."""
        return _FLOATS.get(self.type) or (np.dtype(np.float32) if self.quantised else None)

    @property
    def quantised(self) -> bool:
        """Whether it is a matrix in blocks of numbers that share a scale, which the gguf package can undo."""
        if self.type in _FLOATS or len(self.shape) < 2:
            return False
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[self.type][1]), np.uint8), self.type)
        except NotImplementedError:
            return False
        return True

    def rows(self, first: int, last: int) -> Float[np.ndarray, "rows ..."]:
        """Some rows, dequantised.

        Raises:
            UserError: the file has changed or cannot be read any more.
        """
        numbers, size = gguf.GGML_QUANT_SIZES[self.type]
        row = int(np.prod(self.shape[1:], dtype=np.int64)) * size // numbers
        data = self.read(first * row, (last - first) * row)
        if self.type in _FLOATS:
            values = data.view(_FLOATS[self.type])
        else:
            values = gguf.dequantize(data.reshape(-1, self.shape[-1] // numbers * size), self.type)
        return values.reshape(last - first, *self.shape[1:])


class GGUFFile:
    """The headers of a GGUF file; of a split one any part may be named, and all parts are read.

    Attributes:
        path: the file that was named.
        metadata: the first part's.
        tensors: GGUF's name → where it lies.

    Raises:
        UserError: no GGUF, a damaged file, or parts that are missing or do not belong together.
    """

    def __init__(self, path: Path):
        self.path = path
        self.tensors: dict[str, GGUFTensor] = {}
        parts = [_read(part) for part in _parts(path)]
        self.metadata = parts[0][0]
        count = self.metadata.values.get("split.count", 1)
        if count != len(parts):
            raise UserError(
                f"{path} is one of {count} parts; in one folder they must be NAME-00001-of-{count:05}.gguf and so on"
            )
        for _, tensors in parts:
            if twice := self.tensors.keys() & tensors.keys():
                raise UserError(f"{path}: {min(twice)} is in two parts")
            self.tensors |= tensors
        promised = self.metadata.values.get("split.tensors.count", len(self.tensors))
        if promised != len(self.tensors):
            raise UserError(f"{path}: the parts should hold {promised} tensors, and hold {len(self.tensors)}")


def _parts(path: Path) -> list[Path]:
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    parts = [path.with_name(f"{match['name']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise UserError(
            f"{path}: missing file: {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "")
        )
    return parts


def _read(path: Path) -> tuple[Metadata, dict[str, GGUFTensor]]:
    try:
        reader = gguf.GGUFReader(path)
        values = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        unknown = re.search(r"(\d+)\)? is not a valid GGMLQuantizationType", str(error))
        if unknown:
            raise UserError(
                f"{path} holds tensors of a type that the gguf package does not know ({unknown[1]})"
            ) from error
        raise UserError(f"{path} is no whole GGUF file: {first_line(error)}") from error
    if reader.byte_order != "I":
        raise UserError(f"{path} is a GGUF file for machines of the other byte order; take the usual one")
    tensors = {
        tensor.name: GGUFTensor(
            path,
            tuple(reversed(tensor.shape.tolist())),
            tensor.tensor_type.name,
            tensor.data_offset,
            tensor.tensor_type,
        )
        for tensor in reader.tensors
    }
    return Metadata(path, values), tensors
