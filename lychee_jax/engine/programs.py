"""The compiled programs of inference, and the only jit boundaries: read chunks of prompts, start a row, decode a block
of steps, correct the cache, watch a step. Everything static about them is hashable; arrays never decide a shape.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from lychee_jax.attention.decode import Decode
from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.prefill import Extend
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.cache.pages import Pools, copy_pages
from lychee_jax.engine import ranking
from lychee_jax.engine.sampling import (
    MAX_TOP_LOGPROBS,
    Adjustments,
    Sampled,
    SamplingArrays,
    bias_row,
    sample,
    sampling_row,
)
from lychee_jax.engine.sampling_params import SamplingParams
from lychee_jax.engine.vocabulary import summarise, summarise_shares
from lychee_jax.models.spec import ModelSpec
from lychee_jax.parallel.layouts import PICKS, POOLS, Layout, gather_vocabulary, sum_over_devices
from lychee_jax.parallel.mesh import EVERYWHERE

_PLAIN = SamplingParams()  # what empty slots, and slots that are nobody's, ask for
NO_TOKEN, NOT_FINITE = -1, -2
"""Instead of a token: the row took no part in the step; its logits were not finite."""


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """What decides which decode program is compiled: the roles (None: dense), the policy, steps, attention kernels.

    `mixed`: some rows may be dense all the same.
    """

    head_map: HeadMap | None
    policy: SelectionPolicy
    steps: int
    implementation: str | None
    mixed: bool = False


class Rows(NamedTuple):
    """The state of all sequences between two blocks, an entry a slot.

    `token`: the newest token, not yet fed; `position`: where it goes; `active`: not ended; `step`: index of the token
    that comes next; `remaining`: tokens that may still come; `eos`: ids that end the row (−1: none); `num_top`: top
    log-probabilities that it wants; `adjustments`: with the counts of tokens in its text.
    """

    token: Int32[Array, " S"]
    position: Int32[Array, " S"]
    active: Bool[Array, " S"]
    step: Int32[Array, " S"]
    remaining: Int32[Array, " S"]
    eos: Int32[Array, "S ends"]
    num_top: Int32[Array, " S"]
    sampling: SamplingArrays
    adjustments: Adjustments


class Block(NamedTuple):
    """What some steps tell the host; `NO_TOKEN` where a row took no part."""

    tokens: Int32[Array, "steps B"]
    logprobs: Float32[Array, "steps B"]
    greedy: Bool[Array, "steps B"]
    pages_read: Int32[Array, "steps B"]
    top_ids: Int32[Array, "steps B top"]
    top_logprobs: Float32[Array, "steps B top"]

    @classmethod
    def empty(cls, steps: int, batch: int, vocab_size: int) -> "Block":
        """Nothing happened yet."""
        shape, top = (steps, batch), min(MAX_TOP_LOGPROBS, vocab_size)
        return cls(
            jnp.full(shape, NO_TOKEN, jnp.int32), jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool),
            jnp.zeros(shape, jnp.int32), jnp.zeros((*shape, top), jnp.int32), jnp.zeros((*shape, top), jnp.float32),
        )  # fmt: skip

    def put(
        self, step: Int[Array, ""], on: Bool[Array, " B"], sampled: Sampled, pages_read: Int[Array, " B"]
    ) -> "Block":
        """With one step's results for the rows that are `on`."""
        token = jnp.where(sampled.finite, sampled.token, NOT_FINITE)
        return Block(
            self.tokens.at[step].set(jnp.where(on, token, NO_TOKEN)),
            self.logprobs.at[step].set(jnp.where(on, sampled.logprob, 0.0)),
            self.greedy.at[step].set(on & sampled.greedy),
            self.pages_read.at[step].set(jnp.where(on, pages_read, 0)),
            self.top_ids.at[step].set(sampled.top_ids),
            self.top_logprobs.at[step].set(sampled.top_logprobs),
        )


def make_rows(slots: int, vocab_size: int, ends: int) -> Rows:
    """All slots empty; each has room for `ends` ids that end a text."""

    def of(value: Any, dtype: Any) -> jax.Array:
        return jnp.full((slots,), value, dtype)

    sampling = SamplingArrays(*(of(value, value.dtype) for value in sampling_row(_PLAIN)))
    biases = (jnp.tile(row, (slots, 1)) for row in bias_row(_PLAIN))
    vocabulary = (slots, vocab_size)
    return Rows(
        of(0, jnp.int32), of(0, jnp.int32), of(False, bool), of(0, jnp.int32), of(0, jnp.int32),
        jnp.full((slots, ends), -1, jnp.int32), of(0, jnp.int32), sampling,
        Adjustments(jnp.zeros(vocabulary, bool), jnp.zeros(vocabulary, jnp.int32), *biases),
    )  # fmt: skip


_DIVIDED = {"pools": POOLS, "picks": PICKS}
_DONATED = ("pools", "rows")


def _program(static: tuple[str, ...], results: str | tuple[str, ...]) -> Callable[[Callable[..., Any]], Any]:
    """A jitted program of a model, whose pools and rows are donated.

    With a layout every device runs it, with its parts of the arguments `weights` and `pools` and alike in all others.
    `static`: the arguments before `weights`. `results`: what comes back; "pools" and "picks" are divided by heads.
    """

    def decorate(body: Callable[..., Any]) -> Any:
        names = tuple(inspect.signature(body).parameters)
        assert (*static, "weights") == names[: len(static) + 1]

        @functools.wraps(body)
        def run(spec: ModelSpec, *args: Any) -> Any:
            layout = spec.layout
            if layout is None:
                return body(spec, *args)
            others, arrays = args[: len(static) - 1], args[len(static) - 1 :]
            weights = tuple(map(layout.parts, spec.axes))
            given = (weights, *(_DIVIDED.get(name, EVERYWHERE) for name in names[len(static) + 1 :][: len(arrays) - 1]))
            out = jax.tree.map(lambda name: _DIVIDED.get(name, EVERYWHERE), results)
            return layout.run(functools.partial(body, spec, *others), given, out, arrays)

        donated = tuple(name for name in _DONATED if name in names)
        return jax.jit(run, static_argnames=static, donate_argnames=donated)

    return decorate


@_program(("spec", "implementation", "most"), ("pools", "last"))
def prefill_chunk(
    spec: ModelSpec,
    implementation: str | None,
    most: int,
    weights: tuple[jax.Array, ...],
    pools: Pools,
    page_table: Int[Array, "B P"],
    tokens: Int[Array, "B T"],
    cos: Float32[Array, "#B T half"],
    sin: Float32[Array, "#B T half"],
    starts: Int[Array, " B"],
    counts: Int[Array, " B"],
) -> tuple[Pools, Float[Array, "most E"]]:
    """Read `counts[b]` prompt tokens from position `starts[b]` (page aligned); returns the last ones' hidden states.

    `most`: rows that these are padded to, so that one `start_row` suits all programs that read prompts.
    """
    backend = Extend(page_table, starts, counts, aligned=True, implementation=implementation)
    hidden, pools = spec.merge(weights)(tokens, cos, sin, backend, pools)
    return pools, _last(hidden, counts, most)


def _last(hidden: Float[Array, "B T E"], counts: Int[Array, " B"], most: int) -> Float[Array, "most E"]:
    last = jnp.take_along_axis(hidden, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
    return jnp.pad(last, ((0, most - len(last)), (0, 0)))


class Scored(NamedTuple):
    """What a chunk's logits say of each token that follows: its log-probability, and the likeliest tokens."""

    logprobs: Float32[Array, "B T"]
    top_ids: Int32[Array, "B T top"]
    top_logprobs: Float32[Array, "B T top"]


@_program(("spec", "implementation", "most", "at_once"), ("pools", "last", "scored"))
def score_chunk(
    spec: ModelSpec,
    implementation: str | None,
    most: int,
    at_once: int,
    weights: tuple[jax.Array, ...],
    pools: Pools,
    page_table: Int[Array, "B P"],
    tokens: Int[Array, "B T"],
    cos: Float32[Array, "#B T half"],
    sin: Float32[Array, "#B T half"],
    starts: Int[Array, " B"],
    counts: Int[Array, " B"],
    following: Int[Array, "B T"],
    num_top: Int[Array, ""],
) -> tuple[Pools, Float[Array, "most E"], Scored]:
    """As `prefill_chunk`, and what the logits say of the tokens `following`; `at_once`: positions that have logits at a
    time. The likeliest tokens are looked for if `num_top` is not 0.
    """
    backend = Extend(page_table, starts, counts, aligned=True, implementation=implementation)
    model = spec.merge(weights)
    hidden, pools = model(tokens, cos, sin, backend, pools)
    width = min(MAX_TOP_LOGPROBS, spec.config.vocab_size)

    def score(part: tuple[Float[Array, "n E"], Int[Array, " n"]]) -> Scored:
        logits, size = model.logits(part[0]), spec.config.vocab_size
        seen = (summarise if spec.layout is None else summarise_shares)(logits, part[1])

        def best() -> tuple[jax.Array, jax.Array]:
            return ranking.best(logits if spec.layout is None else gather_vocabulary(logits, size), width)

        none = jnp.zeros((len(logits), width), jnp.float32), jnp.zeros((len(logits), width), jnp.int32)
        top, ids = jax.lax.cond(num_top > 0, best, lambda: none)
        return Scored(seen.asked - seen.normaliser, ids, top - seen.normaliser[:, None])

    size = tokens.size
    length = min(at_once, size)
    pad = -size % length
    parts = (
        jnp.pad(hidden.reshape(size, -1), ((0, pad), (0, 0))).reshape(-1, length, hidden.shape[-1]),
        jnp.pad(following.reshape(size), (0, pad)).reshape(-1, length),
    )
    scored = jax.lax.map(score, parts)
    whole = (each.reshape(-1, *each.shape[2:])[:size].reshape(*tokens.shape, *each.shape[2:]) for each in scored)
    return pools, _last(hidden, counts, most), Scored(*whole)


def _advance(
    rows: Rows, slots: Int[Array, " B"], on: Bool[Array, " B"], forced: Int[Array, " B"], sampled: Sampled
) -> Rows:
    """The rows after a token each: ended by an eos that was not forced, by the last token allowed, or by logits that
    are not finite.
    """
    ended = (forced < 0) & jnp.any(sampled.token[:, None] == rows.eos.at[slots].get(mode="fill", fill_value=-1), axis=1)
    remaining = rows.remaining.at[slots].get(mode="fill", fill_value=0) - 1
    alive = on & ~ended & (remaining > 0) & sampled.finite
    target = jnp.where(on, slots, rows.token.shape[0])  # out of range: dropped

    def put(field: jax.Array, values: jax.Array) -> jax.Array:
        return field.at[target].set(values, mode="drop")

    counts = rows.adjustments.counts.at[target, sampled.token].add(1, mode="drop")
    return rows._replace(
        token=put(rows.token, sampled.token),
        active=put(rows.active, alive),
        step=rows.step.at[target].add(1, mode="drop"),
        remaining=put(rows.remaining, remaining),
        adjustments=rows.adjustments._replace(counts=counts),
    )


def _choose(
    spec: ModelSpec,
    logits: Float32[Array, "B share"],
    rows: Rows,
    slots: Int[Array, " B"],
    forced: Int[Array, " B"],
    allowed: Bool[Array, "B V"] | None,
) -> Sampled:
    """Sample for the rows in `slots`; slots out of range are nobody's and ask for nothing."""
    arrays = SamplingArrays(
        *(
            field.at[slots].get(mode="fill", fill_value=value)
            for field, value in zip(rows.sampling, sampling_row(_PLAIN), strict=True)
        )
    )

    def adjustments() -> Adjustments:
        return Adjustments(*(field.at[slots].get(mode="clip") for field in rows.adjustments))

    return sample(
        logits, arrays, adjustments, rows.step.at[slots].get(mode="fill", fill_value=0), forced,
        rows.num_top.at[slots].get(mode="fill", fill_value=0), allowed,
        divided=None if spec.layout is None else spec.config.vocab_size,
    )  # fmt: skip


class Start(NamedTuple):
    """What a row begins with: scalars, but for `eos [ends]`, `in_prompt [V]` and the biases. `sampling`: the fields of
    `SamplingArrays`; `forced`: its first token, or −1.
    """

    slot: ArrayLike
    position: ArrayLike
    remaining: ArrayLike
    eos: ArrayLike
    num_top: ArrayLike
    sampling: tuple[ArrayLike, ...]
    in_prompt: ArrayLike
    biases: tuple[ArrayLike, ArrayLike]
    forced: ArrayLike


@_program(("spec", "width"), ("rows", "block"))
def start_row(
    spec: ModelSpec,
    width: int,
    weights: tuple[jax.Array, ...],
    rows: Rows,
    last: Float[Array, "B E"],
    index: Int[Array, ""],
    start: Start,
    allowed: Bool[Array, " V"] | None = None,
) -> tuple[Rows, Block]:
    """Put a sequence into a slot, and choose its first new token from the prefill's hidden states `last[index]`.

    `width`: rows that the product with the output head has, of which one counts. `allowed`: which tokens a guided row
    may begin with.
    """
    slot = start.slot
    rows = Rows(
        token=rows.token.at[slot].set(0),
        position=rows.position.at[slot].set(start.position),
        active=rows.active.at[slot].set(True),
        step=rows.step.at[slot].set(0),
        remaining=rows.remaining.at[slot].set(start.remaining),
        eos=rows.eos.at[slot].set(start.eos),
        num_top=rows.num_top.at[slot].set(start.num_top),
        sampling=SamplingArrays(
            *(field.at[slot].set(value) for field, value in zip(rows.sampling, start.sampling, strict=True))
        ),
        adjustments=Adjustments(
            *(
                field.at[slot].set(value)
                for field, value in zip(rows.adjustments, (start.in_prompt, 0, *start.biases), strict=True)
            )
        ),
    )
    hidden = jnp.zeros((width, last.shape[1]), last.dtype).at[0].set(last[index])
    logits = spec.merge(weights).logits(hidden)
    slots = jnp.full((width,), rows.token.shape[0], jnp.int32).at[0].set(slot)
    on = jnp.arange(width) == 0
    forced = jnp.full((width,), -1, jnp.int32).at[0].set(start.forced)
    if allowed is not None:
        allowed = jnp.ones((width, spec.config.vocab_size), bool).at[0].set(allowed)
    sampled = _choose(spec, logits, rows, slots, forced, allowed)
    rows = _advance(rows, slots, on, forced, sampled)
    block = Block.empty(1, width, spec.config.vocab_size)
    return rows, block.put(jnp.int32(0), on, sampled, jnp.zeros((width,), jnp.int32))


@_program(("spec", "plan"), ("pools", "rows", "block", "fed"))
def decode_block(
    spec: ModelSpec,
    plan: DecodePlan,
    weights: tuple[jax.Array, ...],
    pools: Pools,
    rows: Rows,
    slots: Int[Array, " B"],
    page_table: Int[Array, "B P"],
    cos: Float32[Array, "B steps half"],
    sin: Float32[Array, "B steps half"],
    forced: Int[Array, "B steps"],
    dense: Bool[Array, " B"],
    allowed: Bool[Array, "B V"] | None = None,
) -> tuple[Pools, Rows, Block, Int32[Array, " B"]]:
    """Up to `plan.steps` decode steps of the rows in `slots`, on the device; ends early with the last row.

    Slots out of range are nobody's. `dense`: rows that read all pages in every head (looked at if `plan.mixed`).
    `allowed`: which tokens may come next where rows are guided: then a block has one step.
    Returns also the tokens that the first step fed. Pools and rows are donated: the caller's are gone after the call.
    """
    model = spec.merge(weights)
    batch = slots.shape[0]

    def on(rows: Rows) -> Bool[Array, " B"]:
        return rows.active.at[slots].get(mode="fill", fill_value=False)

    def more(carry: Any) -> jax.Array:
        i, _, rows, _ = carry
        return (i < plan.steps) & jnp.any(on(rows))

    def step(carry: Any) -> Any:
        i, pools, rows, block = carry
        active = on(rows)
        token = rows.token.at[slots].get(mode="fill", fill_value=0)
        position = rows.position.at[slots].get(mode="fill", fill_value=0)
        backend = Decode(
            page_table, position, active, plan.head_map, plan.policy, plan.implementation,
            dense if plan.mixed else None, layout=spec.layout,
        )  # fmt: skip
        cos_i, sin_i = (jax.lax.dynamic_slice_in_dim(table, i, 1, axis=1) for table in (cos, sin))
        hidden, state = model(token[:, None], cos_i, sin_i, backend, backend.start(pools))
        logits = model.logits(hidden[:, 0])
        forced_i = jax.lax.dynamic_index_in_dim(forced, i, axis=1, keepdims=False)
        sampled = _choose(spec, logits, rows, slots, forced_i, allowed)
        target = jnp.where(active, slots, rows.token.shape[0])
        rows = _advance(rows, slots, active, forced_i, sampled)
        rows = rows._replace(position=rows.position.at[target].add(1, mode="drop"))
        return i + 1, state.pools, rows, block.put(i, active, sampled, state.pages_read)

    fed = rows.token.at[slots].get(mode="fill", fill_value=0)
    empty = Block.empty(plan.steps, batch, spec.config.vocab_size)
    _, pools, rows, block = jax.lax.while_loop(more, step, (jnp.int32(0), pools, rows, empty))
    if spec.layout is not None:
        block = block._replace(pages_read=sum_over_devices(block.pages_read))
    return pools, rows, block, fed


@functools.partial(jax.jit, static_argnames=("layout",), donate_argnames=("pools",))
def copy_for_forks(layout: Layout | None, pools: Pools, sources: Int[Array, " n"], targets: Int[Array, " n"]) -> Pools:
    """`copy_pages` in place, on every device its heads."""
    if layout is None:
        return copy_pages(pools, sources, targets)
    return layout.run(copy_pages, (POOLS, EVERYWHERE, EVERYWHERE), POOLS, (pools, sources, targets))


@_program(("spec", "implementation"), "pools")
def correct_cache(
    spec: ModelSpec,
    implementation: str | None,
    weights: tuple[jax.Array, ...],
    pools: Pools,
    page_table: Int[Array, "C P"],
    fed: Int[Array, " B"],
    new: Int[Array, "T B"],
    which: Int[Array, " C"],
    cos: Float32[Array, "C T half"],
    sin: Float32[Array, "C T half"],
    starts: Int[Array, " C"],
) -> Pools:
    """Rewrite the cache of the last T tokens by a dense pass (LycheeDecode's cache correction), for C rows of a block.

    They are `fed` and all but the last of the block's `new` tokens. Rows that ended within the block are left alone,
    and so is an index past the block.
    """
    fed = fed.at[which].get(mode="fill", fill_value=NO_TOKEN)
    new = new.at[:, which].get(mode="fill", fill_value=NO_TOKEN)
    counts = jnp.where(jnp.all(new >= 0, axis=0), new.shape[0], 0).astype(jnp.int32)
    tokens = jnp.maximum(jnp.concatenate([fed[None], new[:-1]]).T, 0)
    backend = Extend(page_table, starts, counts, aligned=False, implementation=implementation)
    return spec.merge(weights)(tokens, cos, sin, backend, pools)[1]


@dataclasses.dataclass(frozen=True)
class _Watched:
    """A decode step that keeps the selection which every layer hands up."""

    decode: Decode

    def __call__(self, index: int, q: jax.Array, k: jax.Array, v: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """As the step does it."""
        inner, seen = state
        out, inner = self.decode(index, q, k, v, inner)
        return out, (inner, (*seen, inner.selection.pages))


@_program(("spec", "plan"), ("pools", "picks"))
def watch_step(
    spec: ModelSpec,
    plan: DecodePlan,
    weights: tuple[jax.Array, ...],
    pools: Pools,
    tokens: Int[Array, " B"],
    positions: Int[Array, " B"],
    active: Bool[Array, " B"],
    page_table: Int[Array, "B P"],
    cos: Float32[Array, "B 1 half"],
    sin: Float32[Array, "B 1 half"],
) -> tuple[Pools, Int32[Array, "L B K M"]]:
    """The pages that every layer hands up while `tokens` are fed. The pools get the tokens' keys and values.

    With a layout K counts places.
    """
    model = spec.merge(weights)
    backend = Decode(page_table, positions, active, plan.head_map, plan.policy, plan.implementation, layout=spec.layout)
    _, (state, seen) = model(tokens[:, None], cos, sin, _Watched(backend), (backend.start(pools), ()))
    return state.pools, jnp.stack(seen)
