"""What a step must know of the logits of all tokens, also where every device has those of a share of the vocabulary."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int, Int32

from lychee_jax.parallel.layouts import first_token_here, gather


class Summary(NamedTuple):
    """Of each row's logits.

    `likeliest`: the id of the highest, the lowest id of equals, and `highest` its logit; `normaliser`: the log-sum-exp;
    `finite`: whether all are; `asked`: the logit of the token that was asked for.
    """

    likeliest: Int32[Array, " B"]
    highest: Float32[Array, " B"]
    normaliser: Float32[Array, " B"]
    finite: Bool[Array, " B"]
    asked: Float32[Array, " B"]


def summarise(logits: Float32[Array, "B V"], asked: Int[Array, " B"]) -> Summary:
    """Of rows that are here whole; ids `asked` below 0 ask for nothing."""
    own = jnp.take_along_axis(logits, jnp.maximum(asked, 0)[:, None], axis=-1)[:, 0]
    return Summary(
        jnp.argmax(logits, axis=-1).astype(jnp.int32),  # argmax returns the first of equals
        jnp.max(logits, axis=-1),
        jax.nn.logsumexp(logits, axis=-1),
        jnp.all(jnp.isfinite(logits), axis=-1),
        own,
    )


def summarise_shares(logits: Float32[Array, "B share"], asked: Int[Array, " B"]) -> Summary:
    """The same of rows that are divided among the devices of a layout: a few numbers a row travel, in one message."""
    share = logits.shape[-1]
    first = first_token_here(share)
    here = asked - first
    mine = (here >= 0) & (here < share)
    own = summarise(logits, jnp.where(mine, here, 0))
    bits = [
        own.likeliest + first,
        *(jax.lax.bitcast_convert_type(each, jnp.int32) for each in (own.highest, own.normaliser, own.asked)),
        own.finite.astype(jnp.int32),
        mine.astype(jnp.int32),
    ]
    likeliest, *numbers, finite, mine = jnp.moveaxis(gather(jnp.stack(bits)), 0, 1)  # each [devices, B]
    highest, normaliser, own_asked = (jax.lax.bitcast_convert_type(each, jnp.float32) for each in numbers)
    best = jnp.argmax(highest, axis=0)[None]  # shares lie in the order of ids
    return Summary(
        jnp.take_along_axis(likeliest, best, axis=0)[0],
        jnp.max(highest, axis=0),
        jax.nn.logsumexp(normaliser, axis=0),
        jnp.all(finite == 1, axis=0),
        jnp.sum(jnp.where(mine == 1, own_asked, 0.0), axis=0),
    )
