"""A loaded model as Python code uses it: text or token ids in, text out, whole or as it comes."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from lychee_jax.arguments import as_prompts, as_stops
from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.config import ModelConfig
from lychee_jax.engine.engine import Engine, check_prompt
from lychee_jax.engine.kernel_support import refuse_uncovered
from lychee_jax.engine.keywords import GenerateKeywords, sort_keywords
from lychee_jax.engine.options import EngineConfig, EngineOptions, GenerateOptions, max_pages
from lychee_jax.engine.outputs import AttentionStatistics, Result, Timing, Usage
from lychee_jax.engine.page_trace import Reading, trace_step
from lychee_jax.engine.request import FinishReason
from lychee_jax.engine.sampling_params import SamplingParams
from lychee_jax.engine.stream import Router, TokenStream, make_requests
from lychee_jax.errors import UserError
from lychee_jax.models.decoder import Decoder
from lychee_jax.models.digest import weights_digest
from lychee_jax.models.spec import ModelSpec
from lychee_jax.parallel.layouts import Layout
from lychee_jax.text.chat import Message
from lychee_jax.text.prompts import Conversations, Prompts, encode_prompts
from lychee_jax.text.streaming import TextStream
from lychee_jax.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `LLM.generate` returns; every list has one entry for each prompt.

    Attributes:
        tokens: the new ones, a stopping eos included.
        logprobs: of these tokens.
        text: None without a tokenizer; it never shows the eos.
        finish_reason: "stop" (an eos or a stop text) or "length".
        usage: tokens of the prompt, those of them that the cache had, and new ones.
        timing: seconds, of all prompts together.
        attention: how it attended, and how much of the cache was read.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    text: list[str] | None
    finish_reason: list[FinishReason]
    usage: list[Usage]
    timing: Timing
    attention: AttentionStatistics

    @property
    def prompt_tokens(self) -> list[int]:
        """Tokens of each prompt."""
        return [each.prompt_tokens for each in self.usage]


@dataclasses.dataclass
class LLM:
    """A model with its weights on the device, and what its folder says about text, ends and roles.

    Attributes:
        path: the folder.
        config: with the dtype that the weights have, and tied embeddings if the tensors say so.
        model: the module.
        heads: the folder's heads.json, else the map that the package ships for this very config, if there is one.
        eos_ids: the tokens that end a text.

    `generate` and `stream` take the keywords of `GenerateKeywords`, as `lychee generate` does.
    """

    path: Path
    config: ModelConfig
    model: Decoder
    heads: HeadMap | None
    eos_ids: tuple[int, ...]

    engine_config: EngineConfig | None = None
    engine_options: EngineOptions = dataclasses.field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        self.spec, self.weights = ModelSpec.split(self.model)
        self._router: Router | None = None
        self._digest: str | None = None

    @property
    def name(self) -> str:
        """What the model is called: its id on the Hub if it lies in the Hub's cache, else its folder's name."""
        folder = self.path.resolve()
        repository = folder.parent.parent.name
        if folder.parent.name == "snapshots" and repository.startswith("models--"):
            return repository.removeprefix("models--").replace("--", "/")
        return folder.name

    @property
    def dtype(self) -> np.dtype:
        """Of weights, activations and cache."""
        return np.dtype(self.weights[0].dtype)

    def weights_digest(self, on_progress: Callable[[int, int], None] | None = None) -> str:
        """What tells the weights from others, by every number; hashed once. `on_progress` gets bytes done and all."""
        if self._digest is None:
            self._digest = weights_digest(self.spec, self.weights, on_progress)
        return self._digest

    def engine(self, options: EngineOptions) -> Engine:
        """The engine for these options. There is one at a time: other options free its cache first.

        Raises:
            UserError: a generation with other options is not at its end yet.
        """
        return self._route(options).engine

    def _route(self, options: EngineOptions) -> Router:
        router = self._router
        if router is not None and router.engine.options == options and not router.engine.failed:
            return router
        if router is not None and router.engine.has_work and not router.engine.failed:
            raise UserError("a generation with other engine options is still running; finish it or close it first")
        if router is not None:
            router.engine.close()  # its cache is freed before another one is made
        self._router = Router(Engine(self.spec, self.weights, options, self.engine_config))
        return self._router

    def read_pages(self, prompt: Sequence[int], options: GenerateOptions, *, token: int | None = None) -> Reading:
        """Which pages every head reads in the decode step after a prompt, in hybrid attention.

        The step feeds `token`, or else the likeliest one.

        Raises:
            UserError: a prompt that this model cannot take, or a generation is still running.
        """
        (row,) = self.check_prompts([prompt], 1)
        engine = self.engine(engine_options(self.engine_options, options))
        return trace_step(engine, row, options.attention_options, token)

    def check_prompts(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[tuple[int, ...]]:
        """The prompts as the engine takes them.

        Raises:
            UserError: no prompt, or one that this model cannot take.
        """
        rows: list[tuple[int, ...]] = []
        for number, prompt in enumerate(as_prompts(prompts)):
            if isinstance(prompt, str):
                raise UserError(f"prompt {number} is a text; the engine takes token ids")
            check_prompt(self.config, row := tuple(prompt), max_new_tokens, self.config.max_tokens, f"prompt {number}")
            rows.append(row)
        return rows

    def check_implementation(self, prompts: Sequence[Sequence[int]], options: GenerateOptions) -> None:
        """Raise NotImplementedError if the named implementation does not cover these prompts on this machine."""
        if options.implementation is not None and prompts:
            pages = max_pages(max(map(len, prompts)) + options.max_new_tokens, options.page_size)
            refuse_uncovered(
                options.implementation, self.config, self.dtype, options.policy, batch=len(prompts), pages=pages,
                page_size=options.page_size, kv_dtype=options.kv_dtype,
            )  # fmt: skip

    def stream_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        options: GenerateOptions,
        *,
        forced: Sequence[Sequence[int]] | None = None,
        limits: Sequence[int] | None = None,
        top_logprobs: int = 0,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> TokenStream:
        """Token ids in, (row, output) out as tokens come.

        Args:
            prompts: rows of ids.
            options: of all rows.
            forced: a row of tokens for each prompt that are taken instead of sampled ones, from the first new one on
                (teacher forcing).
            limits: new tokens of each row, instead of the options' `max_new_tokens`.
            top_logprobs: how many of the likeliest tokens are reported at each step.
            on_prefill: called with the prompt tokens that were read, and how many there are.

        Raises:
            UserError: bad input, told in one line.
            NotImplementedError: the implementation that `options` name does not cover this model on this machine.
        """
        rows = self.check_prompts(prompts, 1)
        return TokenStream(
            self._route(engine_options(self.engine_options, options)), rows, options, forced=forced, limits=limits,
            top_logprobs=top_logprobs, on_prefill=on_prefill,
        )  # fmt: skip

    def generate_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        options: GenerateOptions,
        *,
        forced: Sequence[Sequence[int]] | None = None,
        limits: Sequence[int] | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Result:
        """`stream_tokens` to its end."""
        stream = self.stream_tokens(prompts, options, forced=forced, limits=limits, on_prefill=on_prefill)
        for _ in stream:
            pass
        return stream.result()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The folder's tokenizer, read at first use; None if it has none."""
        return Tokenizer.from_folder(self.path)

    def generate(
        self,
        prompts: Prompts | None = None,
        *,
        chat: bool = False,
        system: str | None = None,
        messages: Conversations | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        stop: str | Iterable[str] | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
        **options: Unpack[GenerateKeywords],
    ) -> Generation:
        """Continue one prompt or several: texts, conversations, or rows of token ids, which are used as they are.

        Args:
            prompts: a text, a row of ids, or a list of texts or of rows of ids.
            chat: put texts through the checkpoint's chat template.
            system: the system message of every chat.
            messages: a conversation, `[{"role": …, "content": …}, …]`, or several, instead of prompts.
            template_kwargs: keywords for the chat template, such as `{"enable_thinking": False}`.
            stop: a text before which a row ends, or several; a special token's name is one too.
            on_prefill: called with the prompt tokens that were read, and how many there are.
            options: see `GenerateKeywords`.

        Raises:
            UserError: bad input, told in one line.
            TypeError: an option that does not exist.
        """
        chosen = self.options(**options)
        rows = encode_prompts(
            self.tokenizer, prompts, chat=chat, system=system, messages=messages, template_kwargs=template_kwargs,
            model=self.path,
        )  # fmt: skip
        texts = self._texts(len(rows), stop, chosen)
        stream = self.stream_tokens(rows, chosen, on_prefill=on_prefill)
        for _ in _pieces(stream, texts):
            pass
        result = stream.result()
        return Generation(
            tokens=result.tokens,
            logprobs=result.logprobs,
            text=[text.text for text in texts] if texts is not None else None,
            finish_reason=result.finish_reason,
            usage=[
                Usage(len(row), cached, len(new))
                for row, cached, new in zip(rows, result.cached_tokens, result.tokens, strict=True)
            ],
            timing=result.timing,
            attention=result.attention,
        )

    def stream(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        chat: bool = False,
        system: str | None = None,
        messages: Sequence[Message] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        stop: str | Iterable[str] | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
        **options: Unpack[GenerateKeywords],
    ) -> Iterator[str]:
        """Continue one prompt: read now, its text is yielded as it becomes final. All else is as in `generate`."""
        chosen = self.options(**options)
        texts = self._texts(1, stop, chosen)
        if texts is None:
            raise UserError(f"{self.path} has no tokenizer, so there is no text to stream; use generate")
        rows = encode_prompts(
            self.tokenizer, prompt, chat=chat, system=system, messages=messages, template_kwargs=template_kwargs,
            model=self.path,
        )  # fmt: skip
        if len(rows) > 1:
            raise UserError(f"there are {len(rows)} prompts; only one can be streamed")
        return _pieces(self.stream_tokens(rows, chosen, on_prefill=on_prefill), texts)

    def options(self, **keywords: Unpack[GenerateKeywords]) -> GenerateOptions:
        """The engine's options for the keywords that `generate` takes.

        Raises:
            UserError: a value out of its range, or a head map of another model.
            TypeError: a keyword that does not exist.
        """
        policy, sampling, others = sort_keywords(keywords)
        return GenerateOptions(
            **others,
            heads=self.choose_heads(keywords.get("heads")),
            policy=SelectionPolicy(**policy),
            sampling=SamplingParams(**sampling),
            eos_ids=self.eos_ids,
        )

    def choose_heads(self, heads: str | Path | HeadMap | None = None) -> HeadMap:
        """The map that `heads` names: "all", "none", a map or its file; None is the model's own, else all.

        Raises:
            UserError: a map that cannot be read, or was made for another model.
        """
        if heads is None and self.heads is None:
            _log.info("%s has no heads.json: every KV head retrieves", self.path)
        return choose_heads(self.config, self.heads, heads)

    def _texts(self, rows: int, stop: str | Iterable[str] | None, options: GenerateOptions) -> list[TextStream] | None:
        stops = as_stops(stop)
        if self.tokenizer is None:
            if stops:
                raise UserError(f"stop texts need a tokenizer, and {self.path} has none")
            return None
        eos_ids = () if options.ignore_eos else options.eos_ids
        return [TextStream(self.tokenizer, stops, eos_ids) for _ in range(rows)]


def choose_heads(config: ModelConfig, own: HeadMap | None, heads: str | Path | HeadMap | None) -> HeadMap:
    """The map that `heads` names; None is the model's `own`, else all heads. See `LLM.choose_heads`."""
    if heads is None:
        return own or HeadMap.all(config)
    if heads == "all":
        return HeadMap.all(config)
    if heads == "none":
        return HeadMap.none(config)
    if isinstance(heads, HeadMap):
        heads.check(config)
        return heads
    if not isinstance(heads, str | os.PathLike):
        raise UserError(f"heads is {heads!r}; give all, none, a HeadMap or the file of one")
    return HeadMap.load(heads, config)


def prepare(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    options: GenerateOptions,
    base: EngineOptions | None = None,
    layout: Layout | None = None,
) -> None:
    """Compile in the background what these prompts will need of a model that is not loaded yet.

    Args:
        config: the model's, with the dtype that it is going to have.
        prompts: rows of token ids.
        options: of the generation.
        base: the engine's options as far as `options` does not say them.
        layout: how the model is going to lie on several devices.
    """
    for row, prompt in enumerate(prompts):
        check_prompt(config, tuple(prompt), options.max_new_tokens, config.max_tokens, f"prompt {row}")
    spec, shapes = ModelSpec.abstract(config, config.dtype, layout)
    engine = Engine(spec, shapes, engine_options(base or EngineOptions(), options))
    engine.prepare(make_requests([str(row) for row in range(len(prompts))], list(map(tuple, prompts)), options))


def engine_options(base: EngineOptions, options: GenerateOptions) -> EngineOptions:
    """The base with what a call may choose."""
    return dataclasses.replace(
        base, page_size=options.page_size, correct_every=options.correct_every, implementation=options.implementation,
        kv_dtype=options.kv_dtype,
    )  # fmt: skip


LoadedModel = LLM
"""The former name, for one release."""


def _pieces(stream: TokenStream, texts: list[TextStream] | None) -> Iterator[str]:
    """Follow a generation to its end, rows ended by their stop texts; yields the text of all rows as it comes."""
    for row, output in stream:
        if texts is None:
            continue
        for count, token in enumerate(output.tokens, 1):
            if piece := texts[row].push(token):
                yield piece
            if texts[row].stopped:
                stream.finish(row, unused=len(output.tokens) - count)
                break
    for text in texts or ():
        if piece := text.finish():
            yield piece
