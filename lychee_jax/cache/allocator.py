"""Who owns which page of the pool: host only, no JAX."""

import array
import hashlib
import heapq
from collections import Counter
from collections.abc import Sequence


def pages_for(tokens: int, page_size: int) -> int:
    """Pages that hold `tokens` positions."""
    return -(-tokens // page_size)


def next_power_of_two(n: int) -> int:
    """The least power of two ≥ n (≥ 1)."""
    return 1 << max(0, n - 1).bit_length()


def prefix_keys(tokens: Sequence[int], page_size: int, salt: bytes) -> list[bytes]:
    """One key for every full page of `tokens`: a hash of the salt and of all tokens up to the end of that page.

    Args:
        tokens: token ids of a prompt.
        page_size: tokens of a page.
        salt: whatever else decides what a page holds: model fingerprint, dtypes, implementation, adapter.
    """
    data = memoryview(array.array("i", tokens)).cast("B")
    width = page_size * array.array("i").itemsize
    key = hashlib.blake2b(salt, digest_size=32).digest()
    keys = []
    for end in range(width, len(data) + 1, width):
        key = hashlib.blake2b(key + data[end - width : end], digest_size=32).digest()
        keys.append(key)
    return keys


class Allocator:
    """Hands out pages, counts their owners, and keeps what may be read again: the prefix cache.

    An allocatable page is owned (by one sequence or several), cached (nobody's, but its content has a key under which
    it is found), or free. Cached pages are evicted as pages are needed: the least recently used first, but never a
    page whose continuation is cached, since a chain of keys is matched from its start.

    A page may be handed out again at once, even while the device still runs programs of its last owner: programs run
    in the order sent, and the new owner's are sent later. A page that was published but never written, because a
    program failed, would be found all the same: after a device error the allocator is thrown away with the pool.
    """

    def __init__(self, num_pages: int, page_size: int, *, scratch: int, prefix_cache: bool = True) -> None:
        """The last `scratch` of the `num_pages` pages are never handed out."""
        if not 0 <= scratch <= num_pages or page_size < 1:
            raise ValueError(f"no pool has {num_pages} pages of {page_size} tokens, {scratch} of them scratch pages")
        self.page_size = page_size
        self.prefix_cache = prefix_cache
        self.num_allocatable = num_pages - scratch
        self._free = list(range(self.num_allocatable - 1, -1, -1))
        self._owners = [0] * self.num_allocatable  # how many sequences own each page
        self._tables: dict[str, list[int]] = {}
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._parent_of: dict[bytes, bytes | None] = {}  # of published keys
        self._cached: dict[int, int] = {}  # page: when it was last owned
        self._cached_children: Counter[bytes | None] = Counter()
        self._leaves: list[tuple[int, int]] = []  # heap of (when last owned, page); stale entries are skipped
        self._clock = 0

    @property
    def num_free(self) -> int:
        """Pages whose content is of no use."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages without an owner that a prompt with the same prefix can reuse."""
        return len(self._cached)

    @property
    def num_owned(self) -> int:
        """Pages with at least one owner."""
        return self.num_allocatable - len(self._free) - len(self._cached)

    def pages(self, owner_id: str) -> list[int]:
        """An owner's pages, in the order of its positions."""
        return list(self._tables[owner_id])

    def match_prefix(self, keys: Sequence[bytes]) -> int:
        """How many of the first `keys` are known without a gap; takes nothing."""
        matched = 0
        while matched < len(keys) and keys[matched] in self._page_of:
            matched += 1
        return matched

    def allocate(self, owner_id: str, num_pages: int, keys: Sequence[bytes] = ()) -> tuple[list[int], int] | None:
        """Give a new owner `num_pages` pages, the first of which are known ones with the first of `keys`.

        Args:
            owner_id: an owner that has no pages yet.
            num_pages: how many it needs, shared ones included.
            keys: `prefix_keys` of its tokens, cut to what it may reuse.

        Returns:
            its pages and how many of them hold their content already; None, and nothing changes, if they do not fit.
        """
        shared = [self._page_of[key] for key in keys[: min(num_pages, self.match_prefix(keys))]]
        pages = self._take(owner_id, shared, num_pages - len(shared))
        return None if pages is None else (pages, len(shared))

    def fork(
        self, parent_id: str, child_id: str, num_pages: int, length: int
    ) -> tuple[list[int], tuple[int, int] | None] | None:
        """Give a new owner `num_pages` pages that start with the parent's first `length` tokens.

        The full pages are shared. A partial one has to be copied on the device, before either of the two writes on.

        Returns:
            the child's pages, and (source, target) of the copy or None; None, and nothing changes, if they do not fit.
        """
        full, rest = divmod(length, self.page_size)
        parent = self._tables[parent_id]
        pages = self._take(child_id, parent[:full], num_pages - full)
        if pages is None:
            return None
        return pages, (parent[full], pages[full]) if rest else None

    def publish(self, owner_id: str, keys: Sequence[bytes], first: int) -> None:
        """Pages `first …` of the owner hold, for every program sent from now on, the content of `keys[first:]`.

        Called when the chunk that fills them has been sent. A key that another page has already stays with that page.

        Args:
            owner_id: whose pages.
            keys: `prefix_keys` of its tokens from the first page on, up to the last page that is filled.
            first: the first page that is new.
        """
        if not self.prefix_cache:
            return
        table = self._tables[owner_id]
        for index in range(first, len(keys)):
            key, page = keys[index], table[index]
            if key in self._page_of:
                continue
            if page in self._key_of:
                raise ValueError(f"page {page} of {owner_id!r} is published already, with another content")
            self._page_of[key] = page
            self._key_of[page] = key
            self._parent_of[key] = keys[index - 1] if index else None

    def free(self, owner_id: str) -> None:
        """An owner leaves. Of the pages that no other has, published ones stay as cached ones, the rest become free."""
        # From the last page to the first, so that a page is offered only when it has no cached continuation.
        for page in reversed(self._tables.pop(owner_id)):
            self._owners[page] -= 1
            if self._owners[page]:
                continue
            if page not in self._key_of:
                self._free.append(page)
                continue
            self._clock += 1
            self._cached[page] = self._clock
            self._cached_children[self._parent_of[self._key_of[page]]] += 1
            self._offer(page)

    def check(self) -> None:
        """Raise AssertionError if the books are wrong: every page is exactly one of free, cached and owned."""
        owners = Counter(page for table in self._tables.values() for page in table)
        assert all(len(set(table)) == len(table) for table in self._tables.values()), "a sequence has a page twice"
        assert self._owners == [owners[page] for page in range(self.num_allocatable)], "owners miscounted"
        parts = sorted([*self._free, *self._cached, *owners])
        assert parts == list(range(self.num_allocatable)), "a page is lost, or in two states"
        assert len(owners) == self.num_owned, "free + cached + owned is not all"
        assert {page: key for key, page in self._page_of.items()} == self._key_of, "keys and pages differ"
        assert self._parent_of.keys() == self._page_of.keys(), "parents are kept of other keys than the known ones"
        assert not self._key_of.keys() & set(self._free), "a free page has a key"
        assert self._cached.keys() <= self._key_of.keys(), "a cached page has no key"
        children = Counter(self._parent_of[self._key_of[page]] for page in self._cached)
        assert children == self._cached_children, "cached children miscounted"
        leaves = {(stamp, page) for page, stamp in self._cached.items() if not children[self._key_of[page]]}
        assert leaves <= set(self._leaves), "a cached page can never be evicted"

    def _take(self, owner_id: str, shared: list[int], own: int) -> list[int] | None:
        """The one place where pages get an owner: those in `shared` one more, and `own` others their first."""
        if owner_id in self._tables:
            raise ValueError(f"{owner_id!r} owns pages already")
        if own < 0:
            raise ValueError(f"{owner_id!r} would share more pages than it asks for")
        if own > len(self._free) + len(self._cached) - sum(page in self._cached for page in shared):
            return None
        for page in shared:
            if page in self._cached:
                self._uncache(page)
        while len(self._free) < own:
            self._evict()
        pages = shared + [self._free.pop() for _ in range(own)]
        for page in pages:
            self._owners[page] += 1
        self._tables[owner_id] = list(pages)
        return pages

    def _evict(self) -> None:
        """Free the least recently used of the cached pages that have no cached continuation."""
        while True:
            stamp, page = heapq.heappop(self._leaves)
            if self._cached.get(page) == stamp and not self._cached_children[self._key_of[page]]:
                break
        self._uncache(page)
        key = self._key_of.pop(page)
        del self._page_of[key], self._parent_of[key]
        self._free.append(page)

    def _uncache(self, page: int) -> None:
        del self._cached[page]
        parent = self._parent_of[self._key_of[page]]
        self._cached_children[parent] -= 1
        if self._cached_children[parent]:
            return
        del self._cached_children[parent]
        if parent in self._page_of and self._page_of[parent] in self._cached:
            self._offer(self._page_of[parent])

    def _offer(self, page: int) -> None:
        """A cached page may be evicted from now on, unless its continuation is cached."""
        if self._cached_children[self._key_of[page]]:
            return
        if len(self._leaves) > 2 * self.num_allocatable:
            # Prefixes that are reused over and over leave stale entries behind, also if nothing is ever evicted.
            self._leaves = sorted({entry for entry in self._leaves if self._cached.get(entry[1]) == entry[0]})
        heapq.heappush(self._leaves, (self._cached[page], page))
