"""How the next token is chosen, as callers say it; host only, no JAX."""

import dataclasses
from typing import Any

from lychee_jax.arguments import MAX_INT32, number, settle_numbers, whole_number
from lychee_jax.errors import UserError

# The largest finite float32.
FLOAT32_MAX = 3.4028234663852886e38

MAX_LOGIT_BIASES = 300


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen.

    - `temperature`: 0 is greedy (the largest logit, ties to the lowest id).
    - `top_k`: keep the k likeliest tokens; 0 keeps all.
    - `top_p`: of those, keep the fewest likeliest tokens whose probabilities sum to at least p
      (Holtzman et al. 2020, arXiv 1904.09751); 1 keeps all.
    - `min_p`: of those, keep tokens at least `min_p` times as likely as the likeliest
      (Nguyen et al. 2024, arXiv 2407.01082); 0 keeps all.
    - `repetition_penalty`: logits of tokens in the prompt or in the text so far are divided by it where positive,
      else multiplied (Keskar et al. 2019, arXiv 1909.05858); 1 is off.
    - `presence_penalty`, `frequency_penalty`: are taken off the logits of tokens in the text so far (not the prompt),
      once, and as often as the token is in it; −2 to 2, 0 is off.
    - `logit_bias`: (token id, number) pairs: numbers from −100 to 100 that are added to logits, after all penalties.
    - `seed`: of the random choice, 0 ≤ seed < 2³².

    Raises:
        UserError: a number out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        settle_numbers(self)
        # Written as "not inside" so that NaN is refused too.
        if not 0 <= self.temperature <= FLOAT32_MAX:
            raise UserError(f"temperature must be a finite number of at least 0 (0 is greedy), not {self.temperature}")
        if not 0 <= self.top_k < 2**31:
            raise UserError(f"top-k must be a whole number of at least 0 (0 keeps every token), not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p must be above 0 and at most 1 (1 keeps every token), not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min-p must lie between 0 (keeps every token) and 1, not {self.min_p}")
        if not 1e-3 <= self.repetition_penalty <= 1e3:
            raise UserError(
                f"repetition penalty must lie between 0.001 and 1000 (1 is off), not {self.repetition_penalty}"
            )
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed must be a whole number from 0 to {2**32 - 1}, not {self.seed}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise UserError(f"{name} must lie between -2 and 2 (0 is off), not {getattr(self, name)}")
        object.__setattr__(self, "logit_bias", _as_biases(self.logit_bias))


def _as_biases(given: Any) -> tuple[tuple[int, float], ...]:
    """Pairs of a mapping, or of a sequence of pairs; None is none."""
    try:
        pairs = dict(() if given is None else given)
    except (TypeError, ValueError) as error:
        raise UserError(f"logit_bias is {given!r}; give token ids with numbers, such as {{128: -5}}") from error
    biases = {
        whole_number(token, "a token id of logit_bias"): number(value, "logit_bias") for token, value in pairs.items()
    }
    if len(biases) > MAX_LOGIT_BIASES:
        raise UserError(f"logit_bias has {len(biases)} tokens; at most {MAX_LOGIT_BIASES} may have one")
    for token, value in biases.items():
        if not 0 <= token <= MAX_INT32:
            raise UserError(f"logit_bias has the token id {token}; it must lie in the vocabulary")
        if not -100 <= value <= 100:
            raise UserError(f"logit_bias must lie between -100 and 100, not {value} (token {token})")
    return tuple(biases.items())
