"""What the scheduler sends, case by case."""

import itertools
import subprocess
import sys

import pytest

from lychee_jax.cache.allocator import Allocator
from lychee_jax.engine.request import Request
from lychee_jax.engine.scheduler import ChunkSizes, Scheduler, SchedulerConfig, Work
from lychee_jax.errors import UserError

PAGE = 2
CHUNKS = ChunkSizes(page_size=PAGE, unit=4, rungs=((16, 8), (32, 16), (1000, 4)))
SCRATCH = 3


def scheduler(pages: int = 200, *, max_num_seqs: int = 4, prefill_rows: int = 1, prefill_tokens: int = 0) -> Scheduler:
    config = SchedulerConfig(max_num_seqs, 3, CHUNKS, prefill_rows, prefill_tokens)
    return Scheduler(config, Allocator(pages + SCRATCH, PAGE, scratch=SCRATCH))


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
    modules = "cache.allocator", "engine.grammar", "engine.request", "engine.sampling_params", "engine.scheduler"
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


def test_chunks_are_padded_to_a_part_of_the_unit_or_to_a_power_of_two_of_units() -> None:
    sizes = ChunkSizes(page_size=2, unit=12, rungs=((100, 48),))
    expected = {1: 6, 6: 6, 7: 12, 12: 12, 13: 24, 24: 24, 25: 48, 48: 48, 49: 96}
    assert {count: sizes.padded(count) for count in expected} == expected
    coarse = ChunkSizes(page_size=64, unit=512, rungs=((100, 2048),), factor=4)
    expected = {1: 128, 64: 128, 128: 128, 129: 512, 512: 512, 513: 1024, 2048: 2048}
    assert {count: coarse.padded(count) for count in expected} == expected


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


def test_what_is_less_than_a_unit_is_never_shared() -> None:
    """A short prompt's only chunk runs a smaller program than a long one's: no page of it may be part of a prefix."""
    schedulers = SchedulerConfig(4, 3, CHUNKS)
    allocator = Allocator(200 + SCRATCH, PAGE, scratch=SCRATCH)
    queue = Scheduler(schedulers, allocator)
    for name, length, cached in (("a", 3, 0), ("b", 6, 2), ("c", 7, 2), ("d", 11, 4)):
        queue.add(Request(name, prompt(length), 1))
        chunks_until_idle(queue)
        queue.finish(name)
        assert allocator.num_cached == cached, name


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
        queue.add(Request(name, prompt(11), 5, fork_of="a"))
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
    queue.add(Request("b", prompt(8), 1, fork_of="a"))
    work = queue.schedule()
    assert work.copies == ()
    assert rows_of(work) == [[("a", 8, 1)]]
    assert queue.num_running == 2


def test_a_fork_that_cannot_start_with_its_parent_is_a_request_like_any_other() -> None:
    late = scheduler()
    late.add(Request("a", prompt(11), 7))
    chunks_until_idle(late)
    late.add(Request("late", prompt(11), 1, fork_of="a"))
    late.add(Request("orphan", prompt(11), 1, fork_of="unknown"))
    assert chunks_until_idle(late) == [[("late", 8, 3)], [("orphan", 8, 3)]]

    aborted = scheduler()
    aborted.add(Request("a", prompt(11), 7))
    aborted.add(Request("b", prompt(11), 1, fork_of="a"))
    aborted.schedule()
    aborted.abort("a")
    aborted.add(Request("a", prompt(11), 1))  # not the parent, though it has its name
    assert chunks_until_idle(aborted) == [[("b", 8, 3)], [("a", 8, 3)]]

    full = scheduler(max_num_seqs=1)
    full.add(Request("a", prompt(11), 1))
    full.add(Request("b", prompt(11), 1, fork_of="a"))
    assert chunks_until_idle(full) == [[("a", 0, 8)], [("a", 8, 3)]]
    full.finish("a")
    assert chunks_until_idle(full) == [[("b", 8, 3)]]


def test_a_fork_of_a_fork_has_the_same_parent() -> None:
    queue = scheduler()
    queue.add(Request("a", prompt(3), 1))
    queue.add(Request("b", prompt(3), 1, fork_of="a"))
    queue.add(Request("c", prompt(3), 1, fork_of="b"))
    work = queue.schedule().prefill
    assert work
    assert [fork.request.id for fork in work.chunks[0].forks] == ["b", "c"]


def test_a_fork_needs_the_prompt_of_its_parent() -> None:
    queue = scheduler()
    queue.add(Request("a", prompt(3), 1))
    with pytest.raises(ValueError, match="must have the prompt"):
        queue.add(Request("b", prompt(4), 1, fork_of="a"))
    with pytest.raises(ValueError, match="must have the prompt"):
        queue.add(Request("b", prompt(3), 1, cache_salt=b"adapter", fork_of="a"))


def test_a_fork_does_not_overtake() -> None:
    queue = scheduler(max_num_seqs=4)
    queue.add(Request("a", prompt(11), 1))
    queue.add(Request("x", prompt(3, other_from=0), 1))
    queue.add(Request("b", prompt(11), 1, fork_of="a"))
    assert chunks_until_idle(queue) == [[("a", 0, 8)], [("a", 8, 3)], [("x", 0, 3)], [("b", 8, 3)]]
