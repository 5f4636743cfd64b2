"""Where tensors come from: the safetensors file of a Hugging Face folder, or its shards, by the index."""

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from lychee_jax.errors import UserError
from lychee_jax.files import read_json_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MARKER = "lychee.json"
"""What a converted folder has and a Hugging Face folder has not."""

# safetensors' names. Importing ml_dtypes is also what teaches its NumPy reader bfloat16.
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
# A safetensors file is mapped into memory and its touched pages count as ours, so it is read in blocks of this size.
_BLOCK_NUMBERS = 2**23
# An error is one line: so many problems of a kind are told by name.
_TOLD = 8


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint, as the header of its file describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Source:
    """The tensors of a Hugging Face folder. Opening it reads headers only.

    Attributes:
        tensors: name → where it lies, for everything that can be read.
        problems: what is wrong with the files: kind of problem → where.
        lost: names of tensors that are there or were promised, but that a problem keeps from being read.

    Raises:
        UserError: there are no safetensors to read at all.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors: dict[str, Stored] = {}
        self.problems: dict[str, list[str]] = collections.defaultdict(list)
        self.lost: set[str] = set()
        # Where both are there, the single file is the checkpoint, as in transformers.
        if (folder / SINGLE).is_file():
            header = self._header(SINGLE)
            if header is None:
                raise UserError(f"{folder}: {describe(self.problems)}")
            self.tensors = header
        elif (folder / INDEX).is_file():
            self._open_shards(read_index(folder / INDEX))
        else:
            raise UserError(_nothing_to_read(folder))

    def dtype(self, name: str) -> np.dtype | None:
        """The dtype in which a tensor is stored; None for one that is not supported."""
        return _DTYPES.get(self.tensors[name].dtype)

    def blocks(self, name: str) -> Iterator[tuple[int, Shaped[np.ndarray, " rows *rest"]]]:
        """A tensor in pieces of whole rows: the first row's number, and the rows.

        Raises:
            UserError: the file has changed or cannot be read any more.
        """
        stored = self.tensors[name]
        step = max(1, _BLOCK_NUMBERS // math.prod(stored.shape[1:]))
        rows = stored.shape[0]
        for first in range(0, rows, step):
            try:
                # Opened for each block, because closing is what gives the mapped pages back.
                with safe_open(stored.file, framework="numpy") as file:
                    block = file.get_slice(name)[first : min(first + step, rows)]
            except (OSError, SafetensorError) as error:
                raise UserError(f"cannot read {name} from {stored.file}: {error}") from error
            yield first, block

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers."""
        a, b = self.tensors[one], self.tensors[other]
        if a.shape != b.shape or not {a.dtype, b.dtype} <= _DTYPES.keys():
            return False
        return all(
            np.array_equal(x.astype(np.float32), y.astype(np.float32))
            for (_, x), (_, y) in zip(self.blocks(one), self.blocks(other), strict=True)
        )

    def _open_shards(self, weight_map: dict[str, str]) -> None:
        holders = collections.defaultdict(list)
        for shard in sorted(set(weight_map.values())):
            header = self._header(shard)
            if header is None:
                self.lost |= {name for name, file in weight_map.items() if file == shard}
                continue
            for name, stored in header.items():
                holders[name].append(shard)
                if weight_map.get(name) == shard:
                    self.tensors[name] = stored
        for name, shards in holders.items():
            if len(shards) > 1:
                self.problems["duplicate"].append(f"{name} (in {' and '.join(shards)})")
            elif name not in weight_map:
                self.problems["not in the index"].append(f"{name} (in {shards[0]})")
            elif shards[0] != weight_map[name]:
                place = f"{name} (in {shards[0]}, but the index says {weight_map[name]})"
                self.problems["misplaced"].append(place)
        self.lost |= holders.keys() - self.tensors.keys()

    def _header(self, name: str) -> dict[str, Stored] | None:
        """What a file holds; None, and a problem noted, if that cannot be read."""
        path = self.folder / name
        if not path.is_file():
            self.problems["missing file"].append(name)
            return None
        found = {}
        try:
            with safe_open(path, framework="numpy") as file:
                for key in file.keys():  # noqa: SIM118 (no dictionary)
                    tensor = file.get_slice(key)
                    found[key] = Stored(path, tuple(tensor.get_shape()), tensor.get_dtype())
        except (OSError, SafetensorError) as error:
            self.problems["truncated or damaged file"].append(f"{name} ({error})")
            return None
        return found


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
    return weight_map


def describe(problems: Mapping[str, Sequence[str]]) -> str:
    """All problems in one line, the first few of each kind by name."""
    parts = []
    for kind, places in problems.items():
        more = [f"… and {len(places) - _TOLD} more"] if len(places) > _TOLD else []
        parts.append(f"{kind}: {', '.join([*places[:_TOLD], *more])}")
    return "; ".join(parts)


def first_line(error: BaseException) -> str:
    """The first line that an error has to say, or its name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _nothing_to_read(folder: Path) -> str:
    wanted = f"{SINGLE} or {INDEX}"
    if (folder / MARKER).is_file():
        return f"{folder} is converted already: it has {MARKER}, and no {wanted}"
    if any(folder.glob("*.bin")) or any(folder.glob("*.bin.index.json")):
        return f"{folder} has PyTorch .bin weights only, and safetensors are needed ({wanted}); save it as safetensors"
    if any(folder.glob("*.safetensors")):
        return f"{folder} has safetensors files, but neither {wanted}; shards are read by their index only"
    return f"not a checkpoint: {folder} has neither {wanted}"
