"""What the ops take and give beside plain arrays."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

# KV heads to compute, −1 for none. NumPy arrays are known while tracing, even under jit: kernels then launch nothing to
# order them.
Heads = Array | np.ndarray
PageScore = Literal["max", "lse"]
KVDtype = Literal["int8", "fp8"]
Rule = Literal["budget", "ratio", "top_p", "threshold", "forced"]


class KVPages(NamedTuple):
    """The paged KV cache of one layer: a pytree that programs are given and give back.

    `data [num_pages, K, page_size, 2H]`: keys in `[..., :H]`, values in `[..., H:]`. A quantised cache has 8 bits for a
    number and holds words, uint16 `[num_pages, K, page_size, H]`: a key in the low byte, a value in the high one. (XLA
    copies pools of 8-bit elements on TPUs at every append, and Hopper transposes elements of 16 bits alone.) "int8" has
    a scale for every token and head beside them, float32 `scales [num_pages, K, 2 · page_size]`, the keys' and then the
    values': number = byte · scale. "fp8" is e4m3 without scales; no zero has a sign.
    """

    data: jax.Array
    scales: jax.Array | None = None

    @property
    def num_pages(self) -> int:
        """Pages of the pool, scratch pages included."""
        return self.data.shape[0]

    @property
    def quantized(self) -> KVDtype | None:
        """What the bytes of a quantised cache are; None: `data` holds the numbers themselves."""
        if self.data.dtype != jnp.uint16:
            return None
        return "fp8" if self.scales is None else "int8"

    @property
    def head_dim(self) -> int:
        """H."""
        return self.data.shape[3] if self.quantized else self.data.shape[3] // 2

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.data.shape[1]

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.data.shape[2]


class Selection(NamedTuple):
    """The pages that each KV head reads: a pytree that layers hand up.

    `pages [B, K, M]`: logical page ids, ascending, padded with −1; `counts [B, K]`: how many of them are real.
    """

    pages: Int[Array, "B K M"]
    counts: Int[Array, "B K"]


@dataclasses.dataclass(frozen=True)
class SelectionSpec:
    """How many pages are picked, and by what: the static half of a selection (LycheeDecode, arXiv 2602.04541).

    `budget_pages` is M, at most what a head reads; the first `sink_pages` and the last `recent_pages` of a sequence are
    always among them. `rule` and its number `amount`: see `xla.decode.page_limits`. `page_score`: a page counts by its
    best token ("max") or by the log-sum-exp of its scores ("lse").

    Raises:
        ValueError: numbers that contradict each other.
    """

    budget_pages: int
    sink_pages: int
    recent_pages: int
    rule: Rule = "budget"
    amount: float = 0.0
    page_score: PageScore = "max"

    def __post_init__(self) -> None:
        if self.budget_pages < 1:
            raise ValueError(f"budget_pages is {self.budget_pages}; it must be at least 1")
        if self.sink_pages < 0 or self.recent_pages < 0:
            raise ValueError(f"sink_pages {self.sink_pages} and recent_pages {self.recent_pages} must not be negative")
        if self.sink_pages + self.recent_pages > self.budget_pages:
            raise ValueError(
                f"{self.sink_pages} sink and {self.recent_pages} recent pages are forced, more than the budget of "
                f"{self.budget_pages}"
            )
