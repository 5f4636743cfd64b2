"""What the ops hand to each other beside plain arrays."""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Int

# KV heads to compute. NumPy arrays are known while tracing, even under jit: kernels then launch nothing to order them.
Heads = Array | np.ndarray
PageScores = Literal["max", "lse"]
Rule = Literal["budget", "ratio", "top_p", "threshold", "forced"]


class Selection(NamedTuple):
    """The pages that each KV head reads: a pytree that layers hand up.

    `pages [B, K, M]`: logical page ids, ascending, padded with −1; `counts [B, K]`: how many of them are real.
    """

    pages: Int[Array, "B K M"]
    counts: Int[Array, "B K"]
