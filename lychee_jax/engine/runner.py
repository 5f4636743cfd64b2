"""The device's side of the engine: sends programs in the order that the scheduler says, and returns before they ran."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.cache.pages import Pools, make_pools
from lychee_jax.engine.compile_timer import Programs
from lychee_jax.engine.options import AttentionOptions, EngineConfig, EngineOptions, max_pages
from lychee_jax.engine.programs import (
    DecodePlan,
    Rows,
    Start,
    copy_for_forks,
    correct_cache,
    decode_block,
    make_rows,
    prefill_chunk,
    score_chunk,
    start_row,
)
from lychee_jax.engine.request import MAX_EOS_IDS, Request
from lychee_jax.engine.sampling import bias_row, sampling_row
from lychee_jax.engine.scheduler import DecodeWork, PrefillWork
from lychee_jax.models.rope import rotary_tables
from lychee_jax.models.spec import ModelSpec
from lychee_jax.parallel.layouts import POOLS
from lychee_jax.parallel.mesh import EVERYWHERE

_COPIES = 8  # pages that one program copies


@dataclasses.dataclass(frozen=True)
class SentBlock:
    """A block in flight, and whose rows are in its columns."""

    block: Any  # a Block; shapes where nothing is sent
    requests: tuple[Request, ...]
    first_steps: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class SentChunks:
    """Chunks on their way; `last` tells when they are read. `scored`: a `Scored`, if it was asked for."""

    work: PrefillWork
    last: Any
    scored: Any


class Runner:
    """Owns the pools and the rows' state; every method sends programs and returns at once."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: tuple[jax.Array, ...],
        options: EngineOptions,
        config: EngineConfig,
        *,
        num_pages: int,
        max_model_len: int,
    ):
        self._set_up(spec, weights, options, config, num_pages=num_pages, max_model_len=max_model_len)
        model = spec.config
        self.pools: Pools = self._made(self._make_pools, POOLS)
        self.rows: Rows = self._made(lambda: make_rows(self.slots, model.vocab_size, MAX_EOS_IDS), EVERYWHERE)
        self._empty_prompt: Any = self._made(lambda: jnp.zeros((model.vocab_size,), bool), EVERYWHERE)

    def _made(self, make: Callable[[], Any], parts: Any) -> Any:
        return make() if self.layout is None else self.layout.make(make, parts)

    def _make_pools(self) -> Pools:
        model = self.spec.config if self.layout is None else self.layout.whole(self.spec.config)
        return make_pools(model, self.num_pages, self.options.page_size, self.dtype, self.options.kv_dtype)

    def _set_up(
        self,
        spec: ModelSpec,
        weights: tuple[Any, ...],
        options: EngineOptions,
        config: EngineConfig,
        *,
        num_pages: int,
        max_model_len: int,
    ) -> None:
        """Everything but arrays."""
        self.spec, self.weights, self.layout = spec, weights, spec.layout
        self.options, self.config = options, config
        self.dtype = np.dtype(weights[0].dtype)
        self.slots = options.max_num_seqs
        self.max_pages = max_pages(max_model_len, options.page_size)
        self.num_pages = num_pages
        self.blocks_sent = 0
        self.programs: Any = Programs(
            self.dtype, (spec, self.dtype, num_pages, options.page_size, options.kv_dtype, self.slots), self.layout
        )

    def rotary(self, positions: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines `[B, T, half]` at `positions [B, T]` of texts of `lengths` tokens."""
        model = self.spec.config
        return rotary_tables(model.rope, model.head_dim, model.max_position_embeddings, positions, lengths)

    def copy(self, copies: tuple[tuple[int, int], ...]) -> None:
        """Copy pages (source, target) of all layers."""
        for first in range(0, len(copies), _COPIES):
            pairs = copies[first : first + _COPIES]
            padded = np.full((2, _COPIES), -1, np.int32)
            padded[:, : len(pairs)] = np.asarray(pairs, np.int32).T
            self.pools = self.programs(copy_for_forks, _COPIES, (self.layout,), self.pools, padded[0], padded[1])

    def prefill(self, work: PrefillWork) -> tuple[SentChunks, list[SentBlock]]:
        """Read chunks, and start the rows whose prompts end with them."""
        rows = self._prefill_bucket(len(work.chunks))
        tokens = np.zeros((rows, work.tokens), np.int32)
        starts, counts = np.zeros((rows,), np.int32), np.zeros((rows,), np.int32)
        lengths = np.zeros((rows,), np.int64)
        for index, chunk in enumerate(work.chunks):
            prompt = chunk.request.prompt
            tokens[index, : chunk.count] = prompt[chunk.start : chunk.start + chunk.count]
            starts[index], counts[index], lengths[index] = chunk.start, chunk.count, len(prompt)
        cos, sin = self.rotary(starts[:, None] + np.arange(work.tokens), lengths)
        table = self._table([chunk.pages for chunk in work.chunks], rows, self.max_pages)
        reading = self.weights, self.pools, table, tokens, cos, sin, starts, counts
        size, scored = (rows, work.tokens), None
        static = self.spec, self.options.extend_implementation, self.prefill_rows
        if work.scored:
            # Float32; XLA's CPU backend holds up to three temporaries of their size.
            at_once = max(1, self.config.logit_bytes // (4 * 4 * self.spec.config.vocab_size))
            self.pools, last, scored = self.programs(
                score_chunk, size, (*static, at_once), *reading, *_what_follows(work, tokens.shape)
            )
        else:
            self.pools, last = self.programs(prefill_chunk, size, static, *reading)
        started = [
            self._start(row.request, row.slot, np.int32(index), last)
            for index, chunk in enumerate(work.chunks)
            if chunk.last
            for row in (chunk, *chunk.forks)
        ]
        return SentChunks(work, last, scored), started

    def _start(self, request: Request, slot: int, index: np.int32, last: Any) -> SentBlock:
        in_prompt: Any = self._empty_prompt  # only a repetition penalty looks at it
        if request.sampling.repetition_penalty != 1:
            in_prompt = np.zeros((self.spec.config.vocab_size,), bool)
            in_prompt[list(request.prompt)] = True
        eos = np.full((MAX_EOS_IDS,), -1, np.int32)
        eos[: len(request.eos_ids)] = request.eos_ids
        start = Start(
            np.int32(slot), np.int32(len(request.prompt)), np.int32(request.max_new_tokens), eos,
            np.int32(request.top_logprobs), sampling_row(request.sampling, request.sample_index), in_prompt,
            bias_row(request.sampling), np.int32(request.forced[0] if request.forced else -1),
        )  # fmt: skip
        allowed = self._allowed((request,), 1)[0] if request.grammar is not None else None
        self.rows, block = self.programs(
            start_row, (last.shape[0], allowed is not None), (self.spec, self.config.min_rows), self.weights, self.rows,
            last, index, start, allowed,
        )  # fmt: skip
        return SentBlock(_on_its_way(block), (request,), (0,))

    def decode(self, work: DecodeWork) -> SentBlock:
        """Send a block of decode steps, and the correction of what it wrote."""
        assert isinstance(work.attention, AttentionOptions)
        options, config, size = self.options, self.config, self.steps_of(work)
        count = len(work.rows)
        batch = config.batch_bucket(count, self.slots)
        pages = max(len(row.pages) for row in work.rows)
        table = self._table([row.pages for row in work.rows], batch, config.table_bucket(pages, self.max_pages))
        slots = np.full((batch,), self.slots, np.int32)
        slots[:count] = [row.slot for row in work.rows]
        begin = np.zeros((batch,), np.int64)
        begin[:count] = [row.position for row in work.rows]
        forced = np.full((batch, size), -1, np.int32)
        for index, row in enumerate(work.rows):
            given = row.request.forced[row.step : row.step + size]
            forced[index, : len(given)] = given
        dense = np.zeros((batch,), bool)
        dense[:count] = [work.attention.takes_dense_steps(row.position + 1, config.dense_below) for row in work.rows]
        plan = self.plan(work.attention, dense[:count], size)
        allowed = self._allowed(tuple(row.request for row in work.rows), batch) if work.guided else None
        positions = begin[:, None] + np.arange(size)
        cos, sin = self.rotary(positions, positions + 1)
        self.pools, self.rows, block, fed = self.programs(
            decode_block, (*table.shape, work.guided), (self.spec, plan), self.weights, self.pools, self.rows, slots,
            table, cos, sin, forced, dense, allowed,
        )  # fmt: skip
        if options.correct_every:
            at_once = config.correct_rows or batch
            for first in range(0, count, at_once):
                own = slice(first, first + at_once)
                self.pools = self.programs(
                    correct_cache, (batch, at_once, table.shape[1]), (self.spec, options.extend_implementation),
                    self.weights, self.pools, table[own], fed, block.tokens, np.arange(batch, dtype=np.int32)[own],
                    cos[own], sin[own], begin[own].astype(np.int32),
                )  # fmt: skip
        self.blocks_sent += 1
        steps = tuple(row.step for row in work.rows)
        return SentBlock(_on_its_way(block), tuple(row.request for row in work.rows), steps)

    @property
    def prefill_rows(self) -> int:
        """Rows of the largest program that reads prompts."""
        return self._prefill_bucket(min(self.config.prefill_rows, self.slots))

    def _prefill_bucket(self, count: int) -> int:
        """Rows of the smallest program that reads so many chunks."""
        rows = 1
        while rows < count:
            rows *= self.config.batch_factor
        return rows

    @property
    def block_steps(self) -> int:
        """Steps of a decode block."""
        return self.options.correct_every or self.config.block_steps

    def steps_of(self, work: DecodeWork) -> int:
        """Steps of this decode block."""
        return 1 if work.guided else self.block_steps

    def plan(self, attention: AttentionOptions, dense: np.ndarray, steps: int) -> DecodePlan:
        """Which decode program rows of this kind need; `dense`: which of them read everything."""
        heads = None if dense.all() else (attention.heads or HeadMap.all(self.spec.config))
        mixed = bool(dense.any()) and not bool(dense.all())
        return DecodePlan(heads, attention.policy, steps, self.options.implementation, mixed)

    def _allowed(self, requests: tuple[Request, ...], batch: int) -> np.ndarray:
        """Which tokens may come next `[batch, V]`."""
        allowed = np.ones((batch, self.spec.config.vocab_size), bool)
        for row, request in zip(allowed, requests, strict=False):  # rows beyond are idle
            if request.grammar is not None:
                row[:] = request.grammar.mask()
        return allowed

    def _table(self, rows: list[tuple[int, ...]], height: int, width: int) -> np.ndarray:
        # Entries past a row's need are never followed; page 0 keeps them inside the pool all the same.
        table = np.zeros((height, width), np.int32)
        for index, pages in enumerate(rows):
            table[index, : len(pages)] = pages
        return table


def _what_follows(work: PrefillWork, shape: tuple[int, ...]) -> tuple[np.ndarray, np.int32]:
    """The token after each, 0 after a prompt's last one; and how many likeliest tokens are asked for at most."""
    following = np.zeros(shape, np.int32)
    for row, chunk in zip(following, work.chunks, strict=False):
        tokens = chunk.request.prompt[chunk.start + 1 : chunk.start + 1 + chunk.count]
        row[: len(tokens)] = tokens
    return following, np.int32(max(chunk.request.prompt_logprobs or 0 for chunk in work.chunks))


def _on_its_way(block: Any) -> Any:
    """The block, its copy to the host begun; one of shapes as it is."""
    if block is None or isinstance(block.tokens, jax.ShapeDtypeStruct):
        return block
    for array in (block.tokens, block.logprobs, block.pages_read):
        array.copy_to_host_async()
    return block
