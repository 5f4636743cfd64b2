"""The model that is served: its engine, its tokenizer, and what requests get that say nothing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax

from lychee_jax.engine.engine import Engine
from lychee_jax.engine.options import EngineOptions, GenerateOptions
from lychee_jax.errors import UserError
from lychee_jax.llm import LLM, engine_options
from lychee_jax.server.grammar import Grammars
from lychee_jax.server.token_texts import TokenTexts
from lychee_jax.server.warmup import Readiness
from lychee_jax.text.tokenizer import Tokenizer

_CPU_CACHE = 2 << 30


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """Everything about the model that handlers look at; only the engine's thread may step the engine.

    `defaults`: attention, policy and the ids that end a text. `readiness`: which programs are compiled; without it
    each is at its first use, and everyone waits.
    """

    engine: Engine
    tokenizer: Tokenizer
    defaults: GenerateOptions
    readiness: Readiness | None = None

    @classmethod
    def of(cls, llm: LLM, defaults: GenerateOptions, options: EngineOptions) -> ServedModel:
        """The engine of a loaded model. Its cache has one size from the start: growing waits for all who run.

        Raises:
            UserError: a model without a tokenizer.
        """
        if llm.tokenizer is None:
            raise UserError(f"{llm.path} has no tokenizer, and a server needs one")
        if options.cache_memory is None and jax.default_backend() == "cpu":
            options = dataclasses.replace(options, cache_memory=_CPU_CACHE)
        defaults = dataclasses.replace(defaults, eos_ids=llm.eos_ids)
        return cls(llm.engine(engine_options(options, defaults)), llm.tokenizer, defaults)

    def check_ids(self, tokens: Sequence[int]) -> None:
        """Raise UserError for an id that the vocabulary does not have."""
        size = self.engine.spec.config.vocab_size
        for token in (min(tokens, default=0), max(tokens, default=0)):
            if not 0 <= token < size:
                raise UserError(f"there is no token id {token}; the vocabulary has ids 0 to {size - 1}")

    @functools.cached_property
    def grammars(self) -> Grammars:
        """Makes grammars for answers; UserError where the tokenizer cannot."""
        return Grammars(self.tokenizer, self.engine.spec.config.vocab_size, self.defaults.eos_ids)

    @functools.cached_property
    def token_texts(self) -> TokenTexts:
        """How single tokens look."""
        return TokenTexts(self.tokenizer)
