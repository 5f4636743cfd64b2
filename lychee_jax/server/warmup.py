"""Which programs a server will need, found by rehearsing the requests that call for them."""

from __future__ import annotations

import bisect
import contextvars
import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

from lychee_jax.engine.engine import Engine
from lychee_jax.engine.grammar import Anything
from lychee_jax.engine.options import AttentionOptions, max_pages
from lychee_jax.engine.request import Request
from lychee_jax.errors import UserError

Part = Literal["plain", "guided", "scored"]


class Readiness:
    """Which programs are compiled: a request of a rare kind waits for its own, and nobody waits with it.

    A kind is an attention, and what of it: "plain", or "guided", blocks of one step, which all rows share while a
    guided one decodes. "scored" are the programs that read prompts for their log-probabilities, whatever the attention.
    """

    def __init__(self, engine: Engine, attention: AttentionOptions) -> None:
        """`attention`: of requests that name none."""
        self._engine, self._attention = engine, attention
        self._kinds: dict[tuple[AttentionOptions, Part], Future[list[Future[Any]]]] = {}
        # One thread, so that programs are compiled in the order in which they were asked for.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rehearse")
        self._guided = False

    def begin(self, attention: AttentionOptions, part: Part) -> Future[list[Future[Any]]]:
        """Find what this kind needs, and compile it, in the background; the result has a future for each program."""
        kind = attention, part
        if kind not in self._kinds:
            # What is set for this context, an interpreter of kernels say, is set for that thread, too.
            self._kinds[kind] = self._pool.submit(contextvars.copy_context().run, self._prepare, attention, part)
        return self._kinds[kind]

    def is_ready(self, request: Request) -> bool:
        """Whether nothing is left to be compiled for this request, alone or beside others; begins what is missing.

        Raises:
            Exception: what the compiler has raised.
        """
        attention, default = request.attention, self._attention
        assert isinstance(attention, AttentionOptions)
        asked = [self.begin(attention, "plain")]
        if not self._engine.options.correct_every:
            self.begin(attention, "guided")
        self._guided |= request.grammar is not None
        if self._guided:
            asked += [future for (_, part), future in self._kinds.items() if part == "guided"]
        if request.prompt_logprobs is not None:
            asked.append(self.begin(default, "scored"))
        programs = [each for future in asked if future.done() for each in future.result()]
        for program in programs:
            if program.done():
                program.result()
        return all(future.done() for future in [*asked, *programs])

    def _prepare(self, attention: AttentionOptions, part: Part) -> list[Future[Any]]:
        engine, changes = self._engine, dict[str, Any]()
        if part == "guided":
            changes["grammar"] = Anything(engine.spec.config.vocab_size)
        if part == "scored":
            changes["prompt_logprobs"] = 0
        groups = _prompts(engine, attention) if part == "scored" else rehearsals(engine, attention)
        return [
            future
            for requests in groups
            for future in engine.prepare([dataclasses.replace(request, **changes) for request in requests])
        ]


def warm_up(engine: Engine, attention: AttentionOptions) -> Readiness:
    """Compile what requests of this attention can need, side by side, and run one of them.

    What only guided requests need, and those that ask for log-probabilities of their prompts, is compiled in the
    background after that: it is as much again, and tracing is one thread's work at a time. Other attention is compiled
    when it is asked for.

    Raises:
        UserError: not even a page of cache fits into the memory.
    """
    if engine.max_tokens < 2:
        raise UserError("the KV cache has no room: give it more with --cache-memory")
    readiness = Readiness(engine, attention)
    for future in readiness.begin(attention, "plain").result():
        future.result()
    engine.add_request(Request("warm-up", (0,), 2, attention=attention))
    while engine.has_work:
        engine.step()
    if not engine.options.correct_every:
        readiness.begin(attention, "guided")
    readiness.begin(attention, "scored")
    return readiness


def rehearsals(engine: Engine, attention: AttentionOptions) -> Iterator[list[Request]]:
    """Groups of requests that come together: every prefill program, and every decode program of every batch."""
    yield from _prompts(engine, attention)
    if engine.options.max_num_seqs > 1 and engine.max_tokens > 2:
        yield [Request("0", (0,), 2, attention=attention), Request("1", (0,), 2, attention=attention, fork_of="0")]
    page_size, most = engine.options.page_size, engine.max_tokens
    batches = _batches(engine)
    for low, high in _widths(engine):
        lengths = range(low, min(high * page_size, most))
        if not lengths:
            continue
        # Rows read densely up to a length, and by roles beyond it.
        dense_below = engine.config.dense_below
        edge = bisect.bisect_left(
            lengths, True, key=lambda length: not attention.takes_dense_steps(length + 1, dense_below)
        )
        kinds = [[lengths[0]]] if edge else []
        if edge < len(lengths):
            kinds.append([lengths[edge]])
            if attention.takes_dense_steps(2, dense_below):
                kinds.append([1, lengths[edge]])
        for kind in kinds:
            for rows in batches:
                prompts = [kind[min(row, len(kind) - 1)] for row in range(max(rows, len(kind)))]
                yield _together(engine, attention, prompts)


def _together(engine: Engine, attention: AttentionOptions, lengths: Sequence[int]) -> list[Request]:
    """Rows that decode until the last one of them does; their prompts begin alike, so that little is read."""
    unit = engine.config.chunks(engine.options.page_size).unit
    steps = (engine.options.correct_every or engine.config.block_steps) * (len(lengths) + max(lengths) // unit + 3)
    return [
        Request(str(row), (0,) * length, min(steps, engine.max_tokens - length), attention=attention)
        for row, length in enumerate(lengths)
    ]


def _prompts(engine: Engine, attention: AttentionOptions) -> Iterator[list[Request]]:
    """Different prompts of one length, as many as a program reads, for each size of chunks."""
    config, page_size = engine.config, engine.options.page_size
    chunks, most = config.chunks(page_size), engine.max_tokens
    sizes = {chunks.padded(min(count, most - 1)): min(count, most - 1) for count in _powers(page_size, chunks.size(0))}
    for padded, length in sizes.items():
        rows = 1
        while rows == 1 or (rows <= config.prefill_rows and rows * padded <= config.prefill_tokens):
            together = min(rows, engine.options.max_num_seqs)
            vocabulary = engine.spec.config.vocab_size
            yield [Request(str(row), (row % vocabulary,) * length, 1, attention=attention) for row in range(together)]
            rows *= config.batch_factor


def _powers(first: int, last: int) -> Iterator[int]:
    while first < last:
        yield first
        first *= 2
    yield last


def _batches(engine: Engine) -> list[int]:
    """The least number of rows of each decode batch."""
    most = engine.options.max_num_seqs
    buckets = {engine.config.batch_bucket(rows, most): rows for rows in range(most, 0, -1)}
    return sorted(buckets.values())


def _widths(engine: Engine) -> list[tuple[int, int]]:
    """Of each page table: the least length of a prompt that needs it, and its columns."""
    page_size = engine.options.page_size
    widest = max_pages(engine.max_model_len, page_size)
    columns = sorted({engine.config.table_bucket(1 << power, widest) for power in range(widest.bit_length())})
    before = [0, *columns[:-1]]
    return [(max(1, low * page_size), high) for low, high in zip(before, columns, strict=True)]
