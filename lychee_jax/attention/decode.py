"""A decode step: one new token a row over the paged cache, dense or by head roles."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

import pallas_kernels
from lychee_jax.attention.backend import attention_scale
from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import Selection, SelectionPolicy
from lychee_jax.cache.pages import append_token


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
