"""From logits to the next token: repetition penalty, temperature, top-k, top-p, min-p, all in float32, a row its own.

Tokens are ranked by logit, equal logits by id (the lowest first). Every filter keeps the head of that ranking, so that
"the k best" are exactly k tokens also among ties, and greedy decoding is rank 0.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Int32, UInt32

from lychee_jax.engine.sampling_params import SamplingParams

MAX_TOP_LOGPROBS = 20
_FLOAT32_TINY = float(np.finfo(np.float32).tiny)


class SamplingArrays(NamedTuple):
    """The numbers of `SamplingParams`, an entry a row: other numbers compile nothing, and rows may differ."""

    temperature: Float32[Array, " B"]
    top_k: Int32[Array, " B"]
    top_p: Float32[Array, " B"]
    log_min_p: Float32[Array, " B"]
    repetition_penalty: Float32[Array, " B"]
    seed: UInt32[Array, " B"]
    sample_index: Int32[Array, " B"]


class Sampled(NamedTuple):
    """The tokens chosen, and what is reported of them.

    `logprob`: the natural log-softmax of the raw logits (before penalty, temperature and filters) at the token.
    `greedy`: the token is the likeliest one (raw logits, the lowest id of equals). `finite`: all logits are.
    `top_ids`, `top_logprobs`: the likeliest tokens, if any row wants some; else zeros.
    """

    token: Int32[Array, " B"]
    logprob: Float32[Array, " B"]
    greedy: Bool[Array, " B"]
    finite: Bool[Array, " B"]
    top_ids: Int32[Array, "B top"]
    top_logprobs: Float32[Array, "B top"]


def sampling_row(params: SamplingParams, sample_index: int = 0) -> tuple[np.number, ...]:
    """The fields of `SamplingArrays` for one row, as NumPy scalars. A subnormal temperature is greedy: dividing by it
    would give NaN.
    """
    temperature = params.temperature if params.temperature >= _FLOAT32_TINY else 0.0
    log_min_p = math.log(params.min_p) if params.min_p > 0 else -math.inf
    return (
        np.float32(temperature), np.int32(params.top_k), np.float32(params.top_p), np.float32(log_min_p),
        np.float32(params.repetition_penalty), np.uint32(params.seed), np.int32(sample_index),
    )  # fmt: skip


def sample(
    logits: Float32[Array, "B V"],
    arrays: SamplingArrays,
    seen: Bool[Array, "B V"],
    steps: Int[Array, " B"],
    forced: Int[Array, " B"],
    num_top: Int[Array, " B"],
) -> Sampled:
    """Choose one token a row.

    The randomness of a row depends on (seed, sample index, step) alone, never on the other rows or on the batch size.
    The noise belongs to token ids, so a filter changes the outcome only where it removes the token chosen without it.
    What no row asks for is not computed, and what one row asks for changes no other row.

    Args:
        logits: raw float32 logits.
        arrays: what each row asked for.
        seen: which tokens occur in the row's prompt or its text so far.
        steps: index of the token to be chosen, from 0.
        forced: tokens that are taken whatever the logits say; −1: none.
        num_top: how many of the likeliest tokens each row wants to be told of.
    """
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)  # argmax returns the first of equals
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    width = min(MAX_TOP_LOGPROBS, logits.shape[-1])
    penalised, random = arrays.repetition_penalty != 1.0, arrays.temperature > 0.0

    def greedy() -> tuple[jax.Array, jax.Array, jax.Array]:
        shape = (logits.shape[0], width)
        return likeliest, jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

    def chosen() -> tuple[jax.Array, jax.Array, jax.Array]:
        scores = jax.lax.cond(
            jnp.any(penalised), lambda: _penalise(logits, seen, arrays.repetition_penalty), lambda: logits
        )
        best = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        drawn = jax.lax.cond(jnp.any(random), lambda: _draw(scores, arrays, steps), lambda: best)
        values, ids = jax.lax.top_k(logits, width)
        return jnp.where(random, drawn, best), ids.astype(jnp.int32), values - normaliser

    # One condition for all that is rare: on a GPU each one makes the host wait for the device.
    rare = jnp.any(penalised | random | (num_top > 0))
    token, top_ids, top_logprobs = jax.lax.cond(rare, chosen, greedy)
    token = jnp.where(forced >= 0, forced, token)
    logprob = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - normaliser[:, 0]
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    return Sampled(token, logprob, token == likeliest, finite, top_ids, top_logprobs)


def _penalise(
    logits: Float32[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float32[Array, " B"]
) -> Float32[Array, "B V"]:
    factor = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / factor, logits * factor), logits)


def _gumbel(arrays: SamplingArrays, steps: Int[Array, " B"], vocab_size: int) -> Float32[Array, "B V"]:
    def noise(seed: UInt32[Array, ""], index: Int[Array, ""], step: Int[Array, ""]) -> Float32[Array, " V"]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), step)
        return jax.random.gumbel(key, (vocab_size,), jnp.float32)

    return jax.vmap(noise)(arrays.seed, arrays.sample_index, steps)


def _draw(scores: Float32[Array, "B V"], arrays: SamplingArrays, steps: Int[Array, " B"]) -> Int32[Array, " B"]:
    """Gumbel-max: the argmax of log p + noise over the survivors is a draw from their renormalised distribution."""
    temperature = jnp.where(arrays.temperature > 0.0, arrays.temperature, 1.0)[:, None]
    # The maximum is taken off first: a tiny temperature then sends the others to -inf instead of everything to NaN.
    scaled = (scores - jnp.max(scores, axis=-1, keepdims=True)) / temperature
    noise = _gumbel(arrays, steps, scores.shape[-1])
    # The best token survives every filter and its scaled score is 0, so min-p is a bound on scaled scores.
    least = arrays.log_min_p[:, None]
    plain = jnp.argmax(jnp.where(scaled >= least, scaled + noise, -jnp.inf), axis=-1).astype(jnp.int32)
    filtered = ((arrays.top_k > 0) | (arrays.top_p < 1.0)) & (arrays.temperature > 0.0)

    def ranked() -> jax.Array:
        ids = jax.lax.broadcasted_iota(jnp.int32, scaled.shape, 1)
        negated, order, moved = jax.lax.sort((-scaled, ids, noise), num_keys=2)
        kept = _top_k(-negated, arrays.top_k)
        kept = jnp.where(_top_p(kept, arrays.top_p), kept, -jnp.inf)
        kept = jnp.where(kept >= least, kept + moved, -jnp.inf)
        return jnp.take_along_axis(order, jnp.argmax(kept, axis=-1, keepdims=True), axis=-1)[:, 0]

    return jnp.where(filtered, jax.lax.cond(jnp.any(filtered), ranked, lambda: plain), plain)


def _top_k(ranked: Float32[Array, "B V"], top_k: Int32[Array, " B"]) -> Float32[Array, "B V"]:
    rank = jax.lax.broadcasted_iota(jnp.int32, ranked.shape, 1)
    return jnp.where((rank < top_k[:, None]) | (top_k == 0)[:, None], ranked, -jnp.inf)


def _top_p(ranked: Float32[Array, "B V"], top_p: Float32[Array, " B"]) -> Bool[Array, "B V"]:
    """Which ranks survive: those whose better ranks do not yet hold mass p. Rank 0 always does."""
    mass = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1)
    before = jnp.pad(mass[:, :-1], ((0, 0), (1, 0)))
    least = top_p[:, None]
    # At p = 1 rounding in the sum must not cut the tail off.
    return ((before < least) | (before == 0) | (least >= 1)) & (ranked > -jnp.inf)
