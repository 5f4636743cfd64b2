"""What handlers share: admission, the pool for text, and how a request becomes the engine's."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import secrets
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lychee_jax.engine.options import AttentionOptions
from lychee_jax.engine.request import Request
from lychee_jax.server.answers import Answer, Row
from lychee_jax.server.errors import ApiError
from lychee_jax.server.grammar import response_grammar
from lychee_jax.server.metrics import Metrics
from lychee_jax.server.model import ServedModel
from lychee_jax.server.protocol import GenerationRequest
from lychee_jax.server.settings import ServerConfig
from lychee_jax.server.tools import Tools
from lychee_jax.server.worker import Worker
from lychee_jax.text.streaming import TextStream


class Service:
    """One served model, for all handlers.

    Attributes:
        draining: nothing new is taken any more.
    """

    def __init__(self, config: ServerConfig, worker: Worker) -> None:
        self.config, self.worker = config, worker
        self.metrics = Metrics(lambda: worker.stats)
        self.draining = False
        self.metrics.count_thread("event_loop")
        self._pool = ThreadPoolExecutor(
            config.text_workers, thread_name_prefix="text", initializer=self.metrics.count_thread, initargs=("text",)
        )
        self._answers: weakref.WeakSet[Answer] = weakref.WeakSet()
        self._numbers = itertools.count()

    @property
    def model(self) -> ServedModel:
        """What is served; the gate lets nobody in before it is there."""
        assert self.worker.model is not None
        return self.worker.model

    @property
    def unavailable(self) -> str | None:
        """Why nothing is taken; None where something is."""
        if self.draining:
            return "the server is shutting down"
        return {"starting": "the model is loading", "dead": "the engine has ended", "ready": None}[self.worker.state]

    @property
    def num_open(self) -> int:
        """Sequences that were admitted and have not ended."""
        return sum(answer.num_open for answer in self._answers)

    def check_name(self, name: str | None) -> None:
        """Raise a 404 for the name of another model."""
        if name not in (None, self.config.model_name):
            raise ApiError(
                404, f"the model {name!r} does not exist; this server has {self.config.model_name!r}", param="model",
                code="model_not_found",
            )  # fmt: skip

    async def in_pool[**P, T](self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What a function that works on text returns; it runs beside the event loop, for a limited time.

        Raises:
            ApiError: it takes too long.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.config.text_seconds):
                return await loop.run_in_executor(self._pool, lambda: function(*args, **kwargs))
        except TimeoutError:
            raise ApiError(400, f"the text takes longer than {self.config.text_seconds:g} s to process") from None

    async def grammar(self, response_format: Mapping[str, Any] | None, tools: Tools | None = None) -> str | None:
        """The grammar that an answer has to follow, by its format or by the tools that it must call.

        Raises:
            ApiError, UserError: it cannot be compiled.
        """

        def compiled() -> str | None:
            if tools is not None and tools.forced:
                return tools.grammar(self.model.grammars)
            return None if response_format is None else response_grammar(self.model.grammars, response_format)

        return await self.in_pool(compiled)

    def interrupt(self) -> None:
        """Everything that is open is answered by an error."""
        for answer in list(self._answers):
            answer.interrupt()

    def close(self) -> None:
        """End the pool."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def begin(
        self,
        body: GenerationRequest,
        prompts: Sequence[Sequence[int]],
        *,
        limit: int | None,
        default: int,
        top_logprobs: int = 0,
        prompt_logprobs: int | None = None,
        endpoint: str,
        grammar: str | None = None,
    ) -> Answer:
        """Admit a call: its sequences are the engine's from here on.

        Args:
            body: what the client asks.
            prompts: token ids of each.
            limit: new tokens that the client asks for; None: `default`, or what is left for a long prompt.
            default: see `limit`.
            top_logprobs: how many of the likeliest tokens are told at each step.
            prompt_logprobs: how many at each token of the prompt; None: nothing is told of it.
            endpoint: for the metrics.
            grammar: that every answer follows.

        Raises:
            ApiError: too many sequences, in all or for now.
            UserError: what this model or this cache cannot take.
        """
        number = len(prompts) * body.choices
        self._check_sizes(body, len(prompts), number)
        model, seed = self.model, secrets.randbits(32)
        sampling = body.sampling(seed)
        attention = self._attention(body)
        eos_ids = (*(() if body.ignore_eos else model.defaults.eos_ids), *(body.stop_token_ids or ()))
        rows = []
        name = f"{endpoint}-{next(self._numbers)}"
        for place, prompt in enumerate(prompts):
            wanted = self._new_tokens(prompt, limit, default)
            for sample in range(body.choices):
                choice = place * body.choices + sample
                request = Request(
                    f"{name}-{choice}", tuple(prompt), max(wanted, 1), sampling, attention,
                    tuple(dict.fromkeys(eos_ids)), sample_index=sample, top_logprobs=top_logprobs,
                    grammar=None if grammar is None else model.grammars.start(grammar),
                    prompt_logprobs=prompt_logprobs,
                    fork_of=f"{name}-{choice - sample}" if sample else None,
                )  # fmt: skip
                if sample == 0:
                    model.engine.check(request)
                rows.append(Row(request, choice, TextStream(model.tokenizer, body.stops, request.eos_ids), wanted))
        self._admit(number)
        answer = Answer(self.worker, self.metrics, prompts, rows)
        self._answers.add(answer)
        self.metrics.requests.labels(endpoint).inc()
        self.metrics.prompt_tokens.inc(sum(map(len, prompts)))
        return answer

    def _check_sizes(self, body: GenerationRequest, prompts: int, sequences: int) -> None:
        config = self.config
        for what, count, most, param in (
            ("prompts", prompts, config.max_prompts, "prompt"),
            ("choices for each prompt", body.choices, config.max_choices, "n"),
            ("stop texts", len(body.stops), config.max_stops, "stop"),
            ("stop token ids", len(body.stop_token_ids or ()), config.max_stops, "stop_token_ids"),
            ("sequences in one call", sequences, self._places, "n"),
        ):
            if count > most:
                raise ApiError(400, f"{count} {what} are too many; at most {most} are possible", param=param)
        if not prompts:
            raise ApiError(400, "there is no prompt; give at least one", param="prompt")

    @property
    def _places(self) -> int:
        return self.model.engine.options.max_num_seqs + self.config.max_queue

    def _admit(self, sequences: int) -> None:
        if self.num_open + sequences > self._places:
            raise ApiError(
                429, f"{self.num_open} sequences run or wait already; try again later", code="queue_full",
                headers={"retry-after": "1"},
            )  # fmt: skip

    def _attention(self, body: GenerationRequest) -> AttentionOptions:
        options = self.model.defaults.attention_options
        if body.lychee is None or body.lychee.attention is None:
            return options
        return dataclasses.replace(options, mode=body.lychee.attention)

    def _new_tokens(self, prompt: Sequence[int], limit: int | None, default: int) -> int:
        most = self.model.engine.max_tokens
        wanted = min(default, most - len(prompt)) if limit is None else limit
        if len(prompt) + max(wanted, 1) > most:
            raise ApiError(
                400, f"a prompt of {len(prompt)} tokens and {max(wanted, 1)} new ones exceed the limit of {most}",
                code="context_length_exceeded",
            )  # fmt: skip
        return wanted
