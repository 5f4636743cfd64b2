"""A device for tests of the scheduler: it computes nothing, runs late, and records what the pool holds."""

import functools
from collections import deque
from collections.abc import Iterator

from lychee_jax.engine.request import Request
from lychee_jax.engine.scheduler import Chunk, DecodeRow, Work

# What a position holds: what a dense prefill wrote (a hash of all tokens up to it), or what a request's decoding wrote.
type Content = int | tuple[int, int]


def prefix_hashes(request: Request) -> tuple[int, ...]:
    """What a dense prefill writes at each position of the prompt: it depends on everything up to there."""
    return _prefix_hashes(request.prompt, request.cache_salt)


@functools.lru_cache(1000)
def _prefix_hashes(prompt: tuple[int, ...], salt: bytes) -> tuple[int, ...]:
    hashes = [hash(salt)]
    for token in prompt:
        hashes.append(hash((hashes[-1], token)))
    return tuple(hashes[1:])


def text_length(request: Request) -> int:
    """New tokens of a request whose text is forced, the one that ends it included."""
    ends = [index + 1 for index, token in enumerate(request.forced) if token in request.eos_ids]
    return min([*ends, request.max_new_tokens])


class SimulatedDevice:
    """Runs works in the order sent, `lag` works later than sent, and checks what each of them finds in the pool."""

    def __init__(self, num_pages: int, page_size: int, block_steps: int, *, lag: int = 2) -> None:
        self._page_size = page_size
        self._block_steps = block_steps
        self._lag = lag
        self._pool: list[list[Content | None]] = [[None] * page_size for _ in range(num_pages)]
        self._slots: dict[int, tuple[int, int]] = {}  # slot: whose newest token it has, and how many there are
        self._queue: deque[Work] = deque()
        self.read: list[Request] = []  # whose tokens were read, a request for each block

    def send(self, work: Work) -> Iterator[Request]:
        """Take a work; yields the requests whose ends are read now, because the works that reach them have run."""
        self._queue.append(work)
        while len(self._queue) > self._lag:
            yield from self._run(self._queue.popleft())

    def drain(self) -> Iterator[Request]:
        """Run what was sent; yields the requests whose ends are read."""
        while self._queue:
            yield from self._run(self._queue.popleft())

    def _run(self, work: Work) -> Iterator[Request]:
        chunks = work.prefill.chunks if work.prefill else ()
        for chunk in chunks:  # nothing that another chunk of the same program writes can be read
            self._read(chunk, chunk.start)
        for chunk in chunks:
            self._write_chunk(chunk)
        for source, target in work.copies:
            self._pool[target] = list(self._pool[source])
        for chunk in chunks:
            for start in [chunk, *chunk.forks] if chunk.last else ():
                self._slots[start.slot] = (id(start.request), 1)
                self.read.append(start.request)
                if text_length(start.request) == 1:
                    yield start.request
        for block in work.decode:
            for row in block.rows:
                self.read.append(row.request)
                if self._decode(row, 1 if block.guided else self._block_steps):
                    yield row.request

    def _locate(self, pages: tuple[int, ...], position: int) -> tuple[list[Content | None], int]:
        return self._pool[pages[position // self._page_size]], position % self._page_size

    def _read(self, row: Chunk | DecodeRow, length: int) -> None:
        """The first `length` positions must hold what this request, or one with the same prefix, wrote there."""
        found = [content for page in row.pages for content in self._pool[page]][:length]
        prompt = prefix_hashes(row.request)[:length]
        expected = [*prompt, *((id(row.request), position) for position in range(len(prompt), length))]
        assert found == expected, f"{row} reads {found}, not {expected}"

    def _write_chunk(self, chunk: Chunk) -> None:
        hashes = prefix_hashes(chunk.request)
        for position in range(chunk.start, chunk.start + chunk.count):
            page, offset = self._locate(chunk.pages, position)
            page[offset] = hashes[position]

    def _decode(self, row: DecodeRow, steps: int) -> bool:
        """Run a row's part of a block; whether its text ends in it."""
        length = text_length(row.request)
        owner, step = self._slots[row.slot]
        assert owner == id(row.request), f"{row} finds another request in its slot"
        if step == length:
            return False  # it ended in a block that the host has not read yet
        assert step == row.step, f"{row} finds {step} tokens in its slot"
        end = min(step + steps, length)
        for position in range(row.position, row.position + end - step):
            page, offset = self._locate(row.pages, position)
            page[offset] = (id(row.request), position)
        self._read(row, row.position + end - step)
        self._slots[row.slot] = (owner, end)
        return end == length
