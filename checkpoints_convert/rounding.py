"""Tensors of a checkpoint in 8 bits: rounded once, or kept where they are stored so."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Float32, Shaped

from checkpoints_convert.source import Source
from lychee_jax.config import Quantization
from lychee_jax.errors import UserError
from lychee_jax.models.quantization import quantize_kernel


@dataclasses.dataclass
class RoundingError:
    """How far numbers moved that a checkpoint stores rounded already, and that were rounded again.

    The error of an output channel is the norm of its differences over the norm of its numbers.
    """

    channels: int = 0
    total: float = 0.0
    largest: float = 0.0
    where: str = ""

    def add(
        self, name: str, before: Float[np.ndarray, "rows columns"], after: Float[np.ndarray, "rows columns"]
    ) -> None:
        """Count some channels of the tensor `name`."""
        norm = np.linalg.norm(before, axis=1)
        error = np.linalg.norm(after - before, axis=1)
        relative = np.divide(error, norm, out=np.zeros_like(norm), where=norm > 0)
        self.channels += len(relative)
        self.total += float(relative.sum(dtype=np.float64))
        if len(relative) and relative.max() >= self.largest:
            self.largest, self.where = float(relative.max()), name

    def __str__(self) -> str:
        mean = self.total / max(1, self.channels)
        return f"relative error of a channel {mean:.2%} on average, {self.largest:.2%} at most ({self.where})"


def rounded(
    source: Source, name: str, quantize: Quantization, error: RoundingError
) -> Iterator[tuple[int, Shaped[np.ndarray, "rows columns"], Float32[np.ndarray, " rows"]]]:
    """A tensor in 8 bits, in pieces of whole rows: the first row's number, the rows, a scale for each.

    Args:
        source: the checkpoint.
        name: of the tensor.
        quantize: the format.
        error: where to count the error of what is rounded a second time.

    Raises:
        UserError: a number that is not finite, or a file that cannot be read any more.
    """
    kept = source.channels(name, quantize)
    if kept is not None:
        for first, rows, scale in kept:
            if not (np.isfinite(scale).all() and np.isfinite(rows).all()):
                raise UserError(f"{name}: a weight is NaN or infinite, and has no scale in 8 bits")
            yield first, rows, scale
        return
    again = source.is_quantised(name)
    for first, block in source.blocks(name):
        try:
            rows, scale = quantize_kernel(block, quantize)
        except UserError as cause:
            raise UserError(f"{name}: {cause}") from cause
        if again:
            error.add(name, block, rows.astype(np.float32) * scale[:, None])
        yield first, rows, scale
