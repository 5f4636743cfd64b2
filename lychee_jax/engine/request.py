"""What a caller asks of the engine, and how far it has come; host only, no JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Literal

from lychee_jax.engine.grammar import Grammar
from lychee_jax.engine.sampling_params import SamplingParams
from lychee_jax.errors import UserError

MAX_EOS_IDS = 24
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclasses.dataclass(frozen=True)
class Request:
    """One sequence to be generated: the unit that the engine schedules.

    Attributes:
        id: unique among the requests that the engine knows.
        prompt: token ids, at least one.
        max_new_tokens: at least 1; pages for prompt and new tokens are reserved at admission, so nothing is preempted.
        sampling: how tokens are chosen.
        attention: what the decode steps read; requests of equal attention share programs. (Opaque to the scheduler.)
        eos_ids: tokens that end the text, at most `MAX_EOS_IDS`.
        forced: tokens that are taken instead of sampled ones, from the first new token on (teacher forcing).
        sample_index: with seed and step, what randomness depends on.
        top_logprobs: how many of the likeliest tokens are reported at each step, with their log-probabilities.
        prompt_logprobs: log-probabilities of the prompt's tokens are reported, but the first's, and so many of the
            likeliest tokens at each; None: they are not. All of such a prompt is read, whatever the cache holds.
        cache_salt: prompts share cached pages only if this is equal too. The engine puts into it whatever else decides
            what a page holds: model fingerprint, dtypes, page size, implementation, adapter.
        grammar: what says which tokens may come next. Such a request is guided: its next step is sent when its newest
            token was read, and as long as it decodes the blocks of all rows have one step.
        fork_of: the id of a request with the same prompt and salt that the engine knows. If this one can start where
            that prompt ends, the prompt is read once for both and its pages are shared; if not, it makes no difference.

    Raises:
        UserError: an empty prompt, or no token to be generated.
    """

    id: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    attention: Hashable = None
    eos_ids: tuple[int, ...] = ()
    forced: tuple[int, ...] = ()
    sample_index: int = 0
    top_logprobs: int = 0
    cache_salt: bytes = b""
    grammar: Grammar | None = None
    prompt_logprobs: int | None = None
    fork_of: str | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UserError("the prompt is empty; at least one token is needed")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
