"""What the engine gives back."""

import dataclasses
from typing import Any

from lychee_jax.engine.request import FinishReason

type PromptLogprob = tuple[int, float, list[tuple[int, float]]]


@dataclasses.dataclass
class RequestOutput:
    """What one request got since its last output.

    `tokens` are new ones, a stopping eos included. `greedy` says of each whether it was the likeliest; `top`: the
    likeliest tokens and their log-probabilities at each step, as many as were asked for. `pages_read` and `pages_held`
    are summed over decode steps, layers and KV heads: what was read, and what dense attention reads. `prompt_logprobs`
    come with the first token, if they were asked for: of each token of the prompt but the first its id, its
    log-probability and the likeliest tokens with theirs. `error` goes with the finish reason "error".
    """

    request_id: str
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    greedy: list[bool] = dataclasses.field(default_factory=list)
    top: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    pages_read: int = 0
    pages_held: int = 0
    cached_tokens: int = 0
    prompt_logprobs: list[PromptLogprob] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds. As long as a row waits for its first token the time is the prefill's, also where others decode already.

    `tokens_per_s`: of all rows, while every one decodes. `compile_s`: how long compilers were waited for; it is in
    neither of the other two.
    """

    prefill_s: float
    decode_s: float
    tokens_per_s: float
    compile_s: float


@dataclasses.dataclass(frozen=True)
class Result:
    """What was generated: one entry a row, a stopping eos included in `tokens`."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    greedy: list[list[bool]]
    finish_reason: list[FinishReason]
    cached_tokens: list[int]
    pages_read: list[int]
    pages_held: list[int]
    timing: Timing
    attention: dict[str, Any]
