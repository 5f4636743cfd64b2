"""How the next token is chosen, as callers say it; host only, no JAX."""

import dataclasses

from lychee_jax.arguments import settle_numbers
from lychee_jax.errors import UserError

# The largest finite float32.
FLOAT32_MAX = 3.4028234663852886e38


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
