"""What the engine gives back."""

import dataclasses
from typing import Any

import jax
import numpy as np

from lychee_jax.engine.programs import (
    Pools,
)


@dataclasses.dataclass(frozen=True)
class Step:
    """One token position of all rows: `tokens [B]` (−1: the row had ended) and `logprobs [B]`."""

    index: int
    tokens: np.ndarray
    logprobs: np.ndarray


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds. The first token of a row belongs to the prefill; `tokens_per_s` counts all others, of all rows.

    `compile_s` is the time of calls that had to compile; it is in neither of the other two.
    """

    prefill_s: float
    decode_s: float
    tokens_per_s: float
    compile_s: float


@dataclasses.dataclass(frozen=True)
class Result:
    """What was generated: one entry a row, a stopping eos included."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    timing: Timing
    attention: dict[str, Any]


@dataclasses.dataclass
class Prefilled:
    """Prompts in the cache, ready to be decoded. Decoding consumes it unless told to keep it."""

    prompts: list[list[int]]
    page_size: int
    capacity: int
    pools: Pools | None
    page_table: jax.Array
    last: jax.Array
    prefill_s: float
    compile_s: float
