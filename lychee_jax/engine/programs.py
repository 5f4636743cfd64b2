"""The compiled programs of inference, and the only jit boundaries: prefill a chunk, take the first token, decode a
block of tokens, feed a block of given tokens, correct the cache, watch a step. Everything static about them is
hashable; arrays never decide a shape.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from lychee_jax.attention.decode import Decode
from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.prefill import Extend
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.cache.pages import Pools
from lychee_jax.engine.sampling import SamplingArrays, SamplingKind, sample
from lychee_jax.models.spec import ModelSpec


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """What decides which decode program is compiled: the roles (None: dense), the policy, the kind of sampling."""

    head_map: HeadMap | None
    policy: SelectionPolicy
    kind: SamplingKind
    steps: int
    implementation: str | None


class Rows(NamedTuple):
    """The rows of a batch between two steps.

    `token [B]`: the newest token, not yet fed; `positions [B]`: where it goes; `active [B]`: no eos yet; `step [B]`:
    the index of the token that comes next; `seen [B, V]`: what a repetition penalty falls on (None without one).
    """

    token: Int32[Array, " B"]
    positions: Int32[Array, " B"]
    active: Bool[Array, " B"]
    step: Int32[Array, " B"]
    seen: Bool[Array, "B V"] | None


class Block(NamedTuple):
    """What a block of steps tells the host: rows that took no part in a step have token −1."""

    tokens: Int32[Array, "steps B"]
    logprobs: Float32[Array, "steps B"]
    pages_read: Int32[Array, "steps B"]


@functools.partial(jax.jit, static_argnames=("spec", "implementation"), donate_argnames=("pools",))
def prefill_chunk(
    spec: ModelSpec,
    weights: tuple[jax.Array, ...],
    pools: Pools,
    page_table: Int[Array, "B P"],
    tokens: Int[Array, "B T"],
    cos: Float32[Array, "#B T half"],
    sin: Float32[Array, "#B T half"],
    starts: Int[Array, " B"],
    counts: Int[Array, " B"],
    implementation: str | None = None,
) -> tuple[Pools, Float[Array, "B E"]]:
    """Feed `counts[b]` prompt tokens from position `starts[b]` (page aligned); returns the last ones' hidden states."""
    backend = Extend(page_table, starts, counts, aligned=True, implementation=implementation)
    hidden, pools = spec.merge(weights)(tokens, cos, sin, backend, pools)
    return pools, jnp.take_along_axis(hidden, (counts - 1)[:, None, None], axis=1)[:, 0]


@functools.partial(jax.jit, static_argnames=("spec", "implementation"), donate_argnames=("pools",))
def correct_cache(
    spec: ModelSpec,
    weights: tuple[jax.Array, ...],
    pools: Pools,
    page_table: Int[Array, "B P"],
    tokens: Int[Array, "B T"],
    cos: Float32[Array, "#B T half"],
    sin: Float32[Array, "#B T half"],
    starts: Int[Array, " B"],
    active: Bool[Array, " B"],
    implementation: str | None = None,
) -> Pools:
    """Rewrite the cache of the last T tokens of active rows by a dense pass (LycheeDecode's cache correction)."""
    counts = jnp.where(active, tokens.shape[1], 0).astype(jnp.int32)
    backend = Extend(page_table, starts, counts, aligned=False, implementation=implementation)
    return spec.merge(weights)(tokens, cos, sin, backend, pools)[1]


def _take(
    logits: Float32[Array, "B V"],
    rows: Rows,
    kind: SamplingKind,
    sampling: SamplingArrays,
    eos_ids: Int[Array, " n"],
    on: Bool[Array, " B"],
) -> tuple[Rows, jax.Array, jax.Array]:
    """Sample for the rows that are `on`: their new state, and (token, logprob) with −1 and 0 elsewhere."""
    batch = logits.shape[0]
    token, logprob = sample(logits, sampling, kind, rows.seen, jnp.arange(batch, dtype=jnp.int32), rows.step)
    ended = jnp.any(token[:, None] == eos_ids[None, :], axis=1)
    seen = rows.seen
    if seen is not None:
        index = jnp.arange(batch, dtype=jnp.int32)
        seen = seen.at[index, token].set(seen[index, token] | on)
    after = Rows(
        token=jnp.where(on, token, rows.token),
        positions=rows.positions,
        active=rows.active & ~(on & ended),
        step=rows.step + on.astype(jnp.int32),
        seen=seen,
    )
    return after, jnp.where(on, token, -1), jnp.where(on, logprob, 0.0)


@functools.partial(jax.jit, static_argnames=("spec", "kind"))
def first_token(
    spec: ModelSpec,
    kind: SamplingKind,
    weights: tuple[jax.Array, ...],
    last: Float[Array, "B E"],
    rows: Rows,
    sampling: SamplingArrays,
    eos_ids: Int[Array, " n"],
) -> tuple[Rows, Block]:
    """The first new token, from the dense prefill's last logits."""
    logits = spec.merge(weights).logits(last)
    rows, token, logprob = _take(logits, rows, kind, sampling, eos_ids, rows.active)
    return rows, Block(token[None], logprob[None], jnp.zeros((1, token.shape[0]), jnp.int32))


@functools.partial(jax.jit, static_argnames=("spec", "plan"), donate_argnames=("pools",))
def decode_block(
    spec: ModelSpec,
    plan: DecodePlan,
    weights: tuple[jax.Array, ...],
    pools: Pools,
    rows: Rows,
    page_table: Int[Array, "B P"],
    cos: Float32[Array, "B steps half"],
    sin: Float32[Array, "B steps half"],
    chosen: Bool[Array, " B"],
    sampling: SamplingArrays,
    eos_ids: Int[Array, " n"],
    num_steps: Int[Array, ""],
) -> tuple[Pools, Rows, Block]:
    """Up to `num_steps` ≤ `plan.steps` decode steps of the `chosen` rows, on the device; ends early with the last row.

    The pools are donated and updated in place: the caller's are gone after the call.
    """
    model = spec.merge(weights)
    batch = chosen.shape[0]

    def more(carry: Any) -> jax.Array:
        i, _, rows, _ = carry
        return (i < num_steps) & jnp.any(rows.active & chosen)

    def step(carry: Any) -> Any:
        i, pools, rows, block = carry
        on = rows.active & chosen
        backend = Decode(page_table, rows.positions, on, plan.head_map, plan.policy, plan.implementation)
        cos_i, sin_i = (jax.lax.dynamic_slice_in_dim(table, i, 1, axis=1) for table in (cos, sin))
        hidden, state = model(rows.token[:, None], cos_i, sin_i, backend, backend.start(pools))
        logits = model.logits(hidden[:, 0])
        rows, token, logprob = _take(logits, rows, plan.kind, sampling, eos_ids, on)
        rows = rows._replace(positions=rows.positions + on.astype(jnp.int32))
        block = Block(
            block.tokens.at[i].set(token),
            block.logprobs.at[i].set(logprob),
            block.pages_read.at[i].set(state.pages_read),
        )
        return i + 1, state.pools, rows, block

    shape = (plan.steps, batch)
    empty = Block(jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32))
    _, pools, rows, block = jax.lax.while_loop(more, step, (jnp.int32(0), pools, rows, empty))
    return pools, rows, block


class Fed(NamedTuple):
    """What a block of given tokens tells the host; where a row took no part, zeros.

    `greedy`: the token is the likeliest one, the lowest id of equals, as greedy decoding would have it.
    """

    logprobs: Float32[Array, "steps B"]
    greedy: Bool[Array, "steps B"]
    pages_read: Int32[Array, "steps B"]


@functools.partial(jax.jit, static_argnames=("spec", "plan"), donate_argnames=("pools",))
def feed_block(
    spec: ModelSpec,
    plan: DecodePlan,
    weights: tuple[jax.Array, ...],
    pools: Pools,
    last: Float[Array, "B E"],
    tokens: Int[Array, "B steps"],
    positions: Int[Array, " B"],
    counts: Int[Array, " B"],
    page_table: Int[Array, "B P"],
    cos: Float32[Array, "B steps half"],
    sin: Float32[Array, "B steps half"],
) -> tuple[Pools, Float[Array, "B E"], Fed]:
    """Decode steps whose tokens are given instead of sampled: `counts[b]` of them, the first at `positions[b]`.

    `last [B, E]` holds the hidden states before the first token, and comes back as those after the last one. A token's
    log-probability is what the model gave it before it was fed. The pools are donated, as in `decode_block`.
    """
    model = spec.merge(weights)

    def step(i: jax.Array, carry: Any) -> Any:
        pools, last, fed = carry
        on = i < counts
        token = jax.lax.dynamic_index_in_dim(tokens, i, axis=1)
        logits = model.logits(last)
        logprob = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), token, axis=-1)[:, 0]
        greedy = jnp.argmax(logits, axis=-1) == token[:, 0]
        backend = Decode(page_table, positions + i, on, plan.head_map, plan.policy, plan.implementation)
        cos_i, sin_i = (jax.lax.dynamic_slice_in_dim(table, i, 1, axis=1) for table in (cos, sin))
        hidden, state = model(token, cos_i, sin_i, backend, backend.start(pools))
        fed = Fed(
            fed.logprobs.at[i].set(jnp.where(on, logprob, 0.0)),
            fed.greedy.at[i].set(on & greedy),
            fed.pages_read.at[i].set(jnp.where(on, state.pages_read, 0)),
        )
        return state.pools, jnp.where(on[:, None], hidden[:, 0], last), fed

    shape = (plan.steps, counts.shape[0])
    empty = Fed(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32))
    pools, last, fed = jax.lax.fori_loop(jnp.int32(0), jnp.max(counts).astype(jnp.int32), step, (pools, last, empty))
    return pools, last, fed


@dataclasses.dataclass(frozen=True)
class _Watched:
    """A decode step that keeps the selection which every layer hands up."""

    decode: Decode

    def __call__(self, index: int, q: jax.Array, k: jax.Array, v: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """As the step does it."""
        inner, seen = state
        out, inner = self.decode(index, q, k, v, inner)
        return out, (inner, (*seen, inner.selection.pages))


@functools.partial(jax.jit, static_argnames=("spec", "plan"))
def watch_step(
    spec: ModelSpec,
    plan: DecodePlan,
    weights: tuple[jax.Array, ...],
    pools: Pools,
    last: Float[Array, "B E"],
    positions: Int[Array, " B"],
    active: Bool[Array, " B"],
    page_table: Int[Array, "B P"],
    cos: Float32[Array, "B 1 half"],
    sin: Float32[Array, "B 1 half"],
) -> Int32[Array, "L B K M"]:
    """The pages that every layer hands up while the likeliest token after `last` is fed. The pools stay as they are."""
    model = spec.merge(weights)
    token = jnp.argmax(model.logits(last), axis=-1).astype(jnp.int32)
    backend = Decode(page_table, positions, active, plan.head_map, plan.policy, plan.implementation)
    _, (_, seen) = model(token[:, None], cos, sin, _Watched(backend), (backend.start(pools), ()))
    return jnp.stack(seen)
