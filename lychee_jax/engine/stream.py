"""A batch of prompts through the engine, their tokens as they come: what callers in Python loop over."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterator, Sequence

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.engine.engine import Engine
from lychee_jax.engine.options import GenerateOptions
from lychee_jax.engine.outputs import AttentionStatistics, RequestOutput, Result, Timing
from lychee_jax.engine.request import Request
from lychee_jax.errors import UserError


class Router:
    """Steps an engine for several streams at once: what comes for one waits until that one asks for it."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._waiting: dict[str, collections.deque[RequestOutput]] = {}
        self._next_id = 0

    def add(self, requests: Sequence[Request]) -> None:
        """Queue requests whose outputs will be asked for; all of them or none."""
        added: list[str] = []
        try:
            for request in requests:
                self.engine.add_request(request)
                added.append(request.id)
        except BaseException:
            for request_id in added:
                self.engine.finish(request_id)
            raise
        self._waiting |= {request_id: collections.deque() for request_id in added}

    def new_id(self) -> str:
        """An id that no request has had."""
        self._next_id += 1
        return str(self._next_id)

    def drop(self, request_id: str) -> None:
        """Nobody asks for this request any more."""
        self.engine.finish(request_id)
        self._waiting.pop(request_id, None)

    def step(self) -> None:
        """One step of the engine."""
        for output in self.engine.step():
            if output.request_id in self._waiting:
                self._waiting[output.request_id].append(output)

    def take(self, request_id: str) -> RequestOutput | None:
        """What has come for a request, oldest first."""
        waiting = self._waiting.get(request_id)
        return waiting.popleft() if waiting else None


def make_requests(
    ids: Sequence[str],
    prompts: Sequence[tuple[int, ...]],
    options: GenerateOptions,
    forced: Sequence[Sequence[int]] | None = None,
    limits: Sequence[int] | None = None,
    top_logprobs: int = 0,
) -> list[Request]:
    """A request for each prompt; `forced` and `limits` have an entry for each, too.

    Raises:
        UserError: they have not.
    """
    given = forced or [()] * len(prompts)
    most = limits or [options.max_new_tokens] * len(prompts)
    for name, rows in (("rows of forced tokens", given), ("limits", most)):
        if len(rows) != len(prompts):
            raise UserError(f"there are {len(prompts)} prompts, but {len(rows)} {name}")
    ends = () if options.ignore_eos else options.eos_ids
    return [
        Request(
            ids[row], prompt, most[row], options.sampling, options.attention_options, ends, tuple(given[row]), row,
            top_logprobs,
        )
        for row, prompt in enumerate(prompts)
    ]  # fmt: skip


class TokenStream(Iterator[tuple[int, RequestOutput]]):
    """Iterate over (row, output) as tokens come, several at once; `finish(row)` ends a row early; then `result()`.

    A stream that is closed or forgotten ends its requests.
    """

    def __init__(
        self,
        router: Router,
        prompts: Sequence[tuple[int, ...]],
        options: GenerateOptions,
        *,
        forced: Sequence[Sequence[int]] | None = None,
        limits: Sequence[int] | None = None,
        top_logprobs: int = 0,
        on_prefill: Callable[[int, int], None] | None = None,
    ):
        self._router, self._options = router, options
        self._compiled_before = router.engine.compile_seconds
        self._read_before = router.engine.prompt_tokens_read
        self._started = self._last = time.perf_counter()
        self._prefill_s = self._decode_s = 0.0
        self._decoding, self._decoded = False, 0  # the last step; tokens that came while every row decoded
        self._on_prefill = on_prefill
        self._prompt_tokens, self._told = sum(map(len, prompts)), -1
        self._ids = [router.new_id() for _ in prompts]
        self._rows = [RequestOutput(request_id) for request_id in self._ids]
        requests = make_requests(self._ids, prompts, options, forced, limits, top_logprobs)
        router.engine.prepare(requests)
        router.add(requests)
        self._open = set(range(len(prompts)))
        self._tell(0)

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> tuple[int, RequestOutput]:
        while self._open:
            for row in sorted(self._open):
                output = self._router.take(self._ids[row])
                if output is not None:
                    self._keep(row, output)
                    return row, output
            if self._router.engine.failed:
                self._open.clear()
                raise UserError("the engine has ended before this generation did")
            compiled = self._router.engine.compile_seconds
            self._router.step()
            self._count_time(self._router.engine.compile_seconds - compiled)
        raise StopIteration

    def _count_time(self, compiling: float) -> None:
        """The time since the last step: reading prompts as long as a row waits for its first token, then decoding."""
        now = time.perf_counter()
        passed = max(0.0, now - self._last - compiling)
        self._last = now
        self._decoding = all(self._rows[row].tokens for row in self._open)
        if self._decoding:
            self._decode_s += passed
        else:
            self._prefill_s += passed
            self._tell(self._router.engine.prompt_tokens_read - self._read_before)

    def _tell(self, read: int) -> None:
        """Report prompt tokens that were read, if there is something new to say."""
        read = min(read, self._prompt_tokens)
        if self._on_prefill is not None and read > self._told:
            self._told = read
            self._on_prefill(read, self._prompt_tokens)

    def _keep(self, row: int, output: RequestOutput) -> None:
        whole = self._rows[row]
        self._decoded += len(output.tokens) if self._decoding else 0
        whole.tokens += output.tokens
        if all(each.tokens for each in self._rows):
            self._tell(self._prompt_tokens)  # those that the prefix cache had are never read
        whole.logprobs += output.logprobs
        whole.greedy += output.greedy
        whole.top += output.top
        whole.pages_read += output.pages_read
        whole.pages_held += output.pages_held
        if output.finish_reason is not None:
            whole.finish_reason = output.finish_reason
            whole.cached_tokens = output.cached_tokens
            self._router.drop(self._ids[row])
            self._open.discard(row)
            if output.error is not None:
                self.close()
                raise UserError(f"prompt {row}: {output.error}")

    def finish(self, row: int, unused: int = 0) -> None:
        """End a row after the tokens already handed out, of which the last `unused` ones do not belong to it."""
        whole = self._rows[row]
        count = len(whole.tokens) - unused
        for values in (whole.tokens, whole.logprobs, whole.greedy, whole.top):
            del values[count:]
        whole.finish_reason = "stop"
        if row in self._open:
            self._router.drop(self._ids[row])
            self._open.discard(row)

    def close(self) -> None:
        """End all rows that are still open."""
        for row in self._open:
            self._router.drop(self._ids[row])
        self._open.clear()

    def __del__(self) -> None:
        if getattr(self, "_open", None):
            self.close()

    def result(self) -> Result:
        """Everything handed out so far."""
        rows = self._rows
        read, held = sum(row.pages_read for row in rows), sum(row.pages_held for row in rows)
        return Result(
            [list(row.tokens) for row in rows],
            [list(row.logprobs) for row in rows],
            [list(row.greedy) for row in rows],
            [row.finish_reason or "abort" for row in rows],
            [row.cached_tokens for row in rows],
            [row.pages_read for row in rows],
            [row.pages_held for row in rows],
            Timing(
                self._prefill_s,
                self._decode_s,
                self._decoded / self._decode_s if self._decode_s > 0 else 0.0,
                self._router.engine.compile_seconds - self._compiled_before,
            ),
            self._attention(read / held if held else 1.0),
        )

    def _attention(self, share: float) -> AttentionStatistics:
        options = self._options
        heads = options.heads or HeadMap.all(self._router.engine.spec.config)
        return AttentionStatistics(
            mode=options.attention,
            heads=heads.model,
            retrieval_heads=heads.num_retrieval,
            kv_heads=heads.num_layers * heads.num_kv_heads,
            page_size=options.page_size,
            budget=options.policy.budget,
            sink=options.policy.sink,
            recent=options.policy.recent,
            rule=options.policy.rule,
            correct_every=options.correct_every,
            kv_read_share=share,
        )
