"""The scheduler against a simulated device: any order of requests, forks, aborts, ends and device errors."""

import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Iterable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lychee_jax.cache.allocator import Allocator, pages_for
from lychee_jax.engine.request import Request
from lychee_jax.engine.scheduler import Chunk, ChunkSizes, DecodeRow, Fork, Scheduler, SchedulerConfig, Work
from lychee_jax.errors import UserError
from tests.support.simulated_device import SimulatedDevice, prefix_hashes, text_length

PAGE = 2
CHUNKS = ChunkSizes(page_size=PAGE, unit=4, rungs=((16, 8), (32, 16), (1000, 4)))
SCRATCH = 3
EOS = 9


def config(**changes: int) -> SchedulerConfig:
    return dataclasses.replace(SchedulerConfig(max_num_seqs=4, block_steps=3, chunks=CHUNKS), **changes)


def scheduler(pages: int = 200, *, prefix_cache: bool = True, **changes: int) -> Scheduler:
    return Scheduler(config(**changes), Allocator(pages + SCRATCH, PAGE, scratch=SCRATCH, prefix_cache=prefix_cache))


def prompt(length: int, *, other_from: int | None = None) -> tuple[int, ...]:
    """Tokens of which two prompts have the first `other_from` in common."""
    same = length if other_from is None else other_from
    return tuple(range(100, 100 + same)) + tuple(range(500, 500 + length - same))


def chunks_of(work: Work) -> list[tuple[str, int, int]]:
    """(id, start, count) of the chunks of a work."""
    return [(chunk.request.id, chunk.start, chunk.count) for chunk in work.prefill.chunks] if work.prefill else []


def rows_of(work: Work) -> list[list[tuple[str, int, int]]]:
    """(id, position, step) of the rows of each block."""
    return [[(row.request.id, row.position, row.step) for row in block.rows] for block in work.decode]


def chunks_until_idle(schedule: Scheduler) -> list[list[tuple[str, int, int]]]:
    """The chunks of each work until there are none."""
    return list(iter(lambda: chunks_of(schedule.schedule()), []))


def test_no_module_of_the_host_side_imports_jax() -> None:
    modules = "cache.allocator", "engine.request", "engine.sampling_params", "engine.scheduler"
    code = (
        "import sys\n" + "".join(f"import lychee_jax.{name}\n" for name in modules) + "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_chunk_sizes_at_every_border() -> None:
    # Limit 8 below 16, limit 16 below 32, limit 4 from there on.
    assert [CHUNKS.size(start) for start in range(0, 48, 4)] == [8, 4, 8, 4, 16, 4, 8, 4, 4, 4, 4, 4]
    assert CHUNKS.size(1000) == CHUNKS.size(4000) == 4
    real = ChunkSizes(page_size=64, unit=512, rungs=((32768, 4096), (1 << 20, 512)))
    assert [real.size(start) for start in (0, 512, 1024, 2048, 4096, 28672, 32256, 32768, 36864)] == [
        4096, 512, 1024, 2048, 4096, 4096, 512, 512, 512,
    ]  # fmt: skip


def test_chunks_are_padded_to_a_power_of_two_of_pages_and_then_of_units() -> None:
    sizes = ChunkSizes(page_size=2, unit=12, rungs=((100, 48),))
    expected = {1: 2, 2: 2, 3: 4, 4: 4, 5: 8, 8: 8, 9: 12, 12: 12, 13: 24, 24: 24, 25: 48, 48: 48, 49: 96}
    assert {count: sizes.padded(count) for count in expected} == expected


@pytest.mark.parametrize(
    ("unit", "rungs"), [(3, ((8, 4),)), (0, ((8, 4),)), (4, ()), (4, ((8, 4), (4, 4))), (4, ((8, 2),))]
)
def test_impossible_chunk_sizes(unit: int, rungs: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match="must"):
        ChunkSizes(2, unit, rungs)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 12, 16, 31, 32, 33, 40])
def test_a_prompt_is_cut_at_the_same_places_whatever_its_length(length: int) -> None:
    borders = [0, 8, 16, 32, 36, 40]
    queue = scheduler()
    queue.add(Request("a", prompt(length), 1))
    expected = [("a", start, min(end, length) - start) for start, end in itertools.pairwise(borders) if start < length]
    works = [queue.schedule() for _ in expected]
    assert [chunks_of(work) for work in works] == [[chunk] for chunk in expected]
    assert [chunk.last for work in works if work.prefill for chunk in work.prefill.chunks] == [False] * (
        len(expected) - 1
    ) + [True]
    assert not queue.schedule()


def test_a_row_decodes_from_its_last_chunk_on_until_its_steps_are_sent() -> None:
    queue = scheduler()
    queue.add(Request("a", prompt(9), 6))
    queue.add(Request("b", prompt(3, other_from=0), 1))
    assert rows_of(queue.schedule()) == []
    work = queue.schedule()
    assert (chunks_of(work), rows_of(work)) == ([("a", 8, 1)], [[("a", 9, 1)]])
    work = queue.schedule()
    assert (chunks_of(work), rows_of(work)) == ([("b", 0, 3)], [[("a", 12, 4)]])
    assert not queue.schedule()
    assert (queue.num_running, queue.num_waiting) == (2, 0)
    queue.finish("a")
    queue.finish("b")
    assert (queue.num_running, queue.num_waiting) == (0, 0)


def test_a_block_holds_rows_of_equal_attention() -> None:
    queue = scheduler(prefill_rows=4, prefill_tokens=100)
    for name, attention in [("a", "x"), ("b", None), ("c", "x"), ("d", None)]:
        queue.add(Request(name, prompt(4, other_from=0), 9, attention=attention))
    work = queue.schedule()
    assert [block.attention for block in work.decode] == ["x", None]
    assert rows_of(work) == [[("a", 4, 1), ("c", 4, 1)], [("b", 4, 1), ("d", 4, 1)]]


def test_chunks_share_a_program_as_long_as_rows_and_tokens_allow() -> None:
    def first(lengths: list[int], prefill_rows: int, prefill_tokens: int) -> tuple[list[str], int]:
        queue = scheduler(prefill_rows=prefill_rows, prefill_tokens=prefill_tokens)
        for index, length in enumerate(lengths):
            queue.add(Request(str(index), tuple(range(100 * index, 100 * index + length)), 1))
        work = queue.schedule().prefill
        assert work
        return [chunk.request.id for chunk in work.chunks], work.tokens

    assert first([8, 8, 8, 8], 3, 100) == (["0", "1", "2"], 8)
    assert first([8, 8, 8, 8], 4, 31) == (["0", "1", "2"], 8)
    assert first([8, 8, 8, 8], 4, 32) == (["0", "1", "2", "3"], 8)
    # All are padded to the longest: the third would make three rows of eight out of two rows of two.
    assert first([2, 1, 8], 4, 23) == (["0", "1"], 2)
    assert first([2, 1, 8], 4, 24) == (["0", "1", "2"], 8)
    # Nobody overtakes the one that does not fit.
    assert first([2, 8, 2], 4, 15) == (["0"], 2)


def test_only_chunks_of_the_same_size_class_share_a_program() -> None:
    queue = scheduler(prefill_rows=2, prefill_tokens=100)
    queue.add(Request("a", prompt(20), 1))
    assert chunks_of(queue.schedule()) == [("a", 0, 8)]
    queue.add(Request("b", prompt(12, other_from=0), 1))
    assert chunks_until_idle(queue) == [[("a", 8, 8), ("b", 0, 8)], [("a", 16, 4)], [("b", 8, 4)]]


def test_prompts_with_a_common_prefix_that_arrive_together_read_it_once() -> None:
    for rows in (1, 4):
        queue = scheduler(prefill_rows=rows, prefill_tokens=100)
        for index in range(3):
            queue.add(Request(str(index), (*prompt(16), 1000 + index), 1))
        read = [chunk for chunks in chunks_until_idle(queue) for chunk in chunks]
        assert read == [("0", 0, 8), ("0", 8, 8), ("0", 16, 1), ("1", 16, 1), ("2", 16, 1)]
        assert [queue.cached_tokens(name) for name in "012"] == [0, 16, 16]


def test_prompts_that_part_within_a_chunk_share_it_up_to_the_last_unit() -> None:
    queue = scheduler(prefill_rows=4, prefill_tokens=100)
    queue.add(Request("a", prompt(24), 1))
    queue.add(Request("b", prompt(24, other_from=6), 1))
    queue.add(Request("c", prompt(24, other_from=3), 1))
    assert chunks_of(queue.schedule()) == [("a", 0, 8)]
    assert chunks_until_idle(queue)[0] == [("a", 8, 8)]
    assert queue.cached_tokens("b") == 4
    assert queue.cached_tokens("c") == 0


@pytest.mark.parametrize(
    ("length", "cached"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (13, 12), (16, 12), (17, 16), (18, 16)]
)
def test_a_cached_prompt_is_reused_but_for_at_least_one_token(length: int, cached: int) -> None:
    queue = scheduler()
    queue.add(Request("a", prompt(18), 5))
    chunks_until_idle(queue)
    queue.finish("a")
    queue.add(Request("b", prompt(length), 1))
    work = queue.schedule()
    assert chunks_of(work)[0][:2] == ("b", cached)
    assert queue.cached_tokens("b") == cached


def test_what_was_not_read_before_an_abort_is_not_known() -> None:
    queue = scheduler()
    queue.add(Request("a", prompt(40), 1))
    queue.schedule()
    queue.abort("a")
    queue.add(Request("b", prompt(40), 1))
    assert chunks_of(queue.schedule()) == [("b", 8, 8)]


def test_only_full_pages_of_the_prompt_are_known() -> None:
    """What a row decoded is not reused, not even for a prompt that continues its text."""
    queue = scheduler()
    queue.add(Request("a", prompt(7), 9))
    while queue.schedule():
        pass
    queue.finish("a")
    queue.add(Request("b", prompt(16), 1))
    assert chunks_of(queue.schedule()) == [("b", 4, 4)]


def test_other_salts_share_nothing() -> None:
    queue = scheduler()
    for name, salt in [("a", b""), ("b", b"adapter"), ("c", b"adapter")]:
        queue.add(Request(name, prompt(9), 1, cache_salt=salt))
    chunks_until_idle(queue)
    assert [queue.cached_tokens(name) for name in "abc"] == [0, 0, 8]


def test_first_come_first_served_though_a_later_one_would_fit() -> None:
    queue = scheduler(pages=10)
    queue.add(Request("a", prompt(8), 4))  # 6 pages
    queue.add(Request("b", prompt(8, other_from=0), 4))
    queue.add(Request("c", prompt(2, other_from=0), 2))
    assert chunks_until_idle(queue) == [[("a", 0, 8)]]
    queue.finish("a")
    assert chunks_until_idle(queue) == [[("b", 0, 8)], [("c", 0, 2)]]


def test_a_slot_is_reused_and_never_shared() -> None:
    queue = scheduler(max_num_seqs=2)
    for index in range(3):
        queue.add(Request(str(index), (index,), 4))
    works = [queue.schedule() for _ in range(3)]
    slots = {chunk.request.id: chunk.slot for work in works if work.prefill for chunk in work.prefill.chunks}
    assert sorted(slots.values()) == [0, 1]
    assert queue.num_waiting == 1
    queue.finish("0")
    work = queue.schedule().prefill
    assert work
    assert work.chunks[0].slot == slots["0"]


def test_what_can_never_fit_is_refused_at_once() -> None:
    queue = scheduler(pages=10)
    with pytest.raises(UserError, match=r"15 prompt tokens and 6 new ones need 11 pages of 2 tokens; the cache has 10"):
        queue.add(Request("a", prompt(15), 6))
    queue.add(Request("a", prompt(15), 5))
    with pytest.raises(UserError, match="'a' is under way"):
        queue.add(Request("a", prompt(1), 1))
    queue.schedule()
    with pytest.raises(UserError, match="'a' is under way"):
        queue.add(Request("a", prompt(1), 1))


def test_impossible_requests() -> None:
    with pytest.raises(UserError, match="empty"):
        Request("a", (), 1)
    with pytest.raises(UserError, match="at least 1, not 0"):
        Request("a", (1,), 0)


@pytest.mark.parametrize("schedules", range(4))
def test_abort_frees_at_once(schedules: int) -> None:
    queue = scheduler(max_num_seqs=1)
    queue.add(Request("a", prompt(9), 9))
    queue.add(Request("b", prompt(3, other_from=0), 1))
    for _ in range(schedules):
        queue.schedule()
    assert queue.abort("a")
    assert not queue.abort("a")
    assert chunks_of(queue.schedule()) == [("b", 0, 3)]
    assert queue.num_running == 1


def test_forks_start_where_their_parents_prompt_ends() -> None:
    queue = scheduler()
    queue.add(Request("a", prompt(11), 7))
    for name in "bc":
        queue.fork("a", Request(name, prompt(11), 5))
    assert chunks_of(queue.schedule()) == [("a", 0, 8)]
    assert queue.num_running == 1
    work = queue.schedule()
    assert work.prefill
    (chunk,) = work.prefill.chunks
    assert [fork.request.id for fork in chunk.forks] == ["b", "c"]
    assert len({chunk.slot, *(fork.slot for fork in chunk.forks)}) == 3
    assert work.copies == tuple((chunk.pages[5], fork.pages[5]) for fork in chunk.forks)
    assert all(fork.pages[:5] == chunk.pages[:5] and len(fork.pages) == 8 for fork in chunk.forks)
    assert rows_of(work) == [[("a", 11, 1), ("b", 11, 1), ("c", 11, 1)]]
    assert [queue.cached_tokens(name) for name in "abc"] == [0, 11, 11]


def test_a_fork_at_a_page_border_copies_nothing_and_one_token_needs_no_step() -> None:
    queue = scheduler()
    queue.add(Request("a", prompt(8), 7))
    queue.fork("a", Request("b", prompt(8), 1))
    work = queue.schedule()
    assert work.copies == ()
    assert rows_of(work) == [[("a", 8, 1)]]
    assert queue.num_running == 2


def test_a_fork_that_cannot_start_with_its_parent_is_a_request_like_any_other() -> None:
    late = scheduler()
    late.add(Request("a", prompt(11), 7))
    chunks_until_idle(late)
    late.fork("a", Request("late", prompt(11), 1))
    late.fork("unknown", Request("orphan", prompt(11), 1))
    assert chunks_until_idle(late) == [[("late", 8, 3)], [("orphan", 8, 3)]]

    aborted = scheduler()
    aborted.add(Request("a", prompt(11), 7))
    aborted.fork("a", Request("b", prompt(11), 1))
    aborted.schedule()
    aborted.abort("a")
    aborted.add(Request("a", prompt(11), 1))  # not the parent, though it has its name
    assert chunks_until_idle(aborted) == [[("b", 8, 3)], [("a", 8, 3)]]

    full = scheduler(max_num_seqs=1)
    full.add(Request("a", prompt(11), 1))
    full.fork("a", Request("b", prompt(11), 1))
    assert chunks_until_idle(full) == [[("a", 0, 8)], [("a", 8, 3)]]
    full.finish("a")
    assert chunks_until_idle(full) == [[("b", 8, 3)]]


def test_a_fork_of_a_fork_has_the_same_parent() -> None:
    queue = scheduler()
    queue.add(Request("a", prompt(3), 1))
    queue.fork("a", Request("b", prompt(3), 1))
    queue.fork("b", Request("c", prompt(3), 1))
    work = queue.schedule().prefill
    assert work
    assert [fork.request.id for fork in work.chunks[0].forks] == ["b", "c"]


def test_a_fork_needs_the_prompt_of_its_parent() -> None:
    queue = scheduler()
    queue.add(Request("a", prompt(3), 1))
    with pytest.raises(ValueError, match="must have the prompt"):
        queue.fork("a", Request("b", prompt(4), 1))
    with pytest.raises(ValueError, match="must have the prompt"):
        queue.fork("a", Request("b", prompt(3), 1, cache_salt=b"adapter"))


def test_a_fork_does_not_overtake() -> None:
    queue = scheduler(max_num_seqs=4)
    queue.add(Request("a", prompt(11), 1))
    queue.add(Request("x", prompt(3, other_from=0), 1))
    queue.fork("a", Request("b", prompt(11), 1))
    assert chunks_until_idle(queue) == [[("a", 0, 8)], [("a", 8, 3)], [("x", 0, 3)], [("b", 8, 3)]]


@dataclasses.dataclass
class Live:
    """What the caller knows of a request that runs."""

    request: Request
    slot: int
    pages: tuple[int, ...]
    sent: int  # tokens of the prompt
    step: int = 0


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
        self.config = config(
            max_num_seqs=max_num_seqs, block_steps=block_steps, prefill_rows=rows, prefill_tokens=tokens
        )
        self.pages, self.prefix_cache = pages, prefix_cache
        self.restart()

    def restart(self) -> None:
        self.allocator = Allocator(self.pages + SCRATCH, PAGE, scratch=SCRATCH, prefix_cache=self.prefix_cache)
        self.scheduler = Scheduler(self.config, self.allocator)
        self.device = SimulatedDevice(self.pages, PAGE, self.config.block_steps)
        self.queue: list[Request] = []
        self.live: dict[str, Live] = {}
        self.known: list[Request] = []  # keeps `id(request)` unique, too
        self.published: dict[int, int] = {}  # prefix hash of every full prompt page sent: its end
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
    ) -> None:
        """Several requests at once, with a text of `length` tokens each."""
        for index in range(count):
            tokens = ((0, 1, stem) * 14)[:cut] + tuple(tail) + (index,)
            text = (0,) * (length - 1) + (EOS,)
            self.submit(
                Request(self.new_id(), tokens, new, attention=attention, eos_ids=(EOS,), forced=text, cache_salt=salt)
            )

    @precondition(lambda self: self.known)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), max_size=3), forks=st.integers(0, 2))
    def add_again(self, data: st.DataObject, more: list[int], forks: int) -> None:
        """A prompt that continues an earlier one, and perhaps more texts for it."""
        earlier = data.draw(st.sampled_from(self.known[-5:]))
        parent = dataclasses.replace(earlier, id=self.new_id(), prompt=earlier.prompt + tuple(more))
        self.submit(parent)
        for _ in range(forks):
            self.submit(dataclasses.replace(parent, id=self.new_id()), parent.id)

    def new_id(self) -> str:
        """A few ids that come back as soon as they are free."""
        taken = {*self.live, *(waiting.id for waiting in self.queue)}
        return next(name for name in map(str, itertools.count()) if name not in taken)

    def submit(self, new: Request, parent: str | None = None) -> None:
        self.known.append(new)
        if pages_for(len(new.prompt) + new.max_new_tokens, PAGE) > self.pages:
            with pytest.raises(UserError, match="the cache has"):
                self.scheduler.add(new)
            return
        if parent is None:
            self.scheduler.add(new)
        else:
            self.scheduler.fork(parent, new)
        self.queue.append(new)

    @rule(data=st.data(), copies=st.integers(1, 3), new=st.integers(1, 9))
    def fork(self, data: st.DataObject, copies: int, new: int) -> None:
        parents = [*(live.request for live in self.live.values()), *self.queue]
        if not parents:
            return
        parent = data.draw(st.sampled_from(parents))
        for _ in range(copies):
            self.submit(dataclasses.replace(parent, id=self.new_id(), max_new_tokens=new), parent.id)

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
            self.end(self.device.send(work) if work else self.device.drain())
            if not work:
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
            self.live[fork.request.id].step = 1
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
        if not self.prefix_cache:
            assert chunk.start == 0
            return
        # Nothing can have been evicted as long as fewer pages were handed out than there are.
        known = [end for end in range(unit, most + 1, unit) if hashes[end - 1] in self.published]
        assert chunk.start in [0, *known]
        if self.handed_out + len(chunk.pages) <= self.pages:
            assert chunk.start == max([0, *known])
        end = chunk.start + unit
        for other in program:
            if end <= most and other is not chunk and other.start < end <= other.start + other.count:
                assert prefix_hashes(other.request)[end - 1] != hashes[end - 1], "the same text is read twice"

    def check_prefill(self, chunks: tuple[Chunk, ...], tokens: int) -> None:
        assert tokens == max(CHUNKS.padded(chunk.count) for chunk in chunks)
        if len(chunks) > 1:
            assert len(chunks) <= self.config.prefill_rows
            assert len(chunks) * tokens <= self.config.prefill_tokens
        assert len({CHUNKS.size(chunk.start) for chunk in chunks}) == 1
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
        live.step = int(chunk.last)
        hashes = prefix_hashes(chunk.request)
        for end in range(PAGE, live.sent + 1, PAGE):
            self.published[hashes[end - 1]] = end

    def check_decode(self, work: Work) -> None:
        assert len({block.attention for block in work.decode}) == len(work.decode)
        rows: dict[str, DecodeRow] = {}
        for block in work.decode:
            for row in block.rows:
                assert row.request.attention == block.attention
                assert row.request.id not in rows
                rows[row.request.id] = row
        due = {name for name, live in self.live.items() if 0 < live.step < live.request.max_new_tokens}
        assert rows.keys() == due
        for name, row in rows.items():
            live = self.live[name]
            position = len(live.request.prompt) + live.step - 1
            assert row == DecodeRow(live.request, live.slot, live.pages, position, live.step)
            live.step += self.config.block_steps

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

    def teardown(self) -> None:
        """Every request ends, after no more steps than all of them one after the other would take."""
        if not hasattr(self, "scheduler"):
            return
        requests = [*self.queue, *(live.request for live in self.live.values())]
        most = sum(len(r.prompt) // CHUNKS.unit + 1 + text_length(r) + 3 for r in requests) + 3
        for _ in range(most):
            self.step(1)
        assert not self.live
        assert not self.queue
        assert self.allocator.num_owned == 0


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
