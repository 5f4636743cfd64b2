"""Which prompt chunk is read next, and which rows decode: host only, pure Python, tested without JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

from lychee_jax.cache.allocator import Allocator
from lychee_jax.engine.request import Request


@dataclasses.dataclass(frozen=True)
class ChunkSizes:
    """How prompts are cut, in tokens: a function of the start position alone, never of prompt length or company.

    A chunk that starts at `start` holds at most `limit(start)` tokens, where the limit of the first rung whose `until`
    lies beyond `start` counts; it ends where a power of two times `unit` is reached, so that a prompt of which a
    prefix is cached meets the same chunks: the size is the largest unit · 2^n that is at most the limit and divides
    `start`. (`unit`: about 512 tokens, whole pages.)
    """

    page_size: int
    unit: int
    rungs: tuple[tuple[int, int], ...]  # (until, limit), ascending; the last one's `until` is beyond every prompt

    def size(self, start: int) -> int:
        """Tokens of the chunk at `start`, a multiple of the unit."""
        raise NotImplementedError

    def padded(self, count: int) -> int:
        """What a chunk with `count` real tokens is padded to: pages, a power of two of them up to the unit, then
        units, a power of two of them."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """Numbers of the scheduler: rows, steps of a block, chunks, and which prefill programs there are."""

    max_num_seqs: int
    block_steps: int
    chunks: ChunkSizes
    prefill_rows: int = 1  # chunks that may share a program
    prefill_tokens: int = 0  # … as long as rows · padded tokens stay within this


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens `start … start + count` of a prompt; `last`: its final ones, after which the row decodes."""

    request: Request
    slot: int
    pages: tuple[int, ...]
    start: int
    count: int
    last: bool


@dataclasses.dataclass(frozen=True)
class PrefillWork:
    """Chunks for one prefill program, each padded to `tokens`."""

    chunks: tuple[Chunk, ...]
    tokens: int


@dataclasses.dataclass(frozen=True)
class DecodeRow:
    """A row of a decode block. Its newest token, not yet fed, goes to `position`; `step`: index of the next new token."""

    request: Request
    slot: int
    pages: tuple[int, ...]
    position: int
    step: int


@dataclasses.dataclass(frozen=True)
class DecodeWork:
    """Rows of one decode block; all have the same `attention`."""

    attention: Hashable
    rows: tuple[DecodeRow, ...]


@dataclasses.dataclass(frozen=True)
class Work:
    """What is sent next, in this order: page copies of forks, one prefill program, a decode block a group of rows."""

    copies: tuple[tuple[int, int], ...] = ()
    prefill: PrefillWork | None = None
    decode: tuple[DecodeWork, ...] = ()


class Scheduler:
    """First come, first served; a request is admitted when a slot is free and its pages can be reserved."""

    def __init__(self, config: SchedulerConfig, allocator: Allocator) -> None: ...

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            UserError: it can never fit (more pages than there are), or its id is taken.
        """

    def abort(self, request_id: str) -> bool:
        """Forget a request wherever it is, and free its pages; False if it is unknown."""
        raise NotImplementedError

    def finish(self, request_id: str) -> None:
        """The end of a running request was read: free its slot and its pages."""

    def schedule(self) -> Work:
        """Admit what fits, and say what to send next; counts it as sent."""
        raise NotImplementedError
