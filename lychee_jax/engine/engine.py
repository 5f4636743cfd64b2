"""The engine: requests in, tokens out. A loop calls `step` until nothing is left to do.

Each step lets the scheduler say what comes next, sends it, and reads the oldest block whose results are due; the device
always has work while the host reads. What a request becomes never depends on its company.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from lychee_jax.cache.allocator import Allocator, next_power_of_two, pages_for
from lychee_jax.cache.pages import cache_bytes
from lychee_jax.config import ModelConfig
from lychee_jax.engine.device_memory import free_memory
from lychee_jax.engine.grammar import Grammar
from lychee_jax.engine.kernel_support import refuse_uncovered
from lychee_jax.engine.options import AttentionOptions, EngineConfig, EngineOptions, max_pages
from lychee_jax.engine.outputs import PromptLogprob, RequestOutput
from lychee_jax.engine.programs import NO_TOKEN, NOT_FINITE
from lychee_jax.engine.request import MAX_EOS_IDS, FinishReason, Request
from lychee_jax.engine.runner import Runner, SentBlock, SentChunks
from lychee_jax.engine.sampling import MAX_TOP_LOGPROBS
from lychee_jax.engine.scheduler import Scheduler, SchedulerConfig
from lychee_jax.engine.warmup import Rehearsal
from lychee_jax.errors import UserError
from lychee_jax.models.spec import ModelSpec

_CPU_CACHE, _LEAST_TOKENS = 2 << 30, 4096


@dataclasses.dataclass
class _Progress:
    """A request that the engine knows: what was delivered so far, and what is known of its prompt."""

    request: Request
    hold: bool
    delivered: int = 0
    ended: bool = False
    prompt_logprobs: list[PromptLogprob] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Sent:
    """Part of what a step sent: blocks to be read, and chunks of prompts."""

    blocks: list[SentBlock]
    chunks: SentChunks | None = None


class Engine:
    """Batches requests as they come. The cache is made when the first request is scheduled.

    Attributes:
        page_bytes: memory that a page of the cache takes on a device, over all layers.
        prompt_tokens_read: of all requests so far.
        host_seconds: how long `step` worked on the host: all of its time but compiling and waiting for the device.
        wait_seconds: how long `step` waited for the device.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: tuple[Any, ...],
        options: EngineOptions,
        config: EngineConfig | None = None,
    ):
        self.spec, self.weights = spec, weights
        self.options = options
        self.config = config or EngineConfig.of(jax.default_backend(), spec.config)
        self.max_model_len = min(options.max_model_len or spec.config.max_tokens, spec.config.max_tokens)
        share = spec.config if spec.layout is None else spec.layout.share(spec.config)
        self.page_bytes = cache_bytes(share, 1, options.page_size, self.dtype, options.kv_dtype)
        self.prompt_tokens_read = 0
        self.host_seconds = self.wait_seconds = 0.0
        self._requests: dict[str, _Progress] = {}
        self._unscheduled: list[Request] = []
        self._sent: collections.deque[_Sent] = collections.deque()
        self._ended: list[RequestOutput] = []
        self._failure: str | None = None
        self._compile_seconds = 0.0
        self._runner: Runner | None = None
        self._scheduler: Scheduler | None = None
        self._allocator: Allocator | None = None
        # An idle row of the largest decode program writes to a page of its own.
        self._scratch = self.config.batch_bucket(options.max_num_seqs, options.max_num_seqs)
        self._most_pages = self._page_limit()

    @property
    def dtype(self) -> np.dtype:
        """Of activations, and of a cache that is not quantised."""
        return np.dtype(self.weights[0].dtype)

    @property
    def failed(self) -> bool:
        """Whether an error has ended the engine, or `close`."""
        return self._failure is not None

    @property
    def compile_seconds(self) -> float:
        """How long the engine waited for compilers."""
        return self._compile_seconds + (self._runner.programs.seconds if self._runner else 0.0)

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._requests or self._sent or self._ended)

    @property
    def max_tokens(self) -> int:
        """Tokens that a prompt and what follows it may have: the model's limit, or all that the cache can hold."""
        return min(self.max_model_len, self._most_pages * self.options.page_size)

    @property
    def _allocated_pages(self) -> int:
        return self._runner.num_pages - self._scratch if self._runner is not None else 0

    @property
    def scheduler(self) -> Scheduler | None:
        """None before the first request is scheduled."""
        return self._scheduler

    @property
    def allocator(self) -> Allocator | None:
        """None before the first request is scheduled."""
        return self._allocator

    @property
    def runner(self) -> Runner | None:
        """None before the first request is scheduled."""
        return self._runner

    def add_request(self, request: Request, *, hold: bool = False) -> None:
        """Queue a request. With `hold`, its pages stay as they are after its end, until `finish`.

        Raises:
            UserError: a prompt or a limit that this model or this cache cannot take, an id that is taken, or an engine
                that a device error has ended.
            NotImplementedError: the implementation that the options name does not cover this model on this machine.
        """
        if self._failure is not None:
            raise UserError(f"the engine has ended: {self._failure}")
        if request.id in self._requests:
            raise UserError(f"request id {request.id!r} is taken")
        need = self.check(request)
        if self._scheduler is not None and not self._unscheduled and need <= self._allocated_pages:
            self._scheduler.add(request)
        else:
            self._unscheduled.append(request)
        self._requests[request.id] = _Progress(request, hold)

    def abort(self, request_id: str) -> None:
        """End a request, whatever it is doing; its pages are free at once. Unknown ids are ignored."""
        if self._end(request_id):
            self._ended.append(RequestOutput(request_id, finish_reason="abort"))

    def pages(self, request_id: str) -> list[int]:
        """The pool pages of a request that has been scheduled and not been ended."""
        assert self._allocator is not None
        return self._allocator.pages(request_id)

    def reset_prefix_cache(self) -> None:
        """Forget every page that no request owns.

        Raises:
            UserError: requests are under way.
        """
        if self.has_work:
            raise UserError("the prefix cache can be reset when no request is under way")
        if self._runner is not None:
            self._make_books(self._runner)

    def close(self) -> None:
        """End all requests, and free the cache."""
        self._fail("it was closed")
        if self._runner is not None:
            self._runner.pools = ()

    def finish(self, request_id: str) -> None:
        """End a request whose text is complete, without an output."""
        self._end(request_id)

    def _end(self, request_id: str) -> bool:
        if self._requests.pop(request_id, None) is None:
            return False
        self._unscheduled = [request for request in self._unscheduled if request.id != request_id]
        if self._scheduler is not None:
            self._scheduler.abort(request_id)
        return True

    def step(self) -> list[RequestOutput]:
        """Send what comes next, and give back what has come.

        Raises:
            Exception: what the device or a compiler reported; all requests have ended then, and so has the engine.
        """
        started, others = time.perf_counter(), self.wait_seconds + self.compile_seconds
        outputs, self._ended = self._ended, []
        try:
            sent = self._send()
            awaited = self._scheduler is not None and self._scheduler.awaits_tokens
            ahead = 0 if awaited else self.config.blocks_ahead
            while self._sent and (len(self._sent) > ahead or not sent):
                outputs += self._receive(self._sent.popleft())
                if outputs and not awaited:
                    break
        except (KeyboardInterrupt, NotImplementedError, UserError):
            self._fail("interrupted")
            raise
        except Exception as error:
            self._fail(str(error).split("\n", 1)[0])
            raise
        others = self.wait_seconds + self.compile_seconds - others
        self.host_seconds += time.perf_counter() - started - others
        return outputs

    def _fail(self, reason: str) -> None:
        self._failure = reason
        self._requests.clear()
        self._unscheduled.clear()
        self._sent.clear()

    def _send(self) -> bool:
        """Whether anything was sent."""
        if self._unscheduled and (
            self._scheduler is None or not (self._scheduler.num_waiting or self._scheduler.num_running)
        ):
            self._make_room()
        if self._scheduler is None or self._runner is None:
            return False
        work = self._scheduler.schedule()
        # One by one, so that a first token does not wait for the decode steps behind it.
        if work.prefill is not None:
            chunks, started = self._runner.prefill(work.prefill)
            self._sent.append(_Sent(started, chunks))
        self._runner.copy(work.copies)
        if work.decode:
            self._sent.append(_Sent([self._runner.decode(group) for group in work.decode]))
        return bool(work)

    def _make_room(self) -> None:
        """Make the cache, or a larger one, for the requests that wait; nothing else is in it."""
        pages = self._pages_for(self._unscheduled)
        if self._runner is None or pages > self._allocated_pages:
            if self._runner is not None:
                self._compile_seconds += self._runner.programs.seconds
                self._runner.pools = ()  # freed before the larger ones are made
            self._runner = Runner(
                self.spec, self.weights, self.options, self.config, num_pages=pages + self._scratch,
                max_model_len=self.max_model_len,
            )  # fmt: skip
            self._make_books(self._runner)
        assert self._scheduler is not None
        for request in self._unscheduled:
            self._scheduler.add(request)
        self._unscheduled.clear()

    def _pages_for(self, requests: Sequence[Request]) -> int:
        """Pages of a cache that is made for these requests, not few: a larger one compiles every program anew."""
        if jax.default_backend() != "cpu" or self.options.cache_memory is not None:
            return self._most_pages
        needs = sorted(pages_for(len(r.prompt) + r.max_new_tokens, self.options.page_size) for r in requests)
        least = pages_for(_LEAST_TOKENS, self.options.page_size)
        together = max(least, 2 * sum(needs[-self.options.max_num_seqs :]))
        return max(needs[-1], min(next_power_of_two(together), max(1, _CPU_CACHE // self.page_bytes), self._most_pages))

    def prepare(self, requests: Sequence[Request]) -> list[concurrent.futures.Future[Any]]:
        """Compile in the background what these requests will need, a future for each program; neither weights nor a
        cache have to be there.

        Raises:
            UserError, NotImplementedError: as for `add_request`.
        """
        for request in requests:
            self.check(request)
        pages = max(self._pages_for(requests), self._allocated_pages) + self._scratch
        rehearsal = Rehearsal(
            self.spec, self.weights, self.options, self.config, num_pages=pages, max_model_len=self.max_model_len
        )
        return rehearsal.rehearse(self._books(rehearsal)[1], requests)

    def _make_books(self, runner: Runner) -> None:
        """Nobody owns a page of the runner's cache, and nothing in it is known."""
        self._allocator, self._scheduler = self._books(runner)

    def _books(self, runner: Runner) -> tuple[Allocator, Scheduler]:
        page_size, config = self.options.page_size, self.config
        share = self.options.prefix_cache and self.spec.config.rope.kind != "dynamic"  # keys of the whole prompt
        allocator = Allocator(runner.num_pages, page_size, scratch=self._scratch, prefix_cache=share)
        scheduling = SchedulerConfig(
            self.options.max_num_seqs, runner.block_steps, config.chunks(page_size), config.prefill_rows,
            config.prefill_tokens,
        )  # fmt: skip
        return allocator, Scheduler(scheduling, allocator)

    def _page_limit(self) -> int:
        """Pages that the cache may have for sequences."""
        useful = self.options.max_num_seqs * max_pages(self.max_model_len, self.options.page_size)
        memory = self.options.cache_memory
        if memory is None and jax.default_backend() == "cpu":
            return useful  # it grows for whoever needs more than the default
        if memory is None:
            memory = free_memory(self.weights)
        return min(useful, memory // self.page_bytes - self._scratch)

    def _receive(self, sent: _Sent) -> list[RequestOutput]:
        """Wait for what one step sent, and hand out its tokens."""
        started = time.perf_counter()
        chunks = sent.chunks
        jax.block_until_ready(
            ([block.block for block in sent.blocks] or (chunks and chunks.last), chunks and chunks.scored)
        )
        self.wait_seconds += time.perf_counter() - started
        if chunks is not None:
            self.prompt_tokens_read += sum(chunk.count for chunk in chunks.work.chunks)
            if chunks.scored is not None:
                self._keep_scores(chunks)
        return [output for block in sent.blocks for output in self._read(block)]

    def _keep_scores(self, sent: SentChunks) -> None:
        """Note what a chunk's logits say of the prompt's next tokens."""
        logprobs, top_ids, top_logprobs = map(np.asarray, sent.scored)
        for row, chunk in enumerate(sent.work.chunks):
            request, progress = chunk.request, self._requests.get(chunk.request.id)
            if progress is None or progress.request is not request:
                continue  # it was aborted
            tokens = request.prompt[chunk.start + 1 : chunk.start + 1 + chunk.count]
            own, width = slice(len(tokens)), request.prompt_logprobs
            best = (
                list(zip(*pair, strict=True))
                for pair in zip(
                    top_ids[row, own, :width].tolist(), top_logprobs[row, own, :width].tolist(), strict=True
                )
            )
            progress.prompt_logprobs += zip(tokens, logprobs[row, own].tolist(), best, strict=True)

    def _read(self, sent: SentBlock) -> Iterable[RequestOutput]:
        assert self._scheduler is not None
        block = sent.block
        tokens, logprobs = np.asarray(block.tokens), np.asarray(block.logprobs)
        read = np.asarray(block.pages_read)
        forced = any(request.forced for request in sent.requests)
        greedy = np.asarray(block.greedy) if forced else None
        top: tuple[np.ndarray, np.ndarray] | None = None
        if any(request.top_logprobs for request in sent.requests):
            top = np.asarray(block.top_ids), np.asarray(block.top_logprobs)
        for column, (request, first) in enumerate(zip(sent.requests, sent.first_steps, strict=True)):
            progress = self._requests.get(request.id)
            if progress is None or progress.request is not request:
                continue  # it has ended meanwhile
            self._scheduler.received(request.id)
            if progress.ended:
                continue
            output = RequestOutput(request.id, prompt_logprobs=progress.prompt_logprobs)
            progress.prompt_logprobs = []
            for step in range(len(tokens)):
                token = int(tokens[step, column])
                if token == NO_TOKEN:
                    break
                if token == NOT_FINITE:
                    output.finish_reason = "error"
                    output.error = self._why_no_token(request, progress.delivered)
                    break
                output.tokens.append(token)
                output.logprobs.append(float(logprobs[step, column]))
                if greedy is not None:
                    output.greedy.append(bool(greedy[step, column]))
                if top is not None:
                    best = zip(top[0][step, column].tolist(), top[1][step, column].tolist(), strict=True)
                    output.top.append(list(best)[: request.top_logprobs])
                progress.delivered += 1
                if first + step > 0:  # the first token of all belongs to the prefill
                    output.pages_read += int(read[step, column])
                    output.pages_held += self._pages_held(len(request.prompt) + first + step)
                output.finish_reason = self._finish_reason(request, token, progress.delivered)
                if request.grammar is not None:
                    self._follow(request.grammar, token, output)
            output.cached_tokens = self._scheduler.cached_tokens(request.id)
            if output.finish_reason is not None:
                progress.ended = True
                if not progress.hold:
                    self._end(request.id)
            if output.tokens or output.finish_reason is not None:
                yield output

    def _why_no_token(self, request: Request, delivered: int) -> str:
        if request.grammar is not None and not request.grammar.mask().any():
            return f"the grammar allows no token after {delivered} new ones"
        return (
            f"the logits are not finite after {delivered} new tokens: weights are (convert --verify finds them), or "
            f"activations overflow in {self.dtype}{'; try bfloat16 or float32' if self.dtype == 'float16' else ''}"
        )

    @staticmethod
    def _follow(grammar: Grammar, token: int, output: RequestOutput) -> None:
        """Tell the grammar of a token, and end the text where it does."""
        if output.finish_reason == "stop":
            return
        try:
            grammar.accept(token)
        except UserError as error:
            output.finish_reason, output.error = "error", str(error)
            return
        if grammar.finished:
            output.finish_reason = "stop"

    def _pages_held(self, length: int) -> int:
        model = self.spec.config
        return model.num_layers * model.num_kv_heads * pages_for(length, self.options.page_size)

    @staticmethod
    def _finish_reason(request: Request, token: int, count: int) -> FinishReason | None:
        if token in request.eos_ids and count > len(request.forced):
            return "stop"
        return "length" if count >= request.max_new_tokens else None

    def check(self, request: Request) -> int:
        """Pages that the request needs; any thread may ask. UserError if this engine can never take it."""
        model = self.spec.config
        check_prompt(model, request.prompt, request.max_new_tokens, self.max_model_len)
        for token in request.forced:
            if not 0 <= token < model.vocab_size:
                raise UserError(f"token id {token} is forced; the vocabulary has ids 0 to {model.vocab_size - 1}")
        if len(request.forced) > request.max_new_tokens:
            raise UserError(f"{len(request.forced)} tokens are forced, more than the {request.max_new_tokens} new ones")
        for name in ("top_logprobs", "prompt_logprobs"):
            if not 0 <= (getattr(request, name) or 0) <= MAX_TOP_LOGPROBS:
                raise UserError(f"{name} is {getattr(request, name)}; it must lie between 0 and {MAX_TOP_LOGPROBS}")
        if len(request.eos_ids) > MAX_EOS_IDS:
            raise UserError(f"{len(request.eos_ids)} token ids end the text; at most {MAX_EOS_IDS} may")
        for token, _ in request.sampling.logit_bias:
            if token >= model.vocab_size:
                raise UserError(f"logit_bias has token id {token}; the vocabulary has ids 0 to {model.vocab_size - 1}")
        if request.grammar is not None:
            self._check_grammar(request, request.grammar)
        attention = request.attention
        assert isinstance(attention, AttentionOptions)
        attention.policy.validate(self.options.page_size)
        if attention.heads is not None:
            attention.heads.check(model)
        pages = pages_for(len(request.prompt) + request.max_new_tokens, self.options.page_size)
        if pages > self._most_pages:
            raise UserError(
                f"a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones need {pages} pages of "
                f"{self.options.page_size} tokens, and the KV cache has room for {self._most_pages}"
            )
        if self.options.implementation is not None:
            refuse_uncovered(
                self.options.implementation, model, self.dtype, attention.policy,
                batch=self.config.batch_bucket(1, self.options.max_num_seqs), pages=next_power_of_two(pages),
                page_size=self.options.page_size,
            )  # fmt: skip
        return pages

    def _check_grammar(self, request: Request, grammar: Grammar) -> None:
        if request.forced:
            raise UserError("tokens are forced, and a grammar is given; only one of both can choose")
        if self.options.correct_every:
            raise UserError(
                "a grammar needs blocks of one step, and cache correction fixes them: correct_every must be 0"
            )
        mask, size = grammar.mask(), self.spec.config.vocab_size
        if mask.shape != (size,):
            raise UserError(f"the grammar's mask has the shape {mask.shape}; the vocabulary has {size} ids")
        if not mask.any():
            raise UserError("the grammar allows no first token")


def check_prompt(
    model: ModelConfig, prompt: tuple[int, ...], max_new_tokens: int, limit: int, name: str = "the prompt"
) -> None:
    """Raise UserError for a prompt that a model cannot take."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if not prompt:
        raise UserError(f"{name} is empty; every prompt needs at least one token")
    least, most = min(prompt), max(prompt)
    for token in (least, most):
        if not 0 <= token < model.vocab_size:
            raise UserError(f"{name} has token id {token}; the vocabulary has ids 0 to {model.vocab_size - 1}")
    if len(prompt) + max_new_tokens > limit:
        raise UserError(
            f"{name} has {len(prompt)} tokens; with {max_new_tokens} new ones that exceeds the model's limit of {limit}"
        )
