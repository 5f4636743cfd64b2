"""What an attention backend is, and the one without a cache.

A backend gets the rotated queries, keys and values of one layer and a state that it carries from layer to layer. The
caller picks one as data: whole sequences (`Full`), a chunk over a cache (`prefill.Extend`), one token over a cache
(`decode.Decode`), roles that are still being learned (`gated.Gated`). The model is the same under all of them.
"""

import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

import jax

from pallas_kernels.xla.prefill import causal_attention


@runtime_checkable
class AttentionBackend(Protocol):
    """How the queries of layer `index` attend: q `[B, T, K, G, H]`, k and v `[B, T, K, H]` → `[B, T, K, G, H]`."""

    def __call__(self, index: int, q: jax.Array, k: jax.Array, v: jax.Array, state: Any, /) -> tuple[jax.Array, Any]:
        """Attend, and pass the state on."""
        ...


@dataclasses.dataclass(frozen=True)
class Full:
    """Dense causal attention of whole sequences, no cache; carries nothing."""

    def __call__(self, index: int, q: jax.Array, k: jax.Array, v: jax.Array, state: None) -> tuple[jax.Array, None]:
        """Attend to every earlier position."""
        del index, state
        return causal_attention(q, k, v, scale=attention_scale(q.shape[-1])), None


def attention_scale(head_dim: int) -> float:
    """1 / √H."""
    return 1.0 / math.sqrt(head_dim)
