"""From logits to the next token: penalties, biases, temperature, top-k, top-p, min-p, all in float32, a row its own.

Tokens are ranked by logit, equal logits by id (the lowest first). Every filter keeps the head of that ranking, so that
"the k best" are exactly k tokens also among ties, and greedy decoding is rank 0.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Int32, UInt32

from lychee_jax.engine import ranking
from lychee_jax.engine.sampling_params import MAX_LOGIT_BIASES, SamplingParams
from lychee_jax.engine.vocabulary import summarise, summarise_shares
from lychee_jax.parallel.layouts import gather_vocabulary

MAX_TOP_LOGPROBS = 20
_NO_ID = np.iinfo(np.int32).max
_FLOAT32_TINY = float(np.finfo(np.float32).tiny)


class SamplingArrays(NamedTuple):
    """The numbers of `SamplingParams`, an entry a row: other numbers compile nothing, and rows may differ."""

    temperature: Float32[Array, " B"]
    top_k: Int32[Array, " B"]
    top_p: Float32[Array, " B"]
    log_min_p: Float32[Array, " B"]
    repetition_penalty: Float32[Array, " B"]
    presence_penalty: Float32[Array, " B"]
    frequency_penalty: Float32[Array, " B"]
    num_biases: Int32[Array, " B"]
    seed: UInt32[Array, " B"]
    sample_index: Int32[Array, " B"]


class Adjustments(NamedTuple):
    """What changes single logits: tokens that the prompt holds, how often each is in the text so far, and biases.

    `bias_ids`: as many as `MAX_LOGIT_BIASES`, beyond the vocabulary where there are fewer.
    """

    in_prompt: Bool[Array, "B V"]
    counts: Int32[Array, "B V"]
    bias_ids: Int32[Array, "B biases"]
    bias_values: Float32[Array, "B biases"]


class Sampled(NamedTuple):
    """The tokens chosen, and what is reported of them.

    `logprob`: the natural log-softmax of the raw logits (before mask, penalties, temperature and filters) at the token.
    `greedy`: the token is the likeliest one (raw logits, the lowest id of equals). `finite`: all logits are, and a
    token could be chosen.
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
        np.float32(params.repetition_penalty), np.float32(params.presence_penalty),
        np.float32(params.frequency_penalty), np.int32(len(params.logit_bias)), np.uint32(params.seed),
        np.int32(sample_index),
    )  # fmt: skip


def bias_row(params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """Ids and values `[biases]` of one row, as `Adjustments` holds them."""
    ids, values = np.full((MAX_LOGIT_BIASES,), _NO_ID, np.int32), np.zeros((MAX_LOGIT_BIASES,), np.float32)
    for place, (token, value) in enumerate(params.logit_bias):
        ids[place], values[place] = token, value
    return ids, values


def sample(
    logits: Float32[Array, "B share"],
    arrays: SamplingArrays,
    adjustments: Callable[[], Adjustments],
    steps: Int[Array, " B"],
    forced: Int[Array, " B"],
    num_top: Int[Array, " B"],
    allowed: Bool[Array, "B V"] | None = None,
    *,
    divided: int | None = None,
) -> Sampled:
    """Choose one token a row.

    The randomness of a row depends on (seed, sample index, step) alone, never on the other rows or on the batch size.
    The noise belongs to token ids, so a filter changes the outcome only where it removes the token chosen without it.
    What no row asks for is not computed, and what one row asks for changes no other row. Where devices have shares of
    the logits, these travel only if a row asks for more than the likeliest token, or is guided.

    Args:
        logits: raw float32 logits, or the running device's share of them.
        arrays: what each row asked for.
        adjustments: gives what they depend on; called where they are computed, if any row asks for some.
        steps: index of the token to be chosen, from 0.
        forced: tokens that are taken whatever the logits say; −1: none.
        num_top: how many of the likeliest tokens each row wants to be told of.
        allowed: which tokens may be chosen, before anything else is looked at; None: all.
        divided: the size of the vocabulary, where every device of a layout has a share of it.
    """
    if divided is not None and allowed is not None:
        logits, divided = gather_vocabulary(logits, divided), None
    seen = summarise(logits, forced) if divided is None else summarise_shares(logits, forced)
    width = min(MAX_TOP_LOGPROBS, divided or logits.shape[-1])
    random, asks_top = arrays.temperature > 0.0, num_top > 0
    penalised = (arrays.presence_penalty != 0.0) | (arrays.frequency_penalty != 0.0)
    adjusted = (arrays.repetition_penalty != 1.0) | penalised | (arrays.num_biases > 0)
    no_top = jnp.zeros((logits.shape[0], width), jnp.float32), jnp.zeros((logits.shape[0], width), jnp.int32)

    def choose_from(logits: Float32[Array, "B V"], token: Int32[Array, " B"]) -> tuple[jax.Array, jax.Array]:
        token = jnp.where(forced >= 0, forced, token)
        return token, jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]

    def greedy() -> tuple[jax.Array, ...]:
        if allowed is None:
            token = jnp.where(forced >= 0, forced, seen.likeliest)
            return token, jnp.where(forced >= 0, seen.asked, seen.highest), *no_top
        return *choose_from(logits, jnp.argmax(open_to(logits), axis=-1).astype(jnp.int32)), *no_top

    def chosen() -> tuple[jax.Array, ...]:
        whole = logits if divided is None else gather_vocabulary(logits, divided)
        open_ = open_to(whole)
        scores = jax.lax.cond(jnp.any(adjusted), lambda: _adjust(open_, arrays, adjustments()), lambda: open_)
        best = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        drawn = jax.lax.cond(jnp.any(random), lambda: _draw(scores, arrays, steps), lambda: best)
        top = jax.lax.cond(jnp.any(asks_top), lambda: ranking.best(whole, width), lambda: no_top)
        return *choose_from(whole, jnp.where(random, drawn, best)), *top

    def open_to(logits: Float32[Array, "B V"]) -> Float32[Array, "B V"]:
        return logits if allowed is None else jnp.where(allowed, logits, -jnp.inf)

    # One condition for all that is rare: on a GPU each one makes the host wait for the device.
    rare = jnp.any(adjusted | random | asks_top)
    token, logit, top, top_ids = jax.lax.cond(rare, chosen, greedy)
    finite = seen.finite if allowed is None else seen.finite & jnp.any(allowed, axis=-1)
    normaliser = seen.normaliser
    return Sampled(token, logit - normaliser, token == seen.likeliest, finite, top_ids, top - normaliser[:, None])


def _adjust(logits: Float32[Array, "B V"], arrays: SamplingArrays, adjustments: Adjustments) -> Float32[Array, "B V"]:
    """Sums come after the factor, which could otherwise undo a bias that forbids a token."""
    in_prompt, counts, bias_ids, bias_values = adjustments
    factor = arrays.repetition_penalty[:, None]
    in_text = counts > 0
    scores = jnp.where(in_prompt | in_text, jnp.where(logits > 0, logits / factor, logits * factor), logits)
    scores -= arrays.frequency_penalty[:, None] * counts.astype(jnp.float32)
    scores -= jnp.where(in_text, arrays.presence_penalty[:, None], 0.0)
    row = jnp.arange(len(scores))[:, None]
    return scores.at[row, bias_ids].add(bias_values, mode="drop")


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
    filtered = ((arrays.top_k > 0) | (arrays.top_p < 1.0)) & (arrays.temperature > 0.0)
    kept = jax.lax.cond(
        jnp.any(filtered), lambda: _top_p(scaled, _top_k(scaled, arrays.top_k), arrays.top_p),
        lambda: jnp.ones(scaled.shape, bool),
    )  # fmt: skip
    # The best token survives every filter and its scaled score is 0, so min-p is a bound on scaled scores.
    kept &= scaled >= arrays.log_min_p[:, None]
    return jnp.argmax(jnp.where(kept, scaled + noise, -jnp.inf), axis=-1).astype(jnp.int32)


def _top_k(scaled: Float32[Array, "B V"], top_k: Int32[Array, " B"]) -> Bool[Array, "B V"]:
    most = jnp.where(top_k > 0, top_k.astype(jnp.float32), jnp.inf)
    return ranking.head(scaled, jnp.ones_like(scaled), most)


def _top_p(scaled: Float32[Array, "B V"], kept: Bool[Array, "B V"], top_p: Float32[Array, " B"]) -> Bool[Array, "B V"]:
    """Which of those `kept` survive: the fewest likeliest whose probabilities sum to at least p. Rank 0 always does."""
    weights = jnp.where(kept, jnp.exp(scaled), 0.0)
    least = jnp.maximum(top_p * jnp.sum(weights, axis=-1), _FLOAT32_TINY)
    # At p = 1 rounding in the sum must not cut the tail off.
    return kept & ranking.head(scaled, weights, jnp.where(top_p < 1.0, least, jnp.inf))
