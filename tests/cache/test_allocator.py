"""Pages and their owners: exact cases, then any order of calls against a naive model that evicts by searching."""

import dataclasses
import hashlib

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lychee_jax.cache.allocator import Allocator, prefix_keys

PAGE = 4


def keys_of(text: str) -> list[bytes]:
    """One key a letter, readable: all letters up to it."""
    return [text[: end + 1].encode() for end in range(len(text))]


def cache_text(allocator: Allocator, text: str) -> list[int]:
    """Leave the pages of a text behind as cached ones."""
    allocated = allocator.allocate("writer", len(text), keys_of(text))
    assert allocated
    allocator.publish("writer", keys_of(text), allocated[1])
    allocator.free("writer")
    return allocated[0]


def counts(allocator: Allocator) -> tuple[int, int, int]:
    allocator.check()
    return allocator.num_free, allocator.num_cached, allocator.num_owned


def known(allocator: Allocator, text: str) -> int:
    return allocator.match_prefix(keys_of(text))


def test_every_page_but_the_scratch_pages_is_handed_out_once() -> None:
    allocator = Allocator(10, PAGE, scratch=3)
    first, second = allocator.allocate("a", 4), allocator.allocate("b", 3)
    assert first
    assert second
    assert sorted(first[0] + second[0]) == list(range(7))
    assert counts(allocator) == (0, 0, 7)
    assert allocator.pages("a") == first[0]
    assert allocator.allocate("c", 1) is None
    allocator.free("a")
    assert counts(allocator) == (4, 0, 3)


def test_what_does_not_fit_changes_nothing() -> None:
    allocator = Allocator(6, PAGE, scratch=0)
    cache_text(allocator, "abcd")
    # Its four known pages are not there to be evicted for the other three.
    assert allocator.allocate("x", 7, keys_of("abcd")) is None
    assert counts(allocator) == (2, 4, 0)
    assert known(allocator, "abcd") == 4
    assert allocator.allocate("x", 6, keys_of("abcd"))
    assert counts(allocator) == (0, 0, 6)


def test_known_pages_are_shared_up_to_the_first_unknown_one() -> None:
    allocator = Allocator(20, PAGE, scratch=0)
    pages = cache_text(allocator, "abc")
    first = allocator.allocate("x", 5, keys_of("abxy"))
    second = allocator.allocate("y", 4, keys_of("abcd"))
    assert first
    assert second
    assert (first[0][:2], first[1]) == (pages[:2], 2)
    assert (second[0][:3], second[1]) == (pages[:3], 3)
    assert not set(first[0][2:]) & set(second[0])
    assert counts(allocator) == (13, 0, 7)
    allocator.free("x")
    assert counts(allocator) == (16, 0, 4)
    allocator.free("y")
    assert counts(allocator) == (17, 3, 0)


def test_a_prefix_longer_than_what_is_asked_for_is_cut() -> None:
    allocator = Allocator(8, PAGE, scratch=0)
    pages = cache_text(allocator, "abc")
    assert allocator.allocate("x", 2, keys_of("abc")) == (pages[:2], 2)
    assert counts(allocator) == (5, 1, 2)


def test_published_pages_are_known_before_their_owner_leaves() -> None:
    allocator = Allocator(8, PAGE, scratch=0)
    allocated = allocator.allocate("x", 3)
    assert allocated
    allocator.publish("x", keys_of("ab"), 0)
    assert known(allocator, "abc") == 2
    allocator.publish("x", keys_of("abc"), 2)
    assert known(allocator, "abc") == 3
    assert allocator.allocate("y", 3, keys_of("abc")) == (allocated[0], 3)


def test_without_a_prefix_cache_nothing_is_known() -> None:
    allocator = Allocator(8, PAGE, scratch=0, prefix_cache=False)
    cache_text(allocator, "abc")
    assert known(allocator, "abc") == 0
    assert counts(allocator) == (8, 0, 0)


def test_the_first_of_two_equal_pages_stays_known() -> None:
    allocator = Allocator(8, PAGE, scratch=0)
    first, second = allocator.allocate("x", 2), allocator.allocate("y", 2)
    assert first
    assert second
    allocator.publish("x", keys_of("ab"), 0)
    allocator.publish("y", keys_of("ab"), 0)
    allocator.free("y")
    assert counts(allocator) == (6, 0, 2)
    assert allocator.allocate("z", 2, keys_of("ab")) == (first[0], 2)


def test_a_page_is_not_published_with_two_contents() -> None:
    allocator = Allocator(8, PAGE, scratch=0)
    allocator.allocate("x", 2)
    allocator.publish("x", keys_of("ab"), 0)
    with pytest.raises(ValueError, match="published already"):
        allocator.publish("x", keys_of("cd"), 0)


def test_eviction_takes_the_end_of_the_least_recently_used_text() -> None:
    allocator = Allocator(6, PAGE, scratch=0)
    cache_text(allocator, "abc")
    cache_text(allocator, "xyz")
    for own, (abc, xyz) in enumerate([(3, 3), (2, 3), (1, 3), (0, 3), (0, 2), (0, 1), (0, 0)]):
        assert allocator.allocate("new", own)
        assert (known(allocator, "abc"), known(allocator, "xyz")) == (abc, xyz)
        allocator.check()
        allocator.free("new")


def test_use_makes_a_text_recent() -> None:
    allocator = Allocator(6, PAGE, scratch=0)
    cache_text(allocator, "abc")
    cache_text(allocator, "xyz")
    cache_text(allocator, "ab")
    assert allocator.allocate("new", 1)
    # "c" was used least recently, and has no continuation.
    assert (known(allocator, "abc"), known(allocator, "xyz")) == (2, 3)
    allocator.free("new")
    assert allocator.allocate("new", 4)
    assert (known(allocator, "abc"), known(allocator, "xyz")) == (2, 0)


def test_a_page_is_evicted_after_its_cached_continuation_though_it_was_used_before() -> None:
    allocator = Allocator(6, PAGE, scratch=0)
    allocator.allocate("first", 1)
    allocator.allocate("second", 2)  # reads "a" again, side by side with the first
    allocator.publish("first", keys_of("a"), 0)
    allocator.publish("second", keys_of("ab"), 0)
    allocator.free("first")
    allocator.free("second")
    assert counts(allocator) == (4, 2, 0)
    assert allocator.allocate("new", 5)
    assert known(allocator, "ab") == 1


def test_books_stay_small_while_a_prefix_is_reused() -> None:
    allocator = Allocator(6, PAGE, scratch=0)
    for _ in range(200):
        cache_text(allocator, "abc")
    assert len(allocator._leaves) <= 2 * 6 + 1
    assert allocator.allocate("new", 6)
    assert known(allocator, "abc") == 0


@pytest.mark.parametrize(("length", "shared", "copied"), [(8, 2, False), (9, 2, True), (11, 2, True), (3, 0, True)])
def test_fork_shares_full_pages_and_copies_the_partial_one(length: int, shared: int, copied: bool) -> None:
    allocator = Allocator(10, PAGE, scratch=0)
    allocator.allocate("parent", 4)
    parent = allocator.pages("parent")
    forked = allocator.fork("parent", "child", 5, length)
    assert forked
    pages, copy = forked
    assert pages[:shared] == parent[:shared]
    assert not set(pages[shared:]) & set(parent)
    assert copy == ((parent[shared], pages[shared]) if copied else None)
    assert counts(allocator) == (10 - 4 - 5 + shared, 0, 4 + 5 - shared)
    allocator.free("parent")
    assert counts(allocator) == (5, 0, 5)
    allocator.free("child")
    assert counts(allocator) == (10, 0, 0)


def test_a_fork_that_does_not_fit_changes_nothing() -> None:
    allocator = Allocator(6, PAGE, scratch=0)
    allocator.allocate("parent", 4)
    assert allocator.fork("parent", "child", 5, 9) is None
    assert counts(allocator) == (2, 0, 4)


def test_an_owner_has_one_table() -> None:
    allocator = Allocator(6, PAGE, scratch=0)
    allocator.allocate("x", 2)
    with pytest.raises(ValueError, match="owns pages already"):
        allocator.allocate("x", 2)


@pytest.mark.parametrize(("pages", "page_size", "scratch"), [(4, 4, 5), (4, 0, 1), (4, 4, -1)])
def test_impossible_pools(pages: int, page_size: int, scratch: int) -> None:
    with pytest.raises(ValueError, match="no pool"):
        Allocator(pages, page_size, scratch=scratch)


def test_keys_are_a_chain_over_full_pages() -> None:
    tokens = list(range(4 * PAGE))
    keys = prefix_keys(tokens, PAGE, b"salt")
    assert len(keys) == len(set(keys)) == 4
    for length in range(4 * PAGE + 1):
        assert prefix_keys(tokens[:length], PAGE, b"salt") == keys[: length // PAGE]
    assert prefix_keys(tuple(tokens), PAGE, b"salt") == keys
    assert not set(prefix_keys(tokens, PAGE, b"other")) & set(keys)
    for changed in range(4 * PAGE):
        other = prefix_keys([*tokens[:changed], 99, *tokens[changed + 1 :]], PAGE, b"salt")
        same = changed // PAGE
        assert other[:same] == keys[:same]
        assert not set(other[same:]) & set(keys)
    root = hashlib.blake2b(b"salt", digest_size=32).digest()
    page = b"".join(token.to_bytes(4, "little") for token in range(PAGE))
    assert keys[0] == hashlib.blake2b(root + page, digest_size=32).digest()


@dataclasses.dataclass(eq=False)
class ModelPage:
    """A page of the naive model."""

    owners: int = 1
    key: bytes | None = None
    used: int = 0


class AllocatorMachine(RuleBasedStateMachine):
    """Any order of calls, against a model whose pages are objects and which searches where the allocator counts."""

    @initialize(pages=st.sampled_from([4, 6, 8, 12]), scratch=st.integers(0, 2))
    def start(self, pages: int, scratch: int) -> None:
        self.allocator = Allocator(pages + scratch, PAGE, scratch=scratch)
        self.free_pages = pages
        self.tables: dict[str, list[ModelPage]] = {}
        self.texts: dict[str, tuple[str, int]] = {}  # text, and how many pages of it were published
        self.cached: list[ModelPage] = []
        self.id_of: dict[ModelPage, int] = {}
        self.clock = self.count = 0

    def find(self, key: bytes) -> ModelPage | None:
        pages = [page for table in self.tables.values() for page in table] + self.cached
        return next((page for page in pages if page.key == key), None)

    def take(self, name: str, shared: list[ModelPage], own: int) -> None:
        """The model's side of a success."""
        for page in shared:
            page.owners += 1
            if page in self.cached:
                self.cached.remove(page)
        while self.free_pages < own:
            leaves = [page for page in self.cached if not any(self.continues(other, page) for other in self.cached)]
            self.cached.remove(min(leaves, key=lambda page: page.used))
            self.free_pages += 1
        self.free_pages -= own
        self.tables[name] = shared + [ModelPage() for _ in range(own)]

    @staticmethod
    def continues(page: ModelPage, parent: ModelPage) -> bool:
        assert page.key
        return page.key[:-1] == parent.key

    def compare_pages(self, name: str, pages: list[int]) -> None:
        assert pages == self.allocator.pages(name)
        for page, number in zip(self.tables[name], pages, strict=True):
            assert self.id_of.setdefault(page, number) == number
        numbers = {self.id_of[page] for table in self.tables.values() for page in table}
        assert len(numbers) == len({id(page) for table in self.tables.values() for page in table})

    @rule(
        text=st.builds("{}{}".format, st.sampled_from(["", "a", "aa", "aaaa"]), st.text("ab", max_size=2)),
        more=st.sampled_from([0, 1, 4]),
        reusable=st.sampled_from([0, 1, 6]),
    )
    def allocate(self, text: str, more: int, reusable: int) -> None:
        self.allocate_pages(text, more, reusable)

    def allocate_pages(self, text: str, more: int, reusable: int) -> str | None:
        self.count += 1
        name, keys = f"owner {self.count}", keys_of(text)[:reusable]
        shared: list[ModelPage] = []
        for key in keys:
            page = self.find(key)
            if page is None:
                break
            shared.append(page)
        own = len(text) + more - len(shared)
        allocated = self.allocator.allocate(name, len(text) + more, keys)
        if own > self.free_pages + sum(page not in shared for page in self.cached):
            assert allocated is None
            return None
        assert allocated
        assert allocated[1] == len(shared)
        self.take(name, shared, own)
        self.texts[name] = (text, len(shared))
        self.compare_pages(name, allocated[0])
        return name

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), number=st.sampled_from([1, 2, 6]))
    def publish(self, data: st.DataObject, number: int) -> None:
        self.publish_pages(data.draw(st.sampled_from(sorted(self.tables))), number)

    @rule(text=st.sampled_from(["aa", "ab", "aba"]))
    def read_side_by_side(self, text: str) -> None:
        """Two owners of the same text, whose known pages are some of the one and some of the other."""
        first, second = self.allocate_pages(text[:1], 0, 0), self.allocate_pages(text, 0, 0)
        for name in (first, second):
            if name:
                self.publish_pages(name, len(text))

    def publish_pages(self, name: str, number: int) -> None:
        text, first = self.texts[name]
        keys = keys_of(text)[: first + number]
        self.allocator.publish(name, keys, first)
        for key, page in list(zip(keys, self.tables[name], strict=False))[first:]:
            if self.find(key) is None:
                page.key = key
        self.texts[name] = (text, max(first, len(keys)))

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), more=st.integers(0, 4))
    def fork(self, data: st.DataObject, more: int) -> None:
        parent = data.draw(st.sampled_from(sorted(self.tables)))
        text, first = self.texts[parent]
        table = self.tables[parent]
        length = data.draw(st.integers(0, len(table) * PAGE))
        full, own = length // PAGE, more + bool(length % PAGE)
        self.count += 1
        name = f"owner {self.count}"
        forked = self.allocator.fork(parent, name, full + own, length)
        if own > self.free_pages + len(self.cached):
            assert forked is None
            return
        assert forked
        self.take(name, table[:full], own)
        self.texts[name] = (text[:full], min(first, full))
        self.compare_pages(name, forked[0])
        ids = self.allocator.pages(parent)
        assert forked[1] == ((ids[full], forked[0][full]) if length % PAGE else None)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.tables)))
        self.allocator.free(name)
        del self.texts[name]
        for page in reversed(self.tables.pop(name)):
            page.owners -= 1
            if page.owners:
                continue
            if page.key is None:
                self.free_pages += 1
                continue
            self.clock += 1
            page.used = self.clock
            self.cached.append(page)

    @invariant()
    def compare(self) -> None:
        if not hasattr(self, "allocator"):
            return
        owned = len({id(page) for table in self.tables.values() for page in table})
        assert counts(self.allocator) == (self.free_pages, len(self.cached), owned)
        for page in self.cached:
            assert page.key
            chain = keys_of(page.key.decode())
            missing = [key for key in chain if self.find(key) is None]
            assert self.allocator.match_prefix(chain) == (chain.index(missing[0]) if missing else len(chain))


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
