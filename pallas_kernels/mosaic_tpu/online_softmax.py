"""Attention of one KV head, a step of tokens at a time: running maximum, normalizer and accumulator.

The blocks of a step keep states of their own, so that the compiler can overlap one's chain of multiply, maximum,
exponential and multiply with another's; they are merged by log-sum-exp when the head ends.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.mosaic_tpu.launch import Launch
from pallas_kernels.mosaic_tpu.page_scores import block_page_scores
from pallas_kernels.xla.decode import MASKED


def accumulate(launch: Launch, query, buffer, left, fresh, running_max, normalizer, acc) -> list[Any]:
    """Fold a step into the blocks' states, all of them at once, from nothing where `fresh`.

    `buffer [step_pages, page_size, 2H]` has `left` valid tokens, and finite values behind them. Returns the columns of
    `block_page_scores`, block after block.
    """
    precision = jax.lax.Precision.HIGHEST if launch.exact else jax.lax.Precision.DEFAULT
    # The scale is folded into the exponent: 2^((s − max) · scale · log2 e).
    factor = launch.scale * math.log2(math.e)
    shape = (launch.block_tokens, launch.width)
    blocks = range(launch.config.step_blocks)

    def lanes(block, first):
        return buffer[pl.ds(block * launch.block_pages, launch.block_pages), :, pl.ds(first, launch.width)].reshape(
            shape
        )

    def left_of(block):
        return left - block * launch.block_tokens

    scores = [
        jax.lax.dot_general(
            query, lanes(block, 0), (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )
        for block in blocks
    ]
    position = jax.lax.broadcasted_iota(jnp.int32, scores[0].shape, 1)
    masked = [jnp.where(position < left_of(block), s, MASKED) for block, s in enumerate(scores)]
    old = [jnp.where(fresh, MASKED, running_max[block]) for block in blocks]
    new = [jnp.maximum(o, jnp.max(s, axis=1, keepdims=True)) for o, s in zip(old, masked, strict=True)]
    columns = [
        column
        for block in blocks
        for column in ([] if launch.scores is None else block_page_scores(launch, scores[block], left_of(block)))
    ]
    weights = [jnp.exp2((s - n[:, :1]) * factor) for s, n in zip(masked, new, strict=True)]
    products = [
        jax.lax.dot_general(
            w.astype(buffer.dtype),
            lanes(block, 2 * launch.head_dim - launch.width),
            (((1,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        for block, w in enumerate(weights)
    ]
    for block in blocks:
        shrink = jnp.exp2((old[block] - new[block]) * factor)
        added = jnp.sum(weights[block], axis=1, keepdims=True)
        running_max[block] = new[block]
        normalizer[block] = jnp.where(fresh, 0.0, normalizer[block]) * shrink + added
        acc[block] = jnp.where(fresh, 0.0, acc[block]) * shrink[:, : launch.width] + products[block]
    return columns


def merge_blocks(launch: Launch, running_max, normalizer, acc) -> tuple[jax.Array, jax.Array]:
    """The output `[queries, width]` and the natural log-sum-exp `[queries, 128]` of a head, from its blocks' states."""
    best = jnp.max(running_max[...], axis=0)
    weight = jnp.exp2((running_max[...] - best) * (launch.scale * math.log2(math.e)))
    # A block that saw no token has a maximum of MASKED and weights of 1.
    weight = jnp.where(running_max[...] > MASKED / 2, weight, 0.0)
    total = jnp.sum(normalizer[...] * weight, axis=0)
    mixed = jnp.sum(jnp.where(weight > 0.0, acc[...] * weight[..., : launch.width], 0.0), axis=0)
    lse = jnp.where(total > 0.0, best * launch.scale + jnp.log(total), MASKED)
    return mixed / jnp.maximum(total, 1e-30), lse
