"""Which prompt chunk is read next, and which rows decode: host only, pure Python, tested without JAX."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Hashable

from lychee_jax.cache.allocator import Allocator, next_power_of_two, pages_for, prefix_keys
from lychee_jax.engine.request import Request
from lychee_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ChunkSizes:
    """How prompts are cut, in tokens: a function of the start position alone, never of prompt length or company.

    A chunk that starts at `start` holds at most `limit` tokens, that of the first rung whose `until` lies beyond
    `start`; it ends where a power of two times `unit` is reached, so that a prompt of which a prefix is cached meets
    the same chunks: the size is the largest unit · 2^n that is at most the limit and divides `start`.

    Attributes:
        page_size: tokens of a page.
        unit: tokens of the smallest chunk, whole pages; cached prefixes are reused up to a multiple of it.
        rungs: (until, limit), both ascending in `until`; the last limit counts for everything beyond, too.
        factor: between the sizes that programs have below the unit.
    """

    page_size: int
    unit: int
    rungs: tuple[tuple[int, int], ...]
    factor: int = 2

    def __post_init__(self) -> None:
        if self.unit < 1 or self.unit % self.page_size:
            raise ValueError(f"the unit must be whole pages of {self.page_size} tokens, not {self.unit} tokens")
        untils = [until for until, _ in self.rungs]
        if not untils or untils != sorted(untils) or any(limit < self.unit for _, limit in self.rungs):
            raise ValueError(f"rungs must ascend, with limits of at least {self.unit} tokens: {self.rungs}")

    def size(self, start: int) -> int:
        """Tokens of the chunk at `start`, a multiple of the unit; `start` is one, too."""
        limit = next((limit for until, limit in self.rungs if start < until), self.rungs[-1][1])
        size = self.unit
        while 2 * size <= limit and start % (2 * size) == 0:
            size *= 2
        return size

    def padded(self, count: int) -> int:
        """What a chunk with `count` real tokens is padded to.

        The unit, or a whole power of the factor below it; beyond the unit, a power of two of units.
        """
        if count <= self.unit:
            pages = self.unit // self.page_size
            while pages % self.factor == 0 and pages // self.factor * self.page_size >= count:
                pages //= self.factor
            return pages * self.page_size
        return self.unit * next_power_of_two(pages_for(count, self.unit))


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """Numbers of the scheduler: rows, steps of a block, chunks, and which prefill programs there are."""

    max_num_seqs: int
    block_steps: int
    chunks: ChunkSizes
    prefill_rows: int = 1  # chunks that may share a program
    prefill_tokens: int = 0  # … as long as rows · padded tokens stay within this


@dataclasses.dataclass(frozen=True)
class Fork:
    """A row that starts from another's prompt: its first token comes from the same logits, and it decodes next."""

    request: Request
    slot: int
    pages: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens `start … start + count` of a prompt; `last`: its final ones, after which the row decodes.

    The logits after the last chunk give the first new token of the row, and of each row in `forks`.
    """

    request: Request
    slot: int
    pages: tuple[int, ...]
    start: int
    count: int
    last: bool
    forks: tuple[Fork, ...] = ()


@dataclasses.dataclass(frozen=True)
class PrefillWork:
    """Chunks for one prefill program, each padded to `tokens`."""

    chunks: tuple[Chunk, ...]
    tokens: int

    @property
    def scored(self) -> bool:
        """Whether log-probabilities of these prompts are asked for, of all or of none."""
        return self.chunks[0].request.prompt_logprobs is not None


@dataclasses.dataclass(frozen=True)
class DecodeRow:
    """A row of a decode block. Its newest token, not yet fed, goes to `position`; `step`: index of the next new token.

    It takes part in the block's steps as long as `step` is below its request's `max_new_tokens`: more pages it does not
    have. A row whose text has ended in a block that the host has not read yet is still here; the device knows better.
    """

    request: Request
    slot: int
    pages: tuple[int, ...]
    position: int
    step: int


@dataclasses.dataclass(frozen=True)
class DecodeWork:
    """Rows of one decode block; all have the same `attention`. `guided`: it has one step, as some row is guided."""

    attention: Hashable
    rows: tuple[DecodeRow, ...]
    guided: bool = False


@dataclasses.dataclass(frozen=True)
class Work:
    """What is sent next, in this order: one prefill program, page copies of forks, a decode block a group of rows.

    A copy `(source, target)` takes the partial last page of a prompt that this very prefill program completes.
    """

    prefill: PrefillWork | None = None
    copies: tuple[tuple[int, int], ...] = ()
    decode: tuple[DecodeWork, ...] = ()

    def __bool__(self) -> bool:
        """Whether there is anything to send."""
        return self.prefill is not None or bool(self.decode)


@dataclasses.dataclass(eq=False)
class _Sequence:
    """A request and how far it was sent."""

    request: Request
    keys: list[bytes]  # of the full pages of its prompt
    parent: _Sequence | None  # whose prompt it waits for, to share its pages
    slot: int = -1
    pages: tuple[int, ...] = ()
    cached_tokens: int = 0
    sent: int = 0  # tokens of the prompt, cached ones included
    step: int = 0  # index of the next new token to be sent for
    unread: bool = False  # a guided row's newest token, on which its next step depends

    @property
    def length(self) -> int:
        return len(self.request.prompt)

    @property
    def scored(self) -> bool:
        """Log-probabilities of its prompt are asked for: it is read by other programs, and shares no pages."""
        return self.request.prompt_logprobs is not None


class Scheduler:
    """First come, first served; a request is admitted when a slot is free and its pages can be reserved.

    It is admitted when its first chunk can be sent and no earlier, and not while a chunk that is about to be sent would
    give it more of its prefix: prompts that begin alike and arrive together read their common part once.
    """

    def __init__(self, config: SchedulerConfig, allocator: Allocator) -> None:
        self._config = config
        self._allocator = allocator
        self._slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._waiting: OrderedDict[str, _Sequence] = OrderedDict()
        self._running: dict[str, _Sequence] = {}
        self._prefilling: dict[str, _Sequence] = {}  # of the running: their prompts are not sent to the end
        self._decoding: dict[str, _Sequence] = {}  # of the running: they have steps left to send

    @property
    def num_waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests with a slot: from admission until `finish` or `abort`."""
        return len(self._running)

    @property
    def awaits_tokens(self) -> bool:
        """Whether no row decodes before `received` was told of a guided one: its token should be read at once."""
        return any(sequence.unread for sequence in self._decoding.values())

    def received(self, request_id: str) -> None:
        """The newest token of a guided request was read, and its grammar knows it. Other ids are ignored."""
        if request_id in self._running:
            self._running[request_id].unread = False

    def cached_tokens(self, request_id: str) -> int:
        """How many tokens of a running request's prompt were not read, because their pages were known or shared."""
        return self._running[request_id].cached_tokens

    def add(self, request: Request) -> None:
        """Queue a request.

        A fork starts with its parent where that one's prompt ends. If that is not possible, because the parent is gone
        or decodes already, or because no slot or too few pages are free when its prompt was read, it is a request like
        any other.

        Raises:
            UserError: it can never fit (more pages than there are), or its id is taken.
            ValueError: a fork's prompt is not that of its parent.
        """
        name = request.fork_of if request.prompt_logprobs is None else None
        parent = None if name is None else self._running.get(name) or self._waiting.get(name)
        if parent is None:
            self._add(_Sequence(request, self._keys(request), parent=None))
            return
        if (request.prompt, request.cache_salt) != (parent.request.prompt, parent.request.cache_salt):
            raise ValueError(f"request {request.id!r} must have the prompt of {name!r} to be its fork")
        self._add(_Sequence(request, parent.keys or self._keys(request), parent.parent or parent))

    def abort(self, request_id: str) -> bool:
        """Forget a request wherever it is, and free its pages; False if it is unknown."""
        if self._waiting.pop(request_id, None) is not None:
            return True
        if request_id not in self._running:
            return False
        self.finish(request_id)
        return True

    def finish(self, request_id: str) -> None:
        """The end of a running request was read: free its slot and its pages."""
        sequence = self._running.pop(request_id)
        self._prefilling.pop(request_id, None)
        self._decoding.pop(request_id, None)
        self._slots.append(sequence.slot)
        self._allocator.free(request_id)

    def schedule(self) -> Work:
        """Admit what fits, and say what to send next; counts it as sent.

        The works must be sent, completely and in this order: pages of requests that end, and prefixes of prompts, are
        given to other requests at once, whose works come later. A work that cannot be sent is a device error.
        """
        group = self._gather_chunks()
        prefill, copies = self._send_chunks(group) if group else (None, ())
        return Work(prefill, copies, self._send_blocks())

    def _add(self, sequence: _Sequence) -> None:
        request = sequence.request
        if request.id in self._waiting or request.id in self._running:
            raise UserError(f"a request with the id {request.id!r} is under way already")
        need, most = self._pages_needed(request), self._allocator.num_allocatable
        if need > most:
            page_size = self._allocator.page_size
            raise UserError(
                f"{len(request.prompt)} prompt tokens and {request.max_new_tokens} new ones need {need} pages of "
                f"{page_size} tokens; the cache has {most} ({most * page_size} tokens)"
            )
        self._waiting[request.id] = sequence

    def _keys(self, request: Request) -> list[bytes]:
        if not self._allocator.prefix_cache or request.prompt_logprobs is not None:
            return []
        return prefix_keys(request.prompt, self._allocator.page_size, request.cache_salt)

    def _pages_needed(self, request: Request) -> int:
        return pages_for(len(request.prompt) + request.max_new_tokens, self._allocator.page_size)

    def _next_count(self, sequence: _Sequence) -> int:
        """Tokens of the next chunk."""
        return min(self._config.chunks.size(sequence.sent), sequence.length - sequence.sent)

    def _gather_chunks(self) -> list[_Sequence]:
        """Whose next chunks make up the next prefill program; admits from the queue what fits into it."""
        group: list[_Sequence] = []
        for sequence in self._prefilling.values():
            if self._fits(group, sequence):
                group.append(sequence)
        while self._waiting and self._slots and len(group) < self._config.prefill_rows and self._admit(group):
            pass
        return group

    def _fits(self, group: list[_Sequence], sequence: _Sequence) -> bool:
        """Whether the sequence's next chunk may share a program with those of the group."""
        if not group:
            return True
        if sequence.scored != group[0].scored:
            return False
        chunks, rows = self._config.chunks, len(group) + 1
        if rows > self._config.prefill_rows or chunks.size(sequence.sent) != chunks.size(group[0].sent):
            return False
        # The chunk with the most tokens is padded to the most.
        count = max(self._next_count(member) for member in [*group, sequence])
        return rows * chunks.padded(count) <= self._config.prefill_tokens

    def _admit(self, group: list[_Sequence]) -> bool:
        """Admit the request that has waited longest into the group, if its first chunk and its pages fit."""
        sequence = next(iter(self._waiting.values()))
        if sequence.parent is not None:
            if self._prefilling.get(sequence.parent.request.id) is sequence.parent:
                return False  # it is admitted when the last chunk of that prompt is sent
            sequence.parent = None
        page_size, unit = self._allocator.page_size, self._config.chunks.unit
        # At least one token has to be read, for its logits.
        keys = sequence.keys[: (sequence.length - 1) // unit * unit // page_size]
        sequence.sent = self._allocator.match_prefix(keys) * page_size // unit * unit
        pages_of_next = (sequence.sent + unit) // page_size
        if pages_of_next <= len(keys) and self._is_about_to_be_sent(keys[pages_of_next - 1], pages_of_next):
            return False
        if not self._fits(group, sequence):
            return False
        allocated = self._allocator.allocate(
            sequence.request.id, self._pages_needed(sequence.request), keys[: sequence.sent // page_size]
        )
        if allocated is None:
            return False
        sequence.cached_tokens = sequence.sent
        self._run(sequence, allocated[0])
        self._prefilling[sequence.request.id] = sequence
        group.append(sequence)
        return True

    def _is_about_to_be_sent(self, key: bytes, pages: int) -> bool:
        """Whether the next chunk of a running request reads the prefix of `pages` pages that has this key."""
        end = pages * self._allocator.page_size
        return any(
            other.sent < end <= other.sent + self._next_count(other) and other.keys[pages - 1 : pages] == [key]
            for other in self._prefilling.values()
        )

    def _run(self, sequence: _Sequence, pages: list[int]) -> None:
        del self._waiting[sequence.request.id]
        self._running[sequence.request.id] = sequence
        sequence.slot = self._slots.pop()
        sequence.pages = tuple(pages)

    def _send_chunks(self, group: list[_Sequence]) -> tuple[PrefillWork, tuple[tuple[int, int], ...]]:
        """Count the group's next chunks as sent, and start what was waiting for the ends of their prompts."""
        counts = [self._next_count(sequence) for sequence in group]
        for sequence, count in zip(group, counts, strict=True):
            first = sequence.sent // self._allocator.page_size
            sequence.sent += count
            # Whole units of the prompt only. What decoding writes depends on the heads' roles, and a prompt's last,
            # smaller chunk runs another program: its keys are not, to the bit, those of a longer prompt's whole chunk.
            unit = self._config.chunks.unit
            filled = sequence.sent // unit * unit // self._allocator.page_size
            self._allocator.publish(sequence.request.id, sequence.keys[:filled], first)
            if sequence.sent == sequence.length:
                del self._prefilling[sequence.request.id]
                self._start_decoding(sequence)
        forks, copies = self._start_forks(group)
        chunks = tuple(
            Chunk(
                sequence.request,
                sequence.slot,
                sequence.pages,
                sequence.sent - count,
                count,
                sequence.sent == sequence.length,
                tuple(forks.get(sequence.request.id, ())),
            )
            for sequence, count in zip(group, counts, strict=True)
        )
        return PrefillWork(chunks, self._config.chunks.padded(max(counts))), tuple(copies)

    def _start_forks(self, group: list[_Sequence]) -> tuple[dict[str, list[Fork]], list[tuple[int, int]]]:
        """Admit forks of those in the group whose prompts end, as long as such a fork has waited longest."""
        forks: dict[str, list[Fork]] = {}
        copies: list[tuple[int, int]] = []
        ended = [sequence for sequence in group if sequence.sent == sequence.length]
        while self._waiting and self._slots:
            child = next(iter(self._waiting.values()))
            if child.parent not in ended:
                break
            request, parent_id = child.request, child.parent.request.id
            forked = self._allocator.fork(parent_id, request.id, self._pages_needed(request), child.length)
            if forked is None:
                break
            pages, copy = forked
            copies += [copy] if copy else []
            child.cached_tokens = child.sent = child.length
            self._run(child, pages)
            self._start_decoding(child)
            forks.setdefault(parent_id, []).append(Fork(request, child.slot, child.pages))
        return forks, copies

    def _start_decoding(self, sequence: _Sequence) -> None:
        """The prompt's last logits give the first new token; steps are there for the others."""
        sequence.step = 1
        sequence.unread = sequence.request.grammar is not None
        if sequence.step < sequence.request.max_new_tokens:
            self._decoding[sequence.request.id] = sequence

    def _send_blocks(self) -> tuple[DecodeWork, ...]:
        """Count a block of steps as sent for every row with steps left.

        As long as a guided row decodes, all blocks have one step, and are sent when its newest token was read: the rows
        stay together, and the guided one waits for no step of the others.
        """
        if self.awaits_tokens:
            return ()
        guided = any(sequence.request.grammar is not None for sequence in self._decoding.values())
        groups: dict[Hashable, list[DecodeRow]] = {}
        for sequence in list(self._decoding.values()):
            request = sequence.request
            row = DecodeRow(request, sequence.slot, sequence.pages, sequence.length + sequence.step - 1, sequence.step)
            groups.setdefault(request.attention, []).append(row)
            sequence.step += 1 if guided else self._config.block_steps
            sequence.unread = request.grammar is not None
            if sequence.step >= request.max_new_tokens:
                del self._decoding[request.id]
        return tuple(DecodeWork(attention, tuple(rows), guided) for attention, rows in groups.items())
