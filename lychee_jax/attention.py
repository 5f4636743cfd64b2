"""The attention layer, and the ways it can attend: chosen by data, never by another copy of the model.

A `Way` gets the rotated queries, keys and values of one layer and a state that it carries from layer to layer:
whole sequences (`Full`), a chunk over a cache (`Extend`), one token over a cache with all heads dense or with roles
(`Decode`). Roles that are still being learned attend in `gated`.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from lychee_jax.cache import append_pages, append_token, append_tokens
from lychee_jax.config import ModelConfig
from lychee_jax.heads import HeadMap
from lychee_jax.layers import Projection, RMSNorm, attention_scale
from lychee_jax.rope import apply_rotary
from lychee_jax.selection import Selection, SelectionPolicy
from pallas_kernels.xla.prefill import causal_attention, extend_attention


@runtime_checkable
class Way(Protocol):
    """How the queries of layer `index` attend: q `[B, T, K, G, H]`, k and v `[B, T, K, H]` → `[B, T, K, G, H]`."""

    def __call__(self, index: int, q: jax.Array, k: jax.Array, v: jax.Array, state: Any, /) -> tuple[jax.Array, Any]:
        """Attend, and pass the state on."""
        ...


class Attention(nnx.Module):
    """Grouped-query attention: project, normalise (Qwen3), rotate, attend in the given way, project back."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        embed, head_dim = config.hidden_size, config.head_dim

        def heads(count: int) -> Projection:
            return Projection((embed,), (count, head_dim), bias=config.qkv_bias, dtype=dtype, rngs=rngs)

        self.q_proj = heads(config.num_heads)
        self.k_proj = heads(config.num_kv_heads)
        self.v_proj = heads(config.num_kv_heads)
        self.o_proj = Projection((config.num_heads, head_dim), (embed,), bias=config.o_bias, dtype=dtype, rngs=rngs)
        self.q_norm = RMSNorm(head_dim, eps=config.rms_norm_eps, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps=config.rms_norm_eps, dtype=dtype) if config.qk_norm else None
        self.kv_heads = config.num_kv_heads

    def __call__(
        self,
        x: Float[Array, "B T E"],
        cos: Float[Array, "#B T half"],
        sin: Float[Array, "#B T half"],
        way: Way,
        index: int,
        state: Any,
    ) -> tuple[Float[Array, "B T E"], Any]:
        """Attend as layer `index`; query head n belongs to KV head n // G."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        batch, length, heads, head_dim = q.shape
        grouped = q.reshape(batch, length, self.kv_heads, heads // self.kv_heads, head_dim)
        out, state = way(index, grouped, k, v, state)
        return self.o_proj(out.reshape(batch, length, heads, head_dim)), state


@dataclasses.dataclass(frozen=True)
class Full:
    """Dense causal attention of whole sequences, no cache; carries nothing."""

    def __call__(self, index: int, q: jax.Array, k: jax.Array, v: jax.Array, state: None) -> tuple[jax.Array, None]:
        """Attend to every earlier position."""
        del index, state
        return causal_attention(q, k, v, scale=attention_scale(q.shape[-1])), None


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

    def __call__(
        self, index: int, q: jax.Array, k: jax.Array, v: jax.Array, state: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Write the chunk's keys and values into the layer's pool, then attend to what lies before and in the chunk.

        Writing after the loop that reads would make XLA copy the pool.
        """
        pool = state[index]
        k, v = k.astype(pool.dtype), v.astype(pool.dtype)
        append = append_pages if self.aligned else append_tokens
        pool = append(pool, self.page_table, self.starts, self.counts, jnp.concatenate([k, v], axis=-1))
        out = extend_attention(
            q, k, v, pool, self.page_table, self.starts, self.counts, scale=attention_scale(q.shape[-1]),
            implementation=self.implementation,
        )  # fmt: skip
        return out, (*state[:index], pool, *state[index + 1 :])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What a decode step carries through its layers: the pools, the selection, and how many pages were read."""

    pools: tuple[jax.Array, ...]
    selection: Selection
    pages_read: Int[Array, " B"]


@dataclasses.dataclass(frozen=True)
class Decode:
    """One new token a row, at position `positions[b]`; dense without a head map, else by roles (arXiv 2602.04541).

    Inactive rows neither write to their pages nor read anything, and their output is zero.
    """

    page_table: Int[Array, "B P"]
    positions: Int[Array, " B"]
    active: Bool[Array, " B"]
    head_map: HeadMap | None
    policy: SelectionPolicy
    implementation: str | None = None

    def start(self, pools: tuple[jax.Array, ...]) -> DecodeState:
        """The state below layer 0: nothing selected yet."""
        batch, kv_heads, page_size = self.positions.shape[0], pools[0].shape[1], pools[0].shape[2]
        budget = self.policy.pages(page_size)["budget_pages"]
        selection = Selection(
            jnp.full((batch, kv_heads, budget), -1, jnp.int32), jnp.zeros((batch, kv_heads), jnp.int32)
        )
        return DecodeState(pools, selection, jnp.zeros((batch,), jnp.int32))

    def __call__(
        self, index: int, q: jax.Array, k: jax.Array, v: jax.Array, state: DecodeState
    ) -> tuple[jax.Array, DecodeState]:
        """Append the token, then read: all pages for retrieval heads, the inherited ones for sparse heads."""
        kv = jnp.concatenate([k, v], axis=-1)[:, 0]
        pool = append_token(state.pools[index], self.page_table, self.positions, self.active, kv)
        pools = (*state.pools[:index], pool, *state.pools[index + 1 :])
        lengths = jnp.where(self.active, self.positions + 1, 0)
        kv_heads, page_size = pool.shape[1], pool.shape[2]
        scale = attention_scale(q.shape[-1])
        used = (lengths + page_size - 1) // page_size
        retrieval = tuple(range(kv_heads)) if self.head_map is None else self.head_map.retrieval[index]
        heads = np.asarray(retrieval, np.int32)
        selection = state.selection
        if self.head_map is None:
            out, _ = pallas_kernels.dense_decode(
                q[:, 0], pool, self.page_table, lengths, heads, scale=scale, implementation=self.implementation
            )
        else:
            out, selection = pallas_kernels.hybrid_decode(
                q[:, 0], pool, self.page_table, lengths, selection, heads, scale=scale, rule=self.policy.rule,
                amount=self.policy.amount, page_scores=self.policy.score, implementation=self.implementation,
                **self.policy.pages(page_size),
            )  # fmt: skip
        sparse = [head for head in range(kv_heads) if head not in retrieval]
        read = state.pages_read + len(retrieval) * used
        if sparse:
            read = read + jnp.sum(selection.counts[:, jnp.asarray(sparse, jnp.int32)], axis=1, dtype=jnp.int32)
        return out[:, None], DecodeState(pools, selection, read)
