"""Attention with learnable roles, `z · full + (1 − z) · sparse` for every KV head: what training sees of decoding.

A text is read once, densely, as a prefill does (`Remember`). Then all tokens that follow go through the layers at once,
each as the decode step at its place (`Gated`): the same picks, the same pages, handed up likewise, so that with every
z at 0 or 1 the result is hybrid decoding's (arXiv 2602.04541).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from lychee_jax.attention.backend import attention_scale
from lychee_jax.attention.selection import SelectionPolicy
from pallas_kernels.xla.prefill import causal_attention

type KeysAndValues = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Remember:
    """Dense causal attention that carries the keys and values `[B, S, K, H]` of all layers so far."""

    def __call__(
        self, index: int, q: jax.Array, k: jax.Array, v: jax.Array, state: tuple[KeysAndValues, ...]
    ) -> tuple[jax.Array, tuple[KeysAndValues, ...]]:
        """Attend to every earlier position."""
        return causal_attention(q, k, v, scale=attention_scale(q.shape[-1])), (*state, (k, v))


@dataclasses.dataclass(frozen=True)
class Gated:
    """New tokens at `starts[b] …` of sequences, KV heads with gates; carries the pages handed up, `[B, K, T, P]`.

    `decoded` says which tokens are read by roles; the others, questions between answers, are read densely. A head hands
    up its own pick iff z > 0.5, else what it inherited; layer 0 is all retrieval. `remembered` holds every layer's keys
    and values with room for the new ones; what it has there is overwritten. None: the new tokens are all there is.
    """

    z: Float[Array, "B L K"]
    starts: Int[Array, " B"]
    decoded: Bool[Array, "B T"]
    policy: SelectionPolicy
    page_size: int
    remembered: tuple[KeysAndValues, ...] | None = None
    query_block: int = 128

    def __call__(
        self, index: int, q: jax.Array, k: jax.Array, v: jax.Array, state: Bool[Array, "B K T P"] | None
    ) -> tuple[jax.Array, Bool[Array, "B K T P"]]:
        """Attend in both modes, a block of queries at a time: no T × S matrix outlives its block."""
        if self.remembered is not None:
            k, v = (_put(old, new, self.starts) for old, new in zip(self.remembered[index], (k, v), strict=True))
        batch, length, kv_heads, groups, head_dim = q.shape
        pages = -(-k.shape[1] // self.page_size)
        block = min(self.query_block, length)
        padding = -length % block
        blocks = (length + padding) // block
        z = jnp.where(self.decoded[..., None], self.z[:, None, index], 1.0) if index else None
        inherited = jnp.zeros((batch, kv_heads, length, pages), bool) if state is None else state
        # The padded queries of the last block look like the last position; they are cut off again.
        places = jnp.minimum(self.starts[:, None] + jnp.arange(length + padding, dtype=jnp.int32), k.shape[1] - 1)

        def split(x: jax.Array, axis: int) -> jax.Array:
            widths = [(0, 0)] * x.ndim
            widths[axis] = (0, padding)
            x = jnp.pad(x, widths) if x.shape[axis] == length else x
            return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, block, *x.shape[axis + 1 :]), axis, 0)

        @jax.checkpoint
        def rows(queries: jax.Array, below: jax.Array, at: jax.Array, gates: jax.Array | None):
            return gated_attention(queries, k, v, below, at, gates, self.policy, self.page_size)

        gates = None if z is None else split(z, 1)
        out, mask = jax.lax.map(lambda xs: rows(*xs), (split(q, 1), split(inherited, 2), split(places, 1), gates))
        out = jnp.moveaxis(out, 0, 1).reshape(batch, blocks * block, kv_heads, groups, head_dim)
        mask = jnp.moveaxis(mask, 0, 2).reshape(batch, kv_heads, blocks * block, pages)
        return out[:, :length], mask[:, :, :length]


def _put(remembered: jax.Array, new: jax.Array, starts: jax.Array) -> jax.Array:
    return jax.vmap(lambda row, part, start: jax.lax.dynamic_update_slice(row, part, (start, 0, 0)))(
        remembered, new.astype(remembered.dtype), starts
    )


def gated_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    below: Bool[Array, "B K T P"],
    positions: Int[Array, "B T"],
    z: Float[Array, "B T K"] | None,
    policy: SelectionPolicy,
    page_size: int,
) -> tuple[Float[Array, "B T K G H"], Bool[Array, "B K T P"]]:
    """Both branches for queries at `positions`, mixed by z, and the pages that every head hands up.

    Without z all heads retrieve. Picks pass no gradient on.
    """
    length, pages = k.shape[1], below.shape[-1]
    scores = attention_scale(q.shape[-1]) * jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    causal = (positions[:, :, None] >= jnp.arange(length, dtype=jnp.int32))[:, None, None]  # [B, 1, 1, T, S]

    def attend(mask: jax.Array) -> jax.Array:
        # Masked again: where nothing was selected, the softmax of equal scores would spread over the future too.
        weights = jnp.where(mask, jax.nn.softmax(jnp.where(mask, scores, pallas_kernels.MASKED), axis=-1), 0.0)
        return jnp.einsum("bkgts,bskh->btkgh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)

    own = _picks(jnp.where(causal[:, 0], jnp.mean(jax.lax.stop_gradient(scores), axis=2), pallas_kernels.MASKED),
                 positions, policy, page_size)  # fmt: skip
    full = attend(causal)
    if z is None:
        return full.astype(q.dtype), own
    selected = jnp.repeat(below, page_size, axis=-1, total_repeat_length=pages * page_size)[..., :length]
    share = z[..., None, None]
    out = share * full + (1.0 - share) * attend(selected[:, :, None] & causal)
    return out.astype(q.dtype), jnp.where((z > 0.5).transpose(0, 2, 1)[..., None], own, below)


def _picks(
    scores: Float[Array, "B K T S"], positions: Int[Array, "B T"], policy: SelectionPolicy, page_size: int
) -> Bool[Array, "B K T P"]:
    """The pages that every head would pick as a retrieval head, from the scores of its group's mean query."""
    batch, kv_heads, count, length = scores.shape
    pages = -(-length // page_size)
    padding = [(0, 0)] * 3 + [(0, pages * page_size - length)]
    tiles = jnp.pad(scores, padding, constant_values=pallas_kernels.MASKED)
    tiles = tiles.reshape(batch, kv_heads, count, pages, page_size)
    spec = policy.spec(page_size)
    page_scores = jnp.max(tiles, axis=-1) if spec.page_score == "max" else jax.nn.logsumexp(tiles, axis=-1)
    rows = batch * count
    picked, _ = pallas_kernels.select_pages(
        page_scores.transpose(0, 2, 1, 3).reshape(rows, kv_heads, pages), (positions + 1).reshape(rows), spec,
        page_size=page_size, implementation="xla",
    )  # fmt: skip
    row, head = jnp.arange(rows, dtype=jnp.int32)[:, None, None], jnp.arange(kv_heads, dtype=jnp.int32)[:, None]
    own = jnp.zeros((rows, kv_heads, pages), bool).at[row, head, jnp.where(picked < 0, pages, picked)].set(
        True, mode="drop"
    )  # fmt: skip
    return own.reshape(batch, count, kv_heads, pages).transpose(0, 2, 1, 3)
