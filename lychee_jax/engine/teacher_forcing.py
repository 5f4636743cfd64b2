"""Given tokens through the decode path, one at a time: what perplexity under hybrid attention needs, and prompts whose
last stretch is to be read as it would be generated.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.cache.allocator import pages_for
from lychee_jax.engine.compile_timer import Caller
from lychee_jax.engine.engine import BLOCK_STEPS, Engine, takes_dense_steps
from lychee_jax.engine.options import GenerateOptions
from lychee_jax.engine.outputs import Prefilled
from lychee_jax.engine.programs import DecodePlan, Fed, correct_cache, feed_block
from lychee_jax.engine.sampling import SamplingParams
from lychee_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Forced:
    """What feeding gave: the cache with the tokens in it, and each row's natural log-probabilities of its tokens.

    `greedy` says of each token whether greedy decoding would have chosen it after the tokens before it. `pages_read`
    and `pages_held` are summed over tokens, layers and KV heads: what was read, and what dense reads.
    """

    filled: Prefilled
    logprobs: list[list[float]]
    greedy: list[list[bool]]
    pages_read: int
    pages_held: int


def feed(
    engine: Engine,
    filled: Prefilled,
    tokens: Sequence[Sequence[int]],
    options: GenerateOptions,
    *,
    keep: bool = False,
    on_step: Callable[[int], None] | None = None,
) -> Forced:
    """Feed each row's tokens through decode steps in the options' attention; the result decodes on from there.

    Args:
        engine: whose prompts are in the cache.
        filled: the prompts; consumed, unless `keep` copies the cache first.
        tokens: one row a prompt; rows may differ in length and be empty.
        options: attention, heads, policy, page size and cache correction count, all else does not.
        keep: leave `filled` as it is, to be fed or decoded again.
        on_step: called with the steps that were done since the last call.

    Raises:
        UserError: a row too many or too few, ids outside the vocabulary, more tokens than the cache has room for.
    """
    rows = [list(row) for row in tokens]
    if len(rows) != len(filled.prompts):
        raise UserError(f"there are {len(filled.prompts)} prompts, but {len(rows)} rows of tokens to feed")
    longest = max(len(row) for row in rows)
    if longest > filled.capacity:
        raise UserError(f"the cache has room for {filled.capacity} new tokens; {longest} were to be fed")
    if longest == 0:
        return Forced(filled, [[] for _ in rows], [[] for _ in rows], 0, 0)
    engine.check_prompts([row for row in rows if row], 0)
    pools = engine.claim(filled, options, keep=keep)
    width = filled.page_table.shape[0]
    idle = width - len(rows)
    begins = np.asarray([len(prompt) for prompt in filled.prompts] + [0] * idle)
    counts = np.asarray([len(row) for row in rows] + [0] * idle)
    size = options.correct_every or BLOCK_STEPS
    padded = np.zeros((width, -(-longest // size) * size), np.int32)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row

    call, last = Caller(engine.dtype), filled.last
    logprobs = np.zeros((padded.shape[1], width), np.float32)
    greedy = np.zeros((padded.shape[1], width), bool)
    read = np.zeros((padded.shape[1], width), np.int64)
    for first in range(0, longest, size):
        positions = begins[:, None] + first + np.arange(size)
        cos, sin = engine.rotary(positions, positions + 1)
        block, left = padded[:, first : first + size], np.clip(counts - first, 0, size)
        dense = takes_dense_steps(options, begins + first + 1)
        fed: list[Fed] = []
        for is_dense in (True, False):
            chosen = np.where(dense == is_dense, left, 0)
            if not chosen.any():
                continue
            heads = None if is_dense else (options.heads or HeadMap.all(engine.config))
            plan = DecodePlan(heads, options.policy, SamplingParams().kind, size, options.implementation)
            pools, last, each = call(
                feed_block, engine.spec, plan, engine.weights, pools, last, block,
                jnp.asarray(positions[:, 0], jnp.int32), jnp.asarray(chosen, jnp.int32), filled.page_table, cos, sin,
            )  # fmt: skip
            fed.append(each)
        if options.correct_every and (left == size).any():
            pools = call(
                correct_cache, engine.spec, engine.weights, pools, filled.page_table, jnp.asarray(block), cos, sin,
                jnp.asarray(positions[:, 0], jnp.int32), jnp.asarray(left == size), options.extend_implementation,
            )  # fmt: skip
        logprobs[first : first + size] = np.sum([np.asarray(each.logprobs) for each in fed], axis=0)
        greedy[first : first + size] = np.any([np.asarray(each.greedy) for each in fed], axis=0)
        read[first : first + size] = np.sum([np.asarray(each.pages_read) for each in fed], axis=0)
        if on_step is not None:
            on_step(min(size, longest - first))

    after = Prefilled(
        [[*prompt, *row] for prompt, row in zip(filled.prompts, rows, strict=True)], filled.page_size,
        filled.capacity - longest, pools, filled.page_table, last, filled.prefill_s, filled.compile_s + call.seconds,
    )  # fmt: skip
    return Forced(
        after,
        [logprobs[: len(row), index].tolist() for index, row in enumerate(rows)],
        [greedy[: len(row), index].tolist() for index, row in enumerate(rows)],
        int(read.sum()),
        _held(engine, filled, rows),
    )


def _held(engine: Engine, filled: Prefilled, rows: list[list[int]]) -> int:
    """Pages of all heads that are in the cache while each token is fed, itself included."""
    heads = engine.config.num_layers * engine.config.num_kv_heads
    lengths: Any = (
        len(prompt) + i + 1 for prompt, row in zip(filled.prompts, rows, strict=True) for i in range(len(row))
    )
    return heads * sum(pages_for(length, filled.page_size) for length in lengths)
