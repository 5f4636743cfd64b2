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
from pallas_kernels.mosaic_tpu.words import keys_of, nan_of, token_scales, unit, values_of
from pallas_kernels.xla.decode import MASKED


def accumulate(launch: Launch, query, buffers, left, fresh, running_max, normalizer, acc) -> list[Any]:
    """Fold a step into the blocks' states, all of them at once, from nothing where `fresh`.

    `buffers`: pages `[step_pages, page_size, 2H]` (of words: H), and their scales if there are any. `left` tokens are
    valid; pages are finite behind them. Returns the columns of `block_page_scores`, block after block.
    """
    precision = jax.lax.Precision.HIGHEST if launch.exact else jax.lax.Precision.DEFAULT
    # The scale is folded into the exponent: 2^((s − max) · scale · log2 e).
    factor = launch.scale * math.log2(math.e)
    shape = (launch.block_tokens, launch.width)
    blocks = range(launch.config.step_blocks)

    def lanes(block, first):
        pages = pl.ds(block * launch.block_pages, launch.block_pages)
        return buffers[0][pages, :, pl.ds(first, launch.width)].reshape(shape)

    def keys(block):
        return keys_of(launch, lanes(block, 0), query.dtype) if launch.quantized else lanes(block, 0)

    def values(block):
        if launch.quantized:
            return values_of(launch, lanes(block, 0), query.dtype)
        return lanes(block, 2 * launch.head_dim - launch.width)

    def left_of(block):
        return left - block * launch.block_tokens

    scores = [
        jax.lax.dot_general(
            query, keys(block), (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )
        for block in blocks
    ]
    value_scales = None
    if launch.scaled:
        each = [token_scales(launch, buffers[1], block * launch.block_pages, launch.block_pages) for block in blocks]
        key_scales, value_scales = zip(*each, strict=True)
        scores = [s * scale for s, scale in zip(scores, key_scales, strict=True)]
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
    scaled = weights
    if value_scales is not None:  # what is behind the last token may be NaN
        scaled = [jnp.where(position < left_of(block), w * value_scales[block], 0.0) for block, w in enumerate(weights)]
    products = [
        jax.lax.dot_general(
            w.astype(query.dtype), values(block), (((1,), (0,)), ((), ())), precision=precision,
            preferred_element_type=jnp.float32,
        )
        for block, w in enumerate(scaled)
    ]  # fmt: skip
    if launch.quantized == "fp8":
        products = [product + nan_of(lanes(block, 0)) for block, product in enumerate(products)]
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
    weight = weight[..., : launch.width]  # all lanes hold the same
    mixed = jnp.sum(jnp.where(weight > 0.0, acc[...] * weight, 0.0), axis=0)
    lse = jnp.where(total > 0.0, best * launch.scale + jnp.log(total), MASKED)
    return mixed * unit(launch) / jnp.maximum(total[:, : launch.width], 1e-30), lse
