"""Scores of pages from the attention scores of a step, while these are in registers."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.mosaic_tpu.chip import LANES, SUBLANES
from pallas_kernels.mosaic_tpu.launch import Launch
from pallas_kernels.xla.decode import MASKED


def block_page_scores(launch: Launch, scores: jax.Array, left: jax.Array) -> list[jax.Array]:
    """Scores of a KV block's pages as columns: column h, sublane i is the page of tile i at lanes h · page_size.

    `scores [G, block_tokens]` are not scaled and not masked; the first `left` tokens count.
    """
    tiles = launch.block_tokens // LANES
    shape = (max(tiles, SUBLANES), LANES)
    sublane = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    mean = jnp.zeros(shape, jnp.float32)
    for tile in range(tiles):
        summed = jnp.sum(scores[:, tile * LANES : (tile + 1) * LANES], axis=0, keepdims=True)
        mean = jnp.where(sublane == tile, summed, mean)
    mean = mean * (launch.scale / launch.groups)
    mean = jnp.where(sublane * LANES + lane < left, mean, MASKED)
    columns = []
    for first in range(0, LANES, launch.page_size):
        inside = (lane >= first) & (lane < first + launch.page_size)
        best = jnp.max(jnp.where(inside, mean, MASKED), axis=1, keepdims=True)
        if launch.scores == "lse":
            normalizer = jnp.sum(jnp.where(inside, jnp.exp(mean - best), 0.0), axis=1, keepdims=True)
            best = best + jnp.log(normalizer)
        columns.append(best)
    return columns


def store_page_scores(launch: Launch, columns: list[jax.Array], step: jax.Array, scores: Any) -> None:
    """Turn the columns of a step's blocks into lanes of `scores [score_rows, 128]`, page after page."""
    per_tile = LANES // launch.page_size
    rows = max(1, launch.step_pages // LANES)
    shape = columns[0].shape[0], LANES
    sublane = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    offset = 0 if launch.step_pages >= LANES else jax.lax.rem(step * launch.step_pages, LANES)
    first = step * launch.step_pages // LANES
    used = launch.block_tokens // LANES
    for row in range(rows):
        placed = jnp.zeros(shape, jnp.float32)
        for index, column in enumerate(columns):
            block, part = divmod(index, per_tile)
            page = block * launch.block_pages + part - row * LANES
            if not -launch.block_pages < page < LANES:
                continue
            here = (lane - offset == sublane * per_tile + page) & (sublane < used)
            placed = jnp.where(here, column, placed)
        placed = jnp.sum(placed, axis=0, keepdims=True)
        if launch.step_pages < LANES:
            inside = (lane[:1] >= offset) & (lane[:1] < offset + launch.step_pages)
            placed = jnp.where(inside, placed, scores[pl.ds(first, 1), :])
        scores[pl.ds(first + row, 1), :] = placed
