"""Prefill: a chunk of new tokens over the paged cache and itself."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

import pallas_kernels
from lychee_jax.attention.backend import attention_scale
from lychee_jax.cache.pages import Pools, append_pages, append_tokens


@dataclasses.dataclass(frozen=True)
class Extend:
    """Dense attention of a chunk of new tokens at `starts[b] …` over the cache and itself; carries the pools.

    The first `counts[b]` tokens of a row are real. `aligned` promises that starts and the chunk are whole pages.
    """

    page_table: Int[Array, "B P"]
    starts: Int[Array, " B"]
    counts: Int[Array, " B"]
    aligned: bool
    implementation: str | None = None

    def __call__(self, index: int, q: jax.Array, k: jax.Array, v: jax.Array, state: Pools) -> tuple[jax.Array, Pools]:
        """Write the chunk's keys and values into the layer's pool, then attend to what lies before and in the chunk.

        Writing after the loop that reads would make XLA copy the pool.
        """
        pool = state[index]
        if pool.quantized is None:
            k, v = k.astype(pool.data.dtype), v.astype(pool.data.dtype)
        append = append_pages if self.aligned else append_tokens
        pool = append(pool, self.page_table, self.starts, self.counts, jnp.concatenate([k, v], axis=-1))
        out = pallas_kernels.extend_attention(
            q, k, v, pool, self.page_table, self.starts, self.counts, scale=attention_scale(q.shape[-1]),
            implementation=self.implementation,
        )  # fmt: skip
        return out, (*state[:index], pool, *state[index + 1 :])
