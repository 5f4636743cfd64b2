"""Generation: token ids in, token ids out. The host prepares, sends the next block of steps before it reads the last
one, and never decides anything a step would have to wait for.
"""

import collections
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.cache.allocator import CacheLayout, next_power_of_two, pages_for
from lychee_jax.cache.pages import make_pools
from lychee_jax.engine.compile_timer import Caller
from lychee_jax.engine.kernel_support import refuse_uncovered
from lychee_jax.engine.options import GenerateOptions
from lychee_jax.engine.outputs import Prefilled, Result, Step, Timing
from lychee_jax.engine.programs import (
    Block,
    DecodePlan,
    Pools,
    Rows,
    correct_cache,
    decode_block,
    first_token,
    prefill_chunk,
)
from lychee_jax.errors import UserError
from lychee_jax.models.decoder import Decoder
from lychee_jax.models.rope import rotary_tables
from lychee_jax.models.spec import ModelSpec

# Tokens that one prefill program takes: bounds its temporaries.
_CHUNK_TOKENS = {"cpu": 512, "gpu": 4096, "tpu": 2048}
# Rows that a decode program has at least; the others are idle. XLA's CPU backend multiplies a single row by another
# routine than several, and a row must not come out differently when it is alone. On GPUs XLA makes sums of products out
# of the products with a single row and fuses them into whatever follows: a step of an 8 B model took 8.8 ms, not 5.2.
_LEAST_ROWS = {"cpu": 2, "gpu": 2}
# Decode steps that one program runs before the host hears of them.
BLOCK_STEPS = 8
# `auto` is dense below this many tokens, and below 5/4 of the budget: up to the budget both ways read the same, and
# hybrid decoding selects besides. The CPU's and the GPU's figures are measured (docs/results.md); of TPUs nothing is
# known yet.
_DENSE_BELOW = {"cpu": 1024, "gpu": 16384, "tpu": 16384}


class _Progress:
    """Tells how many prompt tokens the device has read, and keeps the host one chunk ahead of it, not more."""

    def __init__(self, total: int, report: Callable[[int, int], None] | None):
        self._total, self._done = total, 0
        self._report = report or (lambda done, total: None)
        self._waiting: tuple[jax.Array, int] | None = None
        self._report(0, total)

    def sent(self, marker: jax.Array, count: int) -> None:
        """Another chunk of `count` tokens is on its way; wait for the one before it."""
        self.wait()
        self._waiting = (marker, count)

    def wait(self) -> None:
        """Wait for the chunk that was sent last."""
        if self._waiting is not None:
            marker, count = self._waiting
            marker.block_until_ready()
            self._done += count
            self._report(self._done, self._total)
            self._waiting = None


def idle_rows(batch: int) -> int:
    """How many rows a decode program on this machine needs besides `batch` real ones."""
    return max(0, _LEAST_ROWS.get(jax.default_backend(), 1) - batch)


def takes_dense_steps(options: GenerateOptions, lengths: np.ndarray) -> np.ndarray:
    """Which rows take dense steps at these lengths; the choice for a row never depends on other rows."""
    if options.attention == "dense" or options.heads is None or options.heads.is_dense:
        return np.full(lengths.shape, options.attention != "hybrid" or options.heads is None)
    if options.attention == "hybrid":
        return np.zeros(lengths.shape, bool)
    budget = options.policy.budget
    return lengths < max(_DENSE_BELOW.get(jax.default_backend(), 1024), budget + budget // 4)


class Engine:
    """A model ready to generate."""

    def __init__(self, model: Decoder):
        self.config = model.config
        self.spec, self.weights = ModelSpec.split(model)

    @property
    def dtype(self) -> np.dtype:
        """Of weights, activations and cache."""
        return self.weights[0].dtype

    def check_prompts(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        """Raise UserError for prompts that this model cannot take."""
        if not prompts:
            raise UserError("there is no prompt; give at least one")
        for row, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise UserError(f"prompt {row} is empty; every prompt needs at least one token")
            for token in prompt:
                if not isinstance(token, int | np.integer):
                    raise UserError(f"prompt {row} has {token!r}; token ids are whole numbers")
                if not 0 <= token < self.config.vocab_size:
                    raise UserError(
                        f"prompt {row} has token id {token}; the vocabulary has ids 0 to {self.config.vocab_size - 1}"
                    )
        longest = max(len(prompt) for prompt in prompts)
        if longest + max_new_tokens > self.config.max_tokens:
            raise UserError(
                f"the longest prompt has {longest} tokens; with {max_new_tokens} new ones that exceeds "
                f"the model's limit of {self.config.max_tokens}"
            )

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        page_size: int = 64,
        on_prefill: Callable[[int, int], None] | None = None,
        implementation: str | None = None,
    ) -> Prefilled:
        """Read prompts into a fresh cache with room for `max_new_tokens` more; `on_prefill(done, total)` in tokens.

        `implementation`: None takes the platform's kernels where they fit, "xla" none.
        """
        self.check_prompts(prompts, max_new_tokens)
        if page_size < 1:
            raise UserError(f"page size is {page_size}; it must be at least 1")
        started, call = time.perf_counter(), Caller(self.dtype)
        rows = [list(prompt) for prompt in prompts]
        shared = self._shared_tokens(rows, page_size)
        idle = idle_rows(len(rows))
        needs = [len(row) + max_new_tokens for row in rows] + [shared] * idle
        layout = CacheLayout.plan(needs, page_size, shared=shared // page_size)
        pools = make_pools(self.config, layout.num_pages, page_size, self.dtype)
        table = jnp.asarray(layout.page_table)
        progress = _Progress(shared + sum(len(row) - shared for row in rows), on_prefill)
        if shared:
            pools, _ = self._feed(call, pools, table[:1], rows[0], 0, shared, page_size, progress, implementation)
        lasts = []
        for index, row in enumerate(rows):
            # Row by row, in the same chunks as alone: what a row becomes does not depend on its company.
            own = table[index : index + 1]
            pools, last = self._feed(call, pools, own, row, shared, len(row), page_size, progress, implementation)
            lasts.append(last)
        progress.wait()
        last = jnp.concatenate([*lasts, *[jnp.zeros_like(lasts[0])] * idle])
        elapsed = time.perf_counter() - started - call.seconds
        return Prefilled(rows, page_size, max_new_tokens, pools, table, last, elapsed, call.seconds)

    def _chunk(self, length: int, page_size: int) -> int:
        """Tokens that one program takes of a prompt of `length` tokens: whole pages, a power of two of them."""
        most = max(1, _CHUNK_TOKENS.get(jax.default_backend(), 512) // page_size)
        return page_size * min(most, next_power_of_two(pages_for(length, page_size)))

    def _shared_tokens(self, rows: list[list[int]], page_size: int) -> int:
        """Whole chunks that all rows begin with, read once for all; every row keeps at least one token of its own."""
        longest = max(len(row) for row in rows)
        stretched = self.config.rope.kind == "dynamic" and longest > self.config.max_position_embeddings
        if len(rows) == 1 or stretched:  # a dynamic base makes keys depend on the whole prompt
            return 0
        shortest = min(len(row) for row in rows) - 1
        matrix = np.asarray([row[:shortest] for row in rows])
        differs = np.flatnonzero((matrix != matrix[:1]).any(axis=0))
        common = int(differs[0]) if differs.size else shortest
        chunk = self._chunk(longest, page_size)
        return common // chunk * chunk

    def _feed(
        self,
        call: Caller,
        pools: Pools,
        table: jax.Array,
        row: list[int],
        first: int,
        end: int,
        page_size: int,
        progress: "_Progress",
        implementation: str | None,
    ) -> tuple[Pools, jax.Array]:
        """Send a row's tokens `first … end` through the prefill program, chunk by chunk."""
        chunk = self._chunk(len(row), page_size)
        last = jnp.zeros((1, self.config.hidden_size), self.dtype)
        for start in range(first, end, chunk):
            count = min(chunk, end - start)
            tokens = np.zeros((1, chunk), np.int32)
            tokens[0, :count] = row[start : start + count]
            cos, sin = self.rotary(start + np.arange(chunk)[None], np.asarray([len(row)]))
            pools, last = call(
                prefill_chunk, self.spec, self.weights, pools, table, tokens, cos, sin,
                np.asarray([start], np.int32), np.asarray([count], np.int32), implementation,
            )  # fmt: skip
            progress.sent(last, count)
        return pools, last

    def rotary(self, positions: np.ndarray, lengths: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines `[B, T, half]` at `positions [B, T]` of texts of `lengths` tokens."""
        config = self.config
        cos, sin = rotary_tables(config.rope, config.head_dim, config.max_position_embeddings, positions, lengths)
        return jnp.asarray(cos), jnp.asarray(sin)

    def decode(self, prefilled: Prefilled, options: GenerateOptions, *, keep: bool = False) -> "Stream":
        """Generate from a filled cache. With `keep`, the cache is copied first and can be decoded again."""
        if options.max_new_tokens > prefilled.capacity:
            raise UserError(
                f"the cache has room for {prefilled.capacity} new tokens; {options.max_new_tokens} were asked for"
            )
        return Stream(self, prefilled, self.claim(prefilled, options, keep=keep), options)

    def claim(self, prefilled: Prefilled, options: GenerateOptions, *, keep: bool) -> Pools:
        """Take the pools out of a filled cache, or copies of them with `keep`, for decoding with these options."""
        if options.page_size != prefilled.page_size:
            raise UserError(f"the cache has pages of {prefilled.page_size} tokens, not {options.page_size}")
        if options.heads is not None:
            options.heads.check(self.config)
        if prefilled.pools is None:
            raise UserError("this cache was decoded already; prefill again, or decode it with keep=True")
        if keep:
            return tuple(jnp.copy(pool) for pool in prefilled.pools)
        pools, prefilled.pools = prefilled.pools, None
        return pools

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        options: GenerateOptions,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> "Stream":
        """Prefill, then iterate over the new tokens as they come.

        Raises:
            NotImplementedError: the implementation that `options` name does not cover this model on this machine.
        """
        self.check_implementation(prompts, options)
        prefilled = self.prefill(
            prompts, max_new_tokens=options.max_new_tokens, page_size=options.page_size, on_prefill=on_prefill,
            implementation=options.extend_implementation,
        )  # fmt: skip
        return self.decode(prefilled, options)

    def check_implementation(self, prompts: Sequence[Sequence[int]], options: GenerateOptions) -> None:
        """Raise NotImplementedError if the named implementation does not cover these prompts on this machine."""
        if options.implementation is None or not prompts:
            return
        batch = len(prompts) + idle_rows(len(prompts))
        pages = next_power_of_two(pages_for(max(map(len, prompts)) + options.max_new_tokens, options.page_size))
        refuse_uncovered(
            options.implementation, self.config, self.dtype, options.policy, batch=batch, pages=pages,
            page_size=options.page_size,
        )  # fmt: skip

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        options: GenerateOptions,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Result:
        """Prefill and decode to the end."""
        stream = self.stream(prompts, options, on_prefill)
        for _ in stream:
            pass
        return stream.result()


class Stream(Iterator[Step]):
    """The tokens of one generation as they come: iterate, `finish(row)` to end a row early, then `result()`."""

    def __init__(self, engine: Engine, prefilled: Prefilled, pools: Pools, options: GenerateOptions):
        self._engine = engine
        self._options = options
        self._table = prefilled.page_table
        self._pools = pools
        self._prefill_s = prefilled.prefill_s
        batch, width = len(prefilled.prompts), prefilled.page_table.shape[0]
        self._prompt_lengths = np.asarray([len(prompt) for prompt in prefilled.prompts] + [0] * (width - batch))
        self._running = np.arange(width) < batch
        self._tokens: list[list[int]] = [[] for _ in range(batch)]
        self._logprobs: list[list[float]] = [[] for _ in range(batch)]
        self._pages_read = 0
        self._pages_held = 0
        self._call = Caller(engine.dtype)
        self._compiled_before = prefilled.compile_s
        self._finished_at = self._decoding_since = time.perf_counter()
        self._sampling = options.sampling.arrays()
        eos = () if options.ignore_eos else options.eos_ids
        # Padded with an id that no token has, so that --ignore-eos compiles nothing new.
        width = max(4, next_power_of_two(len(eos)))
        self._eos = jnp.asarray([*eos, *[-1] * (width - len(eos))], jnp.int32)
        self._steps = self._generate(prefilled)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Step:
        return next(self._steps)

    def finish(self, row: int) -> None:
        """End a row after the tokens already handed out."""
        self._running[row] = False

    def result(self) -> Result:
        """Everything handed out so far."""
        decode_s = max(0.0, self._finished_at - self._decoding_since - self._call.seconds)
        count = sum(len(row) for row in self._tokens) - len(self._tokens)
        options, config = self._options, self._engine.config
        heads = options.heads or HeadMap.all(config)
        return Result(
            [list(row) for row in self._tokens],
            [list(row) for row in self._logprobs],
            Timing(
                self._prefill_s,
                decode_s,
                count / decode_s if count > 0 and decode_s > 0 else 0.0,
                self._compiled_before + self._call.seconds,
            ),
            {
                "mode": options.attention,
                "heads": heads.model,
                "retrieval_heads": heads.num_retrieval,
                "kv_heads": heads.num_layers * heads.num_kv_heads,
                "page_size": options.page_size,
                "budget": options.policy.budget,
                "sink": options.policy.sink,
                "recent": options.policy.recent,
                "rule": options.policy.rule,
                "correct_every": options.correct_every,
                "kv_read_share": self._pages_read / self._pages_held if self._pages_held else 1.0,
            },
        )

    def _generate(self, prefilled: Prefilled) -> Iterator[Step]:
        engine, options = self._engine, self._options
        kind = options.sampling.kind
        width = len(self._running)
        seen = None
        if kind.penalised:
            table = np.zeros((width, engine.config.vocab_size), bool)
            for row, prompt in enumerate(prefilled.prompts):
                table[row, prompt] = True
            seen = jnp.asarray(table)
        rows = Rows(
            token=jnp.zeros((width,), jnp.int32),
            positions=jnp.asarray(self._prompt_lengths, jnp.int32),
            active=jnp.array(self._running),  # a copy: the host changes its own
            step=jnp.zeros((width,), jnp.int32),
            seen=seen,
        )
        rows, block = self._call(
            first_token, engine.spec, kind, engine.weights, prefilled.last, rows, self._sampling, self._eos
        )
        yield from self._receive(0, 1, (block,))
        self._decoding_since, self._compiled_before = self._finished_at, self._compiled_before + self._call.seconds
        self._call.seconds = 0.0
        waiting: collections.deque[tuple[int, int, tuple[Block, ...]]] = collections.deque()
        sent, size = 1, options.correct_every or BLOCK_STEPS
        while self._running.any() and (waiting or sent < options.max_new_tokens):
            # Two blocks are on their way while the host reads: the device never waits for it.
            while sent < options.max_new_tokens and len(waiting) < 2:
                count = min(size, options.max_new_tokens - sent)
                rows, blocks = self._send(rows, sent, count, size)
                waiting.append((sent, count, blocks))
                sent += count
            yield from self._receive(*waiting.popleft())

    def _send(self, rows: Rows, first: int, count: int, size: int) -> tuple[Rows, tuple[Block, ...]]:
        """Start up to `count` steps, in one program, or in two where only some rows are dense."""
        engine, options = self._engine, self._options
        begin = np.maximum(self._prompt_lengths + first - 1, 0)
        positions = begin[:, None] + np.arange(size)
        cos, sin = engine.rotary(positions, positions + 1)
        dense = takes_dense_steps(options, begin + 1)
        fed = rows.token
        blocks = []
        for is_dense in (True, False):
            chosen = self._running & (dense == is_dense)
            if not chosen.any():
                continue
            heads = None if is_dense else (options.heads or HeadMap.all(engine.config))
            plan = DecodePlan(heads, options.policy, options.sampling.kind, size, options.implementation)
            self._pools, rows, block = self._call(
                decode_block, engine.spec, plan, engine.weights, self._pools, rows, self._table, cos, sin,
                jnp.asarray(chosen), self._sampling, self._eos, jnp.int32(count),
            )  # fmt: skip
            blocks.append(block)
        if options.correct_every and count == size:
            newest = blocks[0].tokens if len(blocks) == 1 else jnp.maximum(blocks[0].tokens, blocks[1].tokens)
            tokens = jnp.concatenate([fed[None], newest[:-1]]).T
            self._pools = self._call(
                correct_cache, engine.spec, engine.weights, self._pools, self._table, jnp.maximum(tokens, 0), cos, sin,
                jnp.asarray(begin, jnp.int32), rows.active & jnp.array(self._running),
                self._options.extend_implementation,
            )  # fmt: skip
        return rows, tuple(blocks)

    def _receive(self, first: int, count: int, blocks: tuple[Block, ...]) -> Iterator[Step]:
        """Wait for a block and hand its steps out, leaving out rows that were finished meanwhile."""
        tokens = np.max([np.asarray(block.tokens) for block in blocks], axis=0)
        logprobs = np.sum([np.asarray(block.logprobs) for block in blocks], axis=0, dtype=np.float32)
        read = np.sum([np.asarray(block.pages_read) for block in blocks], axis=0)
        self._finished_at = time.perf_counter()
        config, page_size = self._engine.config, self._options.page_size
        heads = config.num_layers * config.num_kv_heads
        for i in range(count):
            alive = self._running & (tokens[i] >= 0)
            if not alive.any():
                self._running[:] = False
                return
            self._running &= alive
            for row in np.flatnonzero(alive):
                self._tokens[row].append(int(tokens[i, row]))
                self._logprobs[row].append(float(logprobs[i, row]))
                if first > 0:
                    length = int(self._prompt_lengths[row]) + first + i
                    self._pages_read += int(read[i, row])
                    self._pages_held += heads * pages_for(length, page_size)
            rows = slice(len(self._tokens))
            found = np.where(alive, tokens[i], -1), np.where(alive, logprobs[i], np.float32(0))
            yield Step(first + i, found[0][rows], found[1][rows])
