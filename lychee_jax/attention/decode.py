"""A decode step: one new token a row over the paged cache, dense or by head roles."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

import pallas_kernels
from lychee_jax.attention.backend import attention_scale
from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.provider import FullScan, SelectionProvider
from lychee_jax.attention.selection import Selection, SelectionPolicy
from lychee_jax.cache.pages import Pools, append_token
from lychee_jax.parallel.layouts import Layout, heads_here
from pallas_kernels.types import Heads


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What a decode step carries through its layers: the pools, the selection, and how many pages were read.

    With a layout each is of the running device's heads.
    """

    pools: Pools
    selection: Selection
    pages_read: Int[Array, " B"]


@dataclasses.dataclass(frozen=True)
class Decode:
    """One new token a row, at position `positions[b]`; dense without a head map, else by roles (arXiv 2602.04541).

    With a head map, rows with `dense[b]` still read all pages in every head; what they hand up means nothing. Inactive
    rows neither write to their pages nor read anything, and their output is zero. `provider`: how retrieval heads find
    pages. `layout`: a device of it computes its heads.
    """

    page_table: Int[Array, "B P"]
    positions: Int[Array, " B"]
    active: Bool[Array, " B"]
    head_map: HeadMap | None
    policy: SelectionPolicy
    implementation: str | None = None
    dense: Bool[Array, " B"] | None = None
    provider: SelectionProvider = FullScan()
    layout: Layout | None = None

    def start(self, pools: Pools) -> DecodeState:
        """The state below layer 0: nothing selected yet."""
        batch, kv_heads = self.positions.shape[0], pools[0].kv_heads
        budget = self.policy.spec(pools[0].page_size).budget_pages
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
        page_size = pool.page_size
        scale = attention_scale(q.shape[-1])
        used = (lengths + page_size - 1) // page_size
        every = range(pool.kv_heads if self.layout is None else len(self.layout.places))
        retrieval = every if self.head_map is None else self.head_map.retrieval[index]
        heads = heads_here(self.layout, retrieval)
        selection = state.selection
        if self.head_map is None:
            out, _ = pallas_kernels.dense_decode(
                q[:, 0], pool, self.page_table, lengths, heads, scale=scale, implementation=self.implementation
            )
        else:
            out, selection = self.provider(
                index, q[:, 0], pool, self.page_table, lengths, selection, heads, self.policy.spec(page_size),
                scale=scale, dense=self.dense, implementation=self.implementation,
            )  # fmt: skip
        sparse = heads_here(self.layout, [head for head in every if head not in retrieval])
        read = state.pages_read + _count(heads) * used
        if sparse.shape[0]:
            counts = jnp.where(sparse >= 0, selection.counts[:, jnp.maximum(sparse, 0)], 0)
            picked = jnp.sum(counts, axis=1, dtype=jnp.int32)
            read = read + (picked if self.dense is None else jnp.where(self.dense, _count(sparse) * used, picked))
        return out[:, None], DecodeState(pools, selection, read)


def _count(heads: Heads) -> Any:
    """How many heads a list padded with −1 has."""
    return (heads >= 0).sum(dtype=np.int32)
