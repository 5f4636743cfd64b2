"""Requests through the engine as a server gets them: arrivals at random, prompts of mixed lengths; no network.

The same requests are served until a pass compiles nothing: the first warms up, and compile time is reported apart.
"""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lychee_jax.benchmarks.deliveries import Columns, Delivery, columns
from lychee_jax.benchmarks.step import peak_bytes
from lychee_jax.benchmarks.targets import Sense
from lychee_jax.cache.allocator import pages_for
from lychee_jax.cache.pages import cache_bytes
from lychee_jax.config import ModelConfig
from lychee_jax.engine.engine import Engine
from lychee_jax.engine.grammar import Anything
from lychee_jax.engine.options import AttentionMode, AttentionOptions, EngineConfig, EngineOptions
from lychee_jax.engine.request import Request
from lychee_jax.errors import UserError
from lychee_jax.models.spec import ModelSpec

_PASSES = 4
_LATE_TOKENS = 16  # of the prompt that arrives late: what matters is how it is read
_SETTLED_TOKENS = 128  # of every other row before it arrives


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Who comes, and when.

    Attributes:
        requests: how many.
        rate: arrivals a second, with exponential gaps; infinite: all at once.
        prompt_lengths: each request's is drawn from these.
        new_tokens: of each request.
        late: the last request has the longest prompt, the others have the other lengths, and it arrives when all of
            them have decoded for a while.
        shared: tokens with which every prompt begins.

    Raises:
        UserError: a number out of its range.
    """

    requests: int
    rate: float
    prompt_lengths: tuple[int, ...]
    new_tokens: int
    late: bool = False
    shared: int = 0

    def __post_init__(self) -> None:
        if self.requests < 1 + self.late:
            raise UserError(f"--requests is {self.requests}; it must be at least {1 + self.late}")
        if not self.rate > 0:
            raise UserError(f"--rate is {self.rate}; it must be above 0, or inf for all requests at once")
        if min(self.prompt_lengths) < 1:
            raise UserError("--prompt-lengths must be at least 1")
        if self.late and len(set(self.prompt_lengths)) < 2:
            raise UserError("--prompt-lengths needs two lengths here: of the rows that decode, and of the late prompt")
        if self.shared >= min(self.prompt_lengths):
            raise UserError(f"--prompt-lengths must be above the {self.shared} tokens that all prompts share")
        if self.new_tokens < 2:
            raise UserError(f"--new-tokens is {self.new_tokens}; it must be at least 2")


SCENARIOS = {
    "full-batch": Traffic(16, math.inf, (16384,), 2048),
    "long-prompt": Traffic(5, math.inf, (8192, 131072), 2048, late=True),
    "mixed": Traffic(10, 0.25, (8192, 32768, 131072), 256),
    "long-batch": Traffic(6, math.inf, (131072,), 512),
    "shared-prefix": Traffic(6, math.inf, (33280,), 512, shared=32768),
    "guided": Traffic(16, math.inf, (4096,), 512),
}
"""For an accelerator and a model of 8 B; `scenario` makes them fit others."""


def scenario(name: str, config: ModelConfig, platform: str, **changes: Any) -> Traffic:
    """A scenario as this model can take it, changed: on a CPU prompts have an eighth of the length; none exceeds the
    limit.
    """
    traffic = SCENARIOS[name]
    part = 8 if platform == "cpu" else 1
    lengths = tuple(min(length // part, config.max_tokens) for length in traffic.prompt_lengths)
    fitting = {"prompt_lengths": lengths, "shared": traffic.shared // part}
    return dataclasses.replace(traffic, **(fitting | changes))


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A request of the traffic: it arrives at `time`, but not before all earlier ones have got `after_tokens`.

    `guided`: a grammar that allows everything says what may come next.
    """

    prompt: tuple[int, ...]
    new_tokens: int
    time: float = 0.0
    after_tokens: int = 0
    guided: bool = False


@dataclasses.dataclass(frozen=True)
class ServeRow:
    """A run of some traffic; pages are the most that were in use at once, of `pages`. `prompt_tokens_read`: of all
    prompts together, those that the prefix cache did not have.

    `compile_s` and `programs` belong to the passes that warm up, `late_compile_s` to the one that was measured: 0,
    unless every pass met something new. `peak_bytes` counts from the start of the process.
    """

    name: str
    model: str
    dtype: str
    attention: str
    retrieval_heads: int
    kv_heads: int
    page_size: int
    budget: int
    max_num_seqs: int
    rate: float | None
    prompt_tokens: list[int]
    prompt_tokens_read: int
    new_tokens: list[int]
    columns: Columns
    pages: int
    pages_owned: int
    pages_cached: int
    programs: int
    compile_s: float
    late_compile_s: float
    passes: int
    peak_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        """One flat object."""
        row = dataclasses.asdict(self)
        return row | row.pop("columns")


def arrivals(traffic: Traffic, config: ModelConfig, seed: int) -> list[Arrival]:
    """Random prompts; one that leaves no room for its new tokens is cut.

    Raises:
        UserError: a prompt, or the new tokens, beyond the model's limit.
    """
    most, limit = max(traffic.prompt_lengths), config.max_tokens
    if most > limit or traffic.new_tokens >= limit:
        raise UserError(
            f"a prompt of {most} tokens and {traffic.new_tokens} new ones exceed the model's limit of {limit}"
        )
    rng = np.random.default_rng(seed)
    lengths = list(traffic.prompt_lengths)
    if traffic.late:
        lengths = [length for length in lengths if length < most]
    drawn = rng.choice(lengths, traffic.requests).tolist()
    gaps = np.zeros(traffic.requests)
    if math.isfinite(traffic.rate):
        gaps[1:] = rng.exponential(1 / traffic.rate, traffic.requests - 1)
    times = np.cumsum(gaps).tolist()
    new = [traffic.new_tokens] * traffic.requests
    after = [0] * traffic.requests
    if traffic.late:
        drawn[-1], new[-1] = most, min(traffic.new_tokens, _LATE_TOKENS)
        after[-1] = min(_SETTLED_TOKENS, traffic.new_tokens // 2)
    made = []
    shared = rng.integers(0, config.vocab_size, traffic.shared).tolist()
    for length, count, when, settled in zip(drawn, new, times, after, strict=True):
        prompt = shared + rng.integers(0, config.vocab_size, min(length, limit - count) - len(shared)).tolist()
        made.append(Arrival(tuple(prompt), count, when, settled))
    return made


def measure(
    name: str,
    model: str,
    spec: ModelSpec,
    weights: tuple[jax.Array, ...],
    traffic: Traffic,
    attention: AttentionOptions,
    options: EngineOptions,
    *,
    seed: int = 0,
    read_again: bool = True,
    engine_config: EngineConfig | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[ServeRow]:
    """Serve the traffic in one engine, and what the scenario compares it with.

    "long-batch": from an empty cache, and once more when it knows all prompts, so that all rows decode together; of
    `auto` attention hybrid and then dense, which reads the prompts anew only if `read_again` is true. "shared-prefix":
    all at once, and two requests one after the other. "guided": without and with one guided request. All others: the
    traffic, and one request of the shortest prompt alone.

    Raises:
        UserError: traffic that this model or this cache cannot take.
    """
    config = spec.config
    coming = arrivals(traffic, config, seed)
    engine_config = engine_config or EngineConfig.of(jax.default_backend(), config)
    if options.cache_memory is None and jax.default_backend() == "cpu":
        # A cache that grows would recompile every program: it has room from the start for all that can run together.
        rows, page_size = options.max_num_seqs, options.page_size
        needs = sorted(pages_for(len(each.prompt) + each.new_tokens, page_size) for each in coming)
        pages = sum(needs[-rows:]) + engine_config.batch_bucket(rows, rows)
        memory = cache_bytes(config, pages, page_size, weights[0].dtype, options.kv_dtype)
        options = dataclasses.replace(options, cache_memory=memory)
    engine = Engine(spec, weights, options, engine_config)

    def served(name: str, coming: Sequence[Arrival], rate: float = math.inf) -> ServeRow:
        return _measure(engine, name, model, coming, rate, attention, progress)

    if name == "long-batch":
        return _long_batch(engine, model, coming, attention, read_again=read_again, progress=progress)
    if name == "shared-prefix":
        second = dataclasses.replace(coming[1], after_tokens=coming[0].new_tokens)
        return [served(name, coming), served("one after the other", [coming[0], second])]
    if name == "guided":
        one = dataclasses.replace(coming[-1], guided=True)
        return [served("no guided", coming), served("one guided", [*coming[:-1], one])]
    shortest = min(coming, key=lambda each: len(each.prompt))
    alone = dataclasses.replace(shortest, time=0.0, after_tokens=0)
    return [served(name, coming, traffic.rate), served("alone", [alone])]


def _long_batch(
    engine: Engine,
    model: str,
    coming: Sequence[Arrival],
    attention: AttentionOptions,
    *,
    read_again: bool,
    progress: Callable[[str, int, int], None],
) -> list[ServeRow]:
    """Each pass takes minutes, so nothing is served to warm up: what the passes need is compiled before the first."""
    modes: list[AttentionMode] = ["hybrid", "dense"] if attention.mode == "auto" else [attention.mode]
    runs = {mode: _Run(engine, dataclasses.replace(attention, mode=mode)) for mode in modes}
    started, compiling = time.perf_counter(), []
    for run in runs.values():
        requests = [run.request(number, each) for number, each in enumerate(coming)]
        compiling += engine.prepare(requests)
    for future in compiling:
        future.result()
    compile_s = time.perf_counter() - started
    rows = []
    for mode, own in runs.items():
        for name in ("prompts read", "prompts known"):
            if name == "prompts read" and rows and not read_again:
                continue
            if name == "prompts read":
                engine.reset_prefix_cache()
            run, before = _Run(engine, own.attention), engine.compile_seconds
            stage = f"{mode}, {name}"
            run.serve(coming, lambda done, total, stage=stage: progress(stage, done, total))
            late = engine.compile_seconds - before
            rows.append(_row(name, model, run, coming, math.inf, len(compiling), compile_s, late, 1))
    return rows


def _measure(
    engine: Engine,
    name: str,
    model: str,
    coming: Sequence[Arrival],
    rate: float,
    attention: AttentionOptions,
    progress: Callable[[str, int, int], None],
) -> ServeRow:
    """Serve until a pass compiles nothing; the last pass counts."""
    known = engine.runner.programs.count if engine.runner is not None else 0
    compiled = engine.compile_seconds
    passes, before = 0, compiled
    run = _Run(engine, attention)
    while passes < 2 or (passes < _PASSES and engine.compile_seconds > before):
        passes, before = passes + 1, engine.compile_seconds
        engine.reset_prefix_cache()
        run = _Run(engine, attention)
        stage = f"{name}, {'warm-up' if passes == 1 else 'measured'}"
        run.serve(coming, lambda done, total, stage=stage: progress(stage, done, total))
    assert engine.runner is not None
    programs, late = engine.runner.programs.count - known, engine.compile_seconds - before
    return _row(name, model, run, coming, rate, programs, before - compiled, late, passes)


def _row(
    name: str,
    model: str,
    run: "_Run",
    coming: Sequence[Arrival],
    rate: float,
    programs: int,
    compile_s: float,
    late_compile_s: float,
    passes: int,
) -> ServeRow:
    engine, attention = run.engine, run.attention
    model_config, options = engine.spec.config, engine.options
    assert engine.allocator is not None
    kv_heads = model_config.num_layers * model_config.num_kv_heads
    return ServeRow(
        name=name,
        model=model,
        dtype=str(engine.dtype),
        attention=attention.mode,
        retrieval_heads=attention.heads.num_retrieval if attention.heads is not None else kv_heads,
        kv_heads=kv_heads,
        page_size=options.page_size,
        budget=attention.policy.budget,
        max_num_seqs=options.max_num_seqs,
        rate=rate if math.isfinite(rate) else None,
        prompt_tokens=[len(each.prompt) for each in coming],
        prompt_tokens_read=run.prompt_tokens_read,
        new_tokens=[each.new_tokens for each in coming],
        columns=columns(run.arrived, run.deliveries),
        pages=engine.allocator.num_allocatable,
        pages_owned=run.pages_owned,
        pages_cached=run.pages_cached,
        programs=programs,
        compile_s=compile_s,
        late_compile_s=late_compile_s,
        passes=passes,
        peak_bytes=peak_bytes(None),
    )


class _Run:
    """Requests served once, and what was seen of it."""

    def __init__(self, engine: Engine, attention: AttentionOptions):
        self.engine, self.attention = engine, attention
        self.arrived: dict[str, float] = {}
        self.deliveries: list[Delivery] = []
        self.pages_owned = self.pages_cached = self.prompt_tokens_read = 0
        self._got: dict[str, int] = {}
        self._open: set[str] = set()

    def serve(self, coming: Sequence[Arrival], progress: Callable[[int, int], None]) -> None:
        """Serve to the end; every request gets all of its new tokens, whatever they are.

        Raises:
            UserError: a request that failed.
        """
        engine = self.engine
        waiting = collections.deque(coming)
        total = sum(len(each.prompt) + each.new_tokens for each in coming)
        read, host = engine.prompt_tokens_read, engine.host_seconds
        started = told = time.perf_counter()
        while waiting or engine.has_work:
            now = time.perf_counter()
            while waiting and self._is_due(waiting[0], now - started):
                self._add(waiting.popleft(), now - started)
            if not engine.has_work:
                time.sleep(max(0.0, min(0.01, waiting[0].time - (now - started))))
                continue
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                if output.error is not None:
                    raise UserError(f"request {output.request_id} failed: {output.error}")
                self._got[output.request_id] += len(output.tokens)
                if output.finish_reason is not None:
                    self._open.discard(output.request_id)
            assert engine.scheduler is not None
            assert engine.allocator is not None
            decoding = sum(self._got[request] > 0 for request in self._open)
            phase = "reading" if engine.scheduler.num_running > decoding else "decoding"
            worked = engine.host_seconds - host
            self.deliveries += [
                Delivery(now - started, output.request_id, len(output.tokens), phase, worked) for output in outputs
            ]
            self.pages_owned = max(self.pages_owned, engine.allocator.num_owned)
            self.pages_cached = max(self.pages_cached, engine.allocator.num_cached)
            if now - told > 0.2:
                told = now
                progress(engine.prompt_tokens_read - read + sum(self._got.values()), total)
        self.prompt_tokens_read = engine.prompt_tokens_read - read
        progress(total, total)

    def request(self, number: int, each: Arrival) -> Request:
        """What the engine gets."""
        grammar = Anything(self.engine.spec.config.vocab_size) if each.guided else None
        return Request(
            str(number), each.prompt, each.new_tokens, attention=self.attention, sample_index=number, grammar=grammar
        )

    def _is_due(self, each: Arrival, now: float) -> bool:
        return each.time <= now and all(count >= each.after_tokens for count in self._got.values())

    def _add(self, each: Arrival, now: float) -> None:
        request = self.request(len(self.arrived), each)
        self.engine.add_request(request)
        # A step may have kept the loop from seeing it in time; who waits for the others arrives when they are there.
        self.arrived[request.id] = now if each.after_tokens else each.time
        self._got[request.id] = 0
        self._open.add(request.id)


def targets(name: str, rows: Sequence[ServeRow]) -> list[dict[str, Any]]:
    """What a scenario is to reach on an H200 at the shape of Llama-3-8B."""
    found = [row.columns for row in rows]
    first = found[0]
    if name == "full-batch":
        what = f"host work, share of a block of {first.full_rows} rows"
        return [_target(what, first.host_share, 0.05, "<=")]
    if name == "long-prompt":
        return [_target("longest stall of a decoding row, in usual blocks", first.stall_blocks, 3.0, "<=")]
    if name == "long-batch":
        rates = {row.attention: row.columns.full_tokens_per_s for row in rows if row.name == "prompts known"}
        ratio = _ratio(rates.get("hybrid"), rates.get("dense"))
        return [_target("decode tokens/s while all rows decode, hybrid over dense", ratio, 2.5, ">=")]
    if name == "shared-prefix":
        first_token, second = found[1].samples_first_token_s
        what = "first token of the second request with the same prefix, share of the time of the first"
        return [_target(what, second / first_token, 0.1, "<=")]
    if name == "guided":
        what = f"tokens/s of {first.full_rows} rows with a guided one among them, share of those without"
        return [_target(what, _ratio(found[1].full_tokens_per_s, first.full_tokens_per_s), 0.5, ">=")]
    return []


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other is not None else None


def _target(what: str, value: float | None, target: float, sense: Sense) -> dict[str, Any]:
    return {"what": what, "value": value, "target": target, "sense": sense}


def table(rows: Sequence[ServeRow]) -> str:
    """The rows as text."""

    def each(label: str, *numbers: int | float | None, form: str = ",.2f") -> str:
        return f"{label:<42}" + "".join(f" {'–' if n is None else format(n, form):>19}" for n in numbers)

    all_columns = [row.columns for row in rows]
    between = [one.between_tokens_s for one in all_columns]
    lines = [
        f"{rows[0].model}, {rows[0].dtype}",
        f"{'':<42}" + "".join(f" {row.name:>19}" for row in rows),
        f"{'attention':<42}" + "".join(f" {row.attention:>19}" for row in rows),
        each("requests", *(len(row.prompt_tokens) for row in rows), form="d"),
        each("tokens of prompts, in all", *(sum(row.prompt_tokens) for row in rows), form=",d"),
        each("those that were read", *(row.prompt_tokens_read for row in rows), form=",d"),
        each("tokens/s, end to end", *(one.tokens_per_s for one in all_columns)),
        each("rows of a full batch", *(one.full_rows for one in all_columns), form="d"),
        each("tokens/s, while the batch is full", *(one.full_tokens_per_s for one in all_columns)),
        each("first token, s: median", *(one.first_token_s.median for one in all_columns)),
        each("first token, s: p99", *(one.first_token_s.p99 for one in all_columns)),
        each("between tokens, ms: median", *(one and 1e3 * one.median for one in between)),
        each("between tokens, ms: p99", *(one and 1e3 * one.p99 for one in between)),
        each("usual block, ms", *(one.block_s and 1e3 * one.block_s for one in all_columns)),
        each("longest stall, ms", *(one.longest_stall_s and 1e3 * one.longest_stall_s for one in all_columns)),
        each("longest stall, blocks", *(one.stall_blocks for one in all_columns)),
        each("host work, share of a block", *(one.host_share for one in all_columns), form=".1%"),
        each("pages in use, at most", *(row.pages_owned for row in rows), form=",d"),
        each("pages cached, at most", *(row.pages_cached for row in rows), form=",d"),
        each("pages there are", *(row.pages for row in rows), form=",d"),
        each("programs", *(row.programs for row in rows), form="d"),
        each("compiling, s", *(row.compile_s for row in rows)),
    ]
    if any(row.late_compile_s for row in rows):
        lines.append(each("compiling in the measured pass, s", *(row.late_compile_s for row in rows)))
    return "\n".join(lines)
