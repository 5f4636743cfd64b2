"""Hugging Face folders whose matrices are stored in 8 bits, with scales beside them: numbers are stored × scale."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Shaped

from checkpoints_convert.config import DEFAULT, ConvertConfig
from checkpoints_convert.keys import is_activation_scale, is_cache_scale, weight_of_scale
from checkpoints_convert.source import EIGHT_BITS, FLOATS, FolderSource, Stored, show_shape
from lychee_jax.config import Quantization
from lychee_jax.models.quantization import STORED

_log = logging.getLogger(__name__)

# The number of every byte: looked up, because e4m3 takes four times as long to be converted.
_NUMBERS = {name: np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32) for name, dtype in EIGHT_BITS.items()}


class QuantizedFolder(FolderSource):
    """The tensors of such a folder, scales multiplied in. Opening it reads headers only.

    A scale belongs to a whole tensor, to an output channel or to a block, as its shape says. Which weights are
    quantised is read from what is stored, not from the config's lists of names, which can only repeat it. Scales of
    activations and caches are not used.

    Args:
        folder: the folder.
        block: rows and columns of the blocks that may share a scale; None: there are no blocks.
        config: how much is read at once.
    """

    def __init__(self, folder: Path, block: tuple[int, int] | None, config: ConvertConfig = DEFAULT):
        super().__init__(folder, config)
        self._block = block
        # Weight → its scale, and how many rows and columns share one number of it.
        self._scales: dict[str, tuple[Stored, tuple[int, int]]] = {}
        cache = [name for name in self.tensors if is_cache_scale(name)]
        for name in [*cache, *filter(is_activation_scale, [*self.tensors])]:
            self.tensors.pop(name, None)
        if cache:
            among = f"{cache[0]} is one of {len(cache)}"
            _log.warning("%s", f"{folder}: scales of a quantised cache are not used ({among})")
        self._find_scales()

    def dtype(self, name: str) -> np.dtype | None:
        """The dtype of a tensor's numbers once they are scaled; None for one that is not supported."""
        return np.dtype(np.float32) if self.is_quantised(name) else super().dtype(name)

    def is_quantised(self, name: str) -> bool:
        """Whether a tensor has scales."""
        return name in self._scales

    def blocks(self, name: str) -> Iterator[tuple[int, Shaped[np.ndarray, " rows *rest"]]]:
        """A tensor in pieces of whole rows; what is stored in 8 bits is scaled in float32."""
        if not self.is_quantised(name):
            yield from super().blocks(name)
            return
        numbers, columns = _NUMBERS[self.tensors[name].dtype], self.tensors[name].shape[1]
        scale, (high, wide) = self._read_scale(name)
        for first, stored in super().blocks(name):
            scales = scale[np.arange(first, first + len(stored)) // high]
            if scales.shape[1] > 1:
                scales = scales.repeat(wide, axis=1)[:, :columns]
            block = numbers[stored.view(np.uint8)]
            block *= scales
            yield first, block

    def channels(
        self, name: str, quantize: Quantization
    ) -> Iterator[tuple[int, Shaped[np.ndarray, "rows columns"], Float32[np.ndarray, " rows"]]] | None:
        """A tensor that is stored in these 8 bits, with one scale for each row, in pieces of whole rows."""
        if not self.is_quantised(name) or EIGHT_BITS[self.tensors[name].dtype] != STORED[quantize]:
            return None
        if self._scales[name][1][1] < self.tensors[name].shape[1]:
            return None
        scale, (high, _) = self._read_scale(name)
        blocks = super().blocks(name)
        return ((first, rows, scale[np.arange(first, first + len(rows)) // high, 0]) for first, rows in blocks)

    def _read_scale(self, name: str) -> tuple[Float32[np.ndarray, "high wide"], tuple[int, int]]:
        """The grid of a weight's scales, and how many rows and columns share one."""
        stored, shared = self._scales[name]
        dtype = FLOATS[stored.dtype]
        data = stored.read(0, math.prod(stored.shape) * dtype.itemsize)
        grid = [-(-size // step) for size, step in zip(self.tensors[name].shape, shared, strict=True)]
        return data.view(dtype).astype(np.float32).reshape(grid), shared

    def _find_scales(self) -> None:
        """Puts every scale with its weight, and takes note of what has none, or a wrong one."""
        scales = {name: weight for name in self.tensors if (weight := weight_of_scale(name)) is not None}
        waiting = {weight_of_scale(name) for name in self.lost}  # a file is missing or damaged: that is told already
        for name, weight in scales.items():
            scale, stored = self.tensors.pop(name), self.tensors.get(weight)
            if stored is None:
                if weight not in self.lost:
                    self.problems["scale without a weight"].append(name)
            elif stored.dtype not in EIGHT_BITS or len(stored.shape) != 2:
                kind = f"{stored.dtype}, {show_shape(stored.shape)}"
                self.problems["scale of a weight that is no matrix of e4m3 or int8"].append(
                    f"{name} ({weight} is {kind})"
                )
            elif weight in self._scales or weight in waiting:
                self.problems["more than one scale"].append(weight)
            elif scale.dtype not in FLOATS:
                self.problems["unsupported dtype"].append(f"{name} ({scale.dtype})")
                waiting.add(weight)
            elif (shared := self._shared(stored.shape, scale.shape)) is None:
                wanted = " or ".join(map(show_shape, self._grids(stored.shape)))
                self.problems["misshapen"].append(f"{name} ({show_shape(scale.shape)} instead of {wanted})")
                waiting.add(weight)
            else:
                self._scales[weight] = scale, shared
        for name, stored in [*self.tensors.items()]:
            if stored.dtype in EIGHT_BITS and len(stored.shape) == 2 and name not in self._scales:
                if name not in waiting:
                    self.problems["missing"].append(f"the scale of {name}")
                self.lost.add(name)
                del self.tensors[name]

    def _shared(self, shape: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, int] | None:
        """How many rows and columns of a weight share a scale, by the shape of the scales; None: it is a wrong one."""
        if math.prod(scale) == 1:
            return shape[0], shape[1]
        if scale == shape[:1]:
            scale = (*scale, 1)
        return next((shared for grid, shared in self._grids(shape).items() if grid == scale), None)

    def _grids(self, shape: tuple[int, ...]) -> dict[tuple[int, ...], tuple[int, int]]:
        """Shape of the scales → rows and columns that share one, for all that may be."""
        rows, columns = shape
        grids = {(1,): (rows, columns), (rows, 1): (1, columns)}
        if self._block is not None:
            high, wide = self._block
            grids.setdefault((-(-rows // high), -(-columns // wide)), self._block)
        return grids
