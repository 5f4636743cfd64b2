"""Where a checkpoint comes from: the safetensors file of a Hugging Face folder, or its shards, by the index."""

import abc
import collections
import dataclasses
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import Float32, Shaped, UInt8
from safetensors import SafetensorError, safe_open

from checkpoints_convert.config import DEFAULT, ConvertConfig
from lychee_jax.config import Quantization
from lychee_jax.errors import UserError
from lychee_jax.files import decode_text, parse_json, read_json_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MARKER = "lychee.json"
"""What a converted folder has and a Hugging Face folder has not."""

TEXT_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "heads.json",
)
"""Beside config and weights: what a converted checkpoint keeps, where it is there."""

# safetensors' names.
FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
EIGHT_BITS = {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "I8": np.dtype(np.int8)}
# An error is one line: so many problems of a kind are told by name.
_TOLD = 8
_ADAPTER = "adapter_config.json"

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint, as the header of its file describes it: it begins at the byte `offset`."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int

    def read(self, start: int, size: int) -> UInt8[np.ndarray, " size"]:
        """Bytes of the tensor. Read, not mapped: the touched pages of a mapped file count as the process's own.

        Raises:
            UserError: the file has changed or cannot be read any more.
        """
        try:
            data = np.fromfile(self.file, np.uint8, size, offset=self.offset + start)
        except OSError as error:
            raise UserError(f"cannot read {self.file}: {error.strerror or error}") from error
        if data.size != size:
            raise UserError(f"cannot read {self.file}: it ends too early")
        return data


class Source(abc.ABC):
    """A checkpoint whose tensors have Hugging Face's names.

    Attributes:
        path: what messages call it.
        tensors: name → where it lies, for everything that can be read.
        problems: what is wrong with the files: kind of problem → where.
        lost: names of tensors that are there or were promised, but that a problem keeps from being read.
        unlisted: tensors of the shards that the index does not name → the shard; the index decides, so they are none
            of the checkpoint's.
    """

    path: Path
    tensors: dict[str, Stored]
    problems: dict[str, list[str]]
    lost: set[str]
    unlisted: dict[str, str]

    @abc.abstractmethod
    def dtype(self, name: str) -> np.dtype | None:
        """The dtype of a tensor's numbers as they are read; None for one that is not supported."""

    @abc.abstractmethod
    def blocks(self, name: str) -> Iterator[tuple[int, Shaped[np.ndarray, " rows *rest"]]]:
        """A tensor in pieces of whole rows: the first row's number, and the rows.

        Raises:
            UserError: the file has changed or cannot be read any more.
        """

    @abc.abstractmethod
    def write_text_files(self, folder: Path) -> None:
        """Whatever belongs to the text side, into a converted folder."""

    def is_quantised(self, name: str) -> bool:
        """Whether a tensor's numbers were rounded to few bits, which `blocks` undoes."""
        return False

    def channels(
        self, name: str, quantize: Quantization
    ) -> Iterator[tuple[int, Shaped[np.ndarray, "rows columns"], Float32[np.ndarray, " rows"]]] | None:
        """A tensor that is stored as our kernels are, in pieces of whole rows: the first row's number, rows, scales.

        None: it is stored in another way, and must be rounded.

        Raises:
            UserError: as `blocks`.
        """
        return None

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers."""
        if self.tensors[one].shape != self.tensors[other].shape or None in (self.dtype(one), self.dtype(other)):
            return False
        return all(
            np.array_equal(x.astype(np.float32), y.astype(np.float32))
            for (_, x), (_, y) in zip(self.blocks(one), self.blocks(other), strict=True)
        )


class FolderSource(Source):
    """The tensors of a Hugging Face folder. Opening it reads headers only.

    Raises:
        UserError: there are no safetensors to read at all.
    """

    def __init__(self, folder: Path, config: ConvertConfig = DEFAULT):
        self.path, self._config = folder, config
        self.tensors = {}
        self.problems = collections.defaultdict(list)
        self.lost, self.unlisted = set(), {}
        used = {SINGLE}
        # Where both are there, the single file is the checkpoint, as in transformers.
        if (folder / SINGLE).is_file():
            header = self._header(SINGLE)
            if header is None:
                raise UserError(f"{folder}: {describe(self.problems)}")
            self.tensors = header
        elif (folder / INDEX).is_file():
            weight_map = read_index(folder / INDEX)
            used = set(weight_map.values())
            self._open_shards(weight_map)
        else:
            raise UserError(_nothing_to_read(folder))
        self._tell_what_is_not_used(used)

    def dtype(self, name: str) -> np.dtype | None:
        """The dtype in which a tensor is stored; None for one that is not supported."""
        return FLOATS.get(self.tensors[name].dtype)

    def blocks(self, name: str) -> Iterator[tuple[int, Shaped[np.ndarray, " rows *rest"]]]:
        """A tensor in pieces of whole rows."""
        stored = self.tensors[name]
        numbers, dtype = math.prod(stored.shape[1:]), (FLOATS | EIGHT_BITS)[stored.dtype]
        step = max(1, self._config.block_numbers // numbers)
        for first in range(0, stored.shape[0], step):
            rows = min(step, stored.shape[0] - first)
            data = stored.read(first * numbers * dtype.itemsize, rows * numbers * dtype.itemsize)
            yield first, data.view(dtype).reshape(rows, *stored.shape[1:])

    def write_text_files(self, folder: Path) -> None:
        """Copy whatever belongs to the text side."""
        for name in TEXT_FILES:
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, folder / name)

    def _open_shards(self, weight_map: dict[str, str]) -> None:
        elsewhere: dict[str, str] = {}
        for shard in sorted(set(weight_map.values())):
            header = self._header(shard)
            if header is None:
                self.lost |= {name for name, file in weight_map.items() if file == shard}
                continue
            for name, stored in header.items():
                if name not in weight_map:
                    self.unlisted[name] = shard
                elif weight_map[name] == shard:
                    self.tensors[name] = stored
                else:  # a second copy is no matter: the index says which one counts
                    elsewhere[name] = shard
        for name, shard in elsewhere.items():
            if name not in self.tensors and name not in self.lost:
                self.problems["misplaced"].append(f"{name} (in {shard}, but the index says {weight_map[name]})")
                self.lost.add(name)

    def _tell_what_is_not_used(self, used: set[str]) -> None:
        """Log the weights in the folder that are none of the checkpoint's: an adapter, say, is not applied."""
        patterns = ("*.safetensors", "adapter_model.bin")
        names = sorted(file.name for pattern in patterns for file in self.path.glob(pattern))
        if unused := [name for name in names if name not in used]:
            _log.warning("%s", f"{self.path}: {describe({'not used': unused})}")

    def _header(self, name: str) -> dict[str, Stored] | None:
        """What a file holds; None, and a problem noted, if that cannot be read."""
        path = self.path / name
        if not path.is_file():
            self.problems["missing file"].append(name)
            return None
        found = {}
        try:
            # The library checks the header, but NumPy lets it read no numbers of 8 bits: these are read where they lie.
            with safe_open(path, framework="numpy") as file:
                begins = _begins(path)
                for key in file.keys():  # noqa: SIM118 (no dictionary)
                    tensor = file.get_slice(key)
                    found[key] = Stored(path, tuple(tensor.get_shape()), tensor.get_dtype(), begins[key])
        except (OSError, SafetensorError) as error:
            self.problems["truncated or damaged file"].append(f"{name} ({error})")
            return None
        return found


def _begins(path: Path) -> dict[str, int]:
    """Where every tensor of a whole safetensors file begins: behind its header of JSON and that header's size."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = parse_json(decode_text(file.read(size), path), path)
    return {name: 8 + size + about["data_offsets"][0] for name, about in header.items() if name != "__metadata__"}


def read_index(path: Path) -> dict[str, str]:
    """Tensor name → file name, from `model.safetensors.index.json`.

    Raises:
        UserError: it is no such index.
    """
    try:
        weight_map = read_json_object(path)["weight_map"]
        names = [*weight_map.keys(), *weight_map.values()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is no safetensors index: it must be a JSON object with a weight_map") from error
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} is no safetensors index: its weight_map must give a file name for every tensor")
    # One file may have several spellings.
    files = {name: os.path.normpath(file) for name, file in weight_map.items()}
    if outside := [file for file in files.values() if os.path.isabs(file) or file.split(os.sep)[0] == os.pardir]:
        raise UserError(f"{path} is no safetensors index: {outside[0]} lies outside its folder")
    return files


def describe(problems: Mapping[str, Sequence[str]]) -> str:
    """All problems in one line, the first few of each kind by name."""
    parts = []
    for kind, places in problems.items():
        more = [f"… and {len(places) - _TOLD} more"] if len(places) > _TOLD else []
        parts.append(f"{kind}: {', '.join([*places[:_TOLD], *more])}")
    return "; ".join(parts)


def show_shape(shape: tuple[int, ...]) -> str:
    """A shape as messages show it."""
    return "×".join(map(str, shape)) or "a scalar"


def first_line(error: BaseException) -> str:
    """The first line that an error has to say, or its name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _nothing_to_read(folder: Path) -> str:
    wanted = f"{SINGLE} or {INDEX}"
    if (folder / MARKER).is_file():
        return f"{folder} is converted already: it has {MARKER}, and no {wanted}"
    if (folder / _ADAPTER).is_file():
        return f"{folder} has an adapter and no model ({_ADAPTER}); merge it into its base model first"
    if any(folder.glob("*.bin")) or any(folder.glob("*.bin.index.json")):
        return f"{folder} has PyTorch .bin weights only, and safetensors are needed ({wanted}); save it as safetensors"
    if any(folder.glob("*.safetensors")):
        return f"{folder} has safetensors files, but neither {wanted}; shards are read by their index only"
    return f"not a checkpoint: {folder} has neither {wanted}"
