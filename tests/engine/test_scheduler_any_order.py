"""The scheduler against a simulated device: any order of requests, forks, aborts, ends and device errors."""

import dataclasses
import itertools
from collections.abc import Iterable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lychee_jax.cache.allocator import Allocator, pages_for
from lychee_jax.engine.request import Request
from lychee_jax.engine.scheduler import Chunk, ChunkSizes, DecodeRow, Fork, Scheduler, SchedulerConfig, Work
from lychee_jax.errors import UserError
from tests.support.grammars import EvenThenEnd
from tests.support.simulated_device import SimulatedDevice, prefix_hashes, text_length

PAGE = 2
CHUNKS = ChunkSizes(page_size=PAGE, unit=4, rungs=((16, 8), (32, 16), (1000, 4)))
SCRATCH = 3
EOS = 9


@dataclasses.dataclass
class Live:
    """What the caller knows of a request that runs."""

    request: Request
    slot: int
    pages: tuple[int, ...]
    sent: int  # tokens of the prompt
    step: int = 0
    unread: bool = False  # guided, and its newest token was not read


class SchedulerMachine(RuleBasedStateMachine):
    """A caller of the scheduler that knows, from the works it was given, what the next one must be like."""

    @initialize(
        max_num_seqs=st.integers(1, 5),
        block_steps=st.integers(1, 4),
        prefill=st.sampled_from([(1, 0), (2, 16), (3, 24), (4, 64)]),
        pages=st.sampled_from([20, 32, 60, 300]),
        prefix_cache=st.sampled_from([True, True, True, False]),
    )
    def start(
        self, max_num_seqs: int, block_steps: int, prefill: tuple[int, int], pages: int, prefix_cache: bool
    ) -> None:
        rows, tokens = prefill
        self.config = SchedulerConfig(max_num_seqs, block_steps, CHUNKS, rows, tokens)
        self.pages, self.prefix_cache = pages, prefix_cache
        self.restart()

    def restart(self) -> None:
        self.allocator = Allocator(self.pages + SCRATCH, PAGE, scratch=SCRATCH, prefix_cache=self.prefix_cache)
        self.scheduler = Scheduler(self.config, self.allocator)
        self.device = SimulatedDevice(self.pages, PAGE, self.config.block_steps)
        self.queue: list[Request] = []
        self.live: dict[str, Live] = {}
        self.known: list[Request] = []  # keeps `id(request)` unique, too
        self.published: set[int] = set()  # the prefix hash at the end of every whole unit that was sent
        self.handed_out = 0

    @rule(
        count=st.integers(1, 3),
        stem=st.integers(0, 2),
        cut=st.sampled_from([0, 3, 7, 8, 12, 15, 16, 23, 32, 39]),
        tail=st.lists(st.integers(0, 1), max_size=9),
        new=st.integers(1, 9),
        length=st.integers(1, 12),
        attention=st.sampled_from([None, "dense", "hybrid"]),
        salt=st.sampled_from([b"", b"", b"adapter"]),
        guided=st.sampled_from([False, False, True]),
        scored=st.sampled_from([None, None, 0]),
    )
    def add(
        self,
        count: int,
        stem: int,
        cut: int,
        tail: list[int],
        new: int,
        length: int,
        attention: str | None,
        salt: bytes,
        guided: bool,
        scored: int | None,
    ) -> None:
        """Several requests at once, with a text of `length` tokens each."""
        for index in range(count):
            tokens = ((0, 1, stem) * 14)[:cut] + tuple(tail) + (index,)
            text = (0,) * (length - 1) + (EOS,)
            self.submit(
                Request(
                    self.new_id(), tokens, new, attention=attention, eos_ids=(EOS,), forced=text, cache_salt=salt,
                    grammar=EvenThenEnd(10, 1, EOS) if guided else None, prompt_logprobs=scored,
                )
            )  # fmt: skip

    @precondition(lambda self: self.known)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), max_size=3), forks=st.integers(0, 2))
    def add_again(self, data: st.DataObject, more: list[int], forks: int) -> None:
        """A prompt that continues an earlier one, and perhaps more texts for it."""
        earlier = data.draw(st.sampled_from(self.known[-5:]))
        parent = dataclasses.replace(earlier, id=self.new_id(), prompt=earlier.prompt + tuple(more), fork_of=None)
        self.submit(parent)
        for _ in range(forks):
            self.submit(dataclasses.replace(parent, id=self.new_id(), fork_of=parent.id))

    def new_id(self) -> str:
        """A few ids that come back as soon as they are free."""
        taken = {*self.live, *(waiting.id for waiting in self.queue)}
        return next(name for name in map(str, itertools.count()) if name not in taken)

    def submit(self, new: Request) -> None:
        self.known.append(new)
        if pages_for(len(new.prompt) + new.max_new_tokens, PAGE) > self.pages:
            with pytest.raises(UserError, match="the cache has"):
                self.scheduler.add(new)
            return
        self.scheduler.add(new)
        self.queue.append(new)

    @rule(data=st.data(), copies=st.integers(1, 3), new=st.integers(1, 9))
    def fork(self, data: st.DataObject, copies: int, new: int) -> None:
        parents = [*(live.request for live in self.live.values()), *self.queue]
        if not parents:
            return
        parent = data.draw(st.sampled_from(parents))
        for _ in range(copies):
            self.submit(dataclasses.replace(parent, id=self.new_id(), max_new_tokens=new, fork_of=parent.id))

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        reading = [name for name, live in self.live.items() if live.sent < len(live.request.prompt)]
        names = [*reading, *reading, *self.live, *(waiting.id for waiting in self.queue), "unknown"]
        name = data.draw(st.sampled_from(names))
        assert self.scheduler.abort(name) == (name != "unknown")
        self.live.pop(name, None)
        self.queue = [waiting for waiting in self.queue if waiting.id != name]

    @rule(steps=st.integers(1, 4))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            running = len(self.live)
            work = self.scheduler.schedule()
            if work:
                self.check_work(work)
            awaited = self.scheduler.awaits_tokens
            assert awaited == any(live.unread for live in self.live.values())
            self.end(self.device.send(work) if work else self.device.drain())
            self.tell_what_was_read()
            if not work and not awaited:
                assert not self.live, "something runs, but there is nothing to send for it, and nothing to read"
                assert not self.queue or running, "nothing runs, and yet the queue does not move"
            self.check_books()

    @rule()
    def device_error(self) -> None:
        """All requests fail; what was sent may never have run, so that pool and allocator go with them."""
        for name in [*self.live, *(waiting.id for waiting in self.queue)]:
            assert self.scheduler.abort(name)
        self.live, self.queue = {}, []
        self.check_books()
        self.restart()

    def end(self, ended: Iterable[Request]) -> None:
        for done in ended:
            if done.id in self.live and self.live[done.id].request is done:  # else aborted meanwhile
                self.scheduler.finish(done.id)
                del self.live[done.id]

    def tell_what_was_read(self) -> None:
        for request in self.device.read:
            if request.id in self.live and self.live[request.id].request is request:
                self.scheduler.received(request.id)
                self.live[request.id].unread = False
        self.device.read.clear()

    def check_work(self, work: Work) -> None:
        chunks: tuple[Chunk, ...] = work.prefill.chunks if work.prefill else ()
        forks = [(fork, chunk) for chunk in chunks for fork in chunk.forks]
        new_chunks = [chunk for chunk in chunks if chunk.request.id not in self.live]
        admitted = [*(chunk.request for chunk in new_chunks), *(fork.request for fork, _ in forks)]
        # First come, first served.
        first, self.queue = self.queue[: len(admitted)], self.queue[len(admitted) :]
        assert sorted(map(id, admitted)) == sorted(map(id, first))
        for chunk in new_chunks:
            self.check_cached(chunk, chunks)
            self.admit(chunk, chunk.start)
        if work.prefill:
            self.check_prefill(chunks, work.prefill.tokens)
        for chunk in chunks:
            self.advance(chunk)
        copies = []
        for fork, chunk in forks:
            assert chunk.last
            assert fork.request.prompt == chunk.request.prompt
            length = len(chunk.request.prompt)
            self.admit(fork, length)
            self.start_text(self.live[fork.request.id])
            assert fork.pages[: length // PAGE] == chunk.pages[: length // PAGE]
            if length % PAGE:
                copies.append((chunk.pages[length // PAGE], fork.pages[length // PAGE]))
        assert list(work.copies) == copies
        if self.queue and not chunks and len(self.live) < self.config.max_num_seqs:
            head = self.queue[0]
            need = pages_for(len(head.prompt) + head.max_new_tokens, PAGE)
            assert need > self.allocator.num_free + self.allocator.num_cached, "the first in the queue fits, but waits"
        self.check_decode(work)

    def admit(self, row: Chunk | Fork, cached: int) -> None:
        name, new = row.request.id, row.request
        assert row.slot not in {live.slot for live in self.live.values()}
        assert 0 <= row.slot < self.config.max_num_seqs
        assert len(row.pages) == pages_for(len(new.prompt) + new.max_new_tokens, PAGE)
        assert all(0 <= page < self.pages for page in row.pages)  # no scratch page
        assert self.scheduler.cached_tokens(name) == cached
        self.live[name] = Live(new, row.slot, row.pages, cached)
        self.handed_out += len(row.pages)

    def check_cached(self, chunk: Chunk, program: tuple[Chunk, ...]) -> None:
        """As much as possible is reused, and nothing is read twice that a chunk of the same program reads as well."""
        hashes, unit = prefix_hashes(chunk.request), CHUNKS.unit
        most = (len(hashes) - 1) // unit * unit
        assert chunk.start % unit == 0
        assert chunk.start <= most
        if not self.prefix_cache or chunk.request.prompt_logprobs is not None:
            assert chunk.start == 0
            return
        # Nothing can have been evicted as long as fewer pages were handed out than there are.
        known = [end for end in range(unit, most + 1, unit) if hashes[end - 1] in self.published]
        assert chunk.start in [0, *known]
        if self.handed_out + len(chunk.pages) <= self.pages:
            assert chunk.start == max([0, *known])
        end = chunk.start + unit
        for other in program:
            shares = other is not chunk and other.request.prompt_logprobs is None
            if end <= most and shares and other.start < end <= other.start + other.count:
                assert prefix_hashes(other.request)[end - 1] != hashes[end - 1], "the same text is read twice"

    def check_prefill(self, chunks: tuple[Chunk, ...], tokens: int) -> None:
        assert tokens == max(CHUNKS.padded(chunk.count) for chunk in chunks)
        if len(chunks) > 1:
            assert len(chunks) <= self.config.prefill_rows
            assert len(chunks) * tokens <= self.config.prefill_tokens
        assert len({CHUNKS.size(chunk.start) for chunk in chunks}) == 1
        assert len({chunk.request.prompt_logprobs for chunk in chunks}) == 1, "all are scored, or none"
        reading = [live.request.id for live in self.live.values() if live.sent < len(live.request.prompt)]
        assert next(chunk.request.id for chunk in chunks) == reading[0], "the one that came first is read first"

    def advance(self, chunk: Chunk) -> None:
        live = self.live[chunk.request.id]
        assert (live.request, live.slot, live.pages) == (chunk.request, chunk.slot, chunk.pages)
        assert chunk.start == live.sent
        length = len(chunk.request.prompt)
        assert chunk.count == min(CHUNKS.size(chunk.start), length - chunk.start)
        live.sent += chunk.count
        assert chunk.last == (live.sent == length)
        if chunk.last:
            self.start_text(live)
        if chunk.request.prompt_logprobs is not None:
            return  # its pages are its own
        hashes = prefix_hashes(chunk.request)
        for end in range(CHUNKS.unit, live.sent + 1, CHUNKS.unit):
            self.published.add(hashes[end - 1])

    @staticmethod
    def start_text(live: Live) -> None:
        live.step = 1
        live.unread = live.request.grammar is not None and live.request.max_new_tokens > 1

    def check_decode(self, work: Work) -> None:
        assert len({block.attention for block in work.decode}) == len(work.decode)
        rows: dict[str, DecodeRow] = {}
        for block in work.decode:
            for row in block.rows:
                assert row.request.attention == block.attention
                assert row.request.id not in rows
                rows[row.request.id] = row
        due = {name for name, live in self.live.items() if 0 < live.step < live.request.max_new_tokens}
        guided = any(self.live[name].request.grammar is not None for name in due)
        if any(self.live[name].unread for name in due):
            due = set()
        assert all(block.guided == guided for block in work.decode)
        assert rows.keys() == due
        for name, row in rows.items():
            live = self.live[name]
            position = len(live.request.prompt) + live.step - 1
            assert row == DecodeRow(live.request, live.slot, live.pages, position, live.step)
            live.step += 1 if guided else self.config.block_steps
            live.unread = live.request.grammar is not None and live.step < live.request.max_new_tokens

    @invariant()
    def check_books(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.allocator.check()
        assert self.scheduler.num_running == len(self.live)
        assert self.scheduler.num_waiting == len(self.queue)
        owners: dict[int, tuple[int, Request]] = {}
        for live in self.live.values():
            hashes = prefix_hashes(live.request)
            for index, page in enumerate(live.pages):
                if page not in owners:
                    owners[page] = (index, live.request)
                    continue
                end = (index + 1) * PAGE
                assert owners[page][0] == index, "shared at another position"
                assert end <= len(hashes), "a page is shared that decoding writes"
                assert prefix_hashes(owners[page][1])[:end] == hashes[:end], "a page is shared by different prefixes"
        assert self.allocator.num_owned == len(owners)
        free, cached = self.allocator.num_free, self.allocator.num_cached
        assert free + cached + len(owners) == self.allocator.num_allocatable == self.pages
        pages = len(self.published) * CHUNKS.unit // PAGE
        assert cached <= pages * self.prefix_cache, "more is cached than whole units of prompts"

    def teardown(self) -> None:
        """Every request ends, after no more steps than all of them one after the other would take."""
        if not hasattr(self, "scheduler"):
            return
        requests = [*self.queue, *(live.request for live in self.live.values())]
        most = sum(len(r.prompt) // CHUNKS.unit + 1 + 2 * text_length(r) + 3 for r in requests) + 3
        for _ in range(most):
            self.step(1)
        assert not self.live
        assert not self.queue
        assert self.allocator.num_owned == 0


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
