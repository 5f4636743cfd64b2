"""From logits to the next token: repetition penalty, temperature, top-k, top-p, min-p, all in float32.

Tokens are ranked by logit, equal logits by id (the lowest first). Every filter keeps the head of that ranking, so that
"the k best" are exactly k tokens also among ties, and greedy decoding is rank 0.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Int32, UInt32

from lychee_jax.arguments import settle_numbers
from lychee_jax.errors import UserError

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_FLOAT32_TINY = float(np.finfo(np.float32).tiny)


class SamplingKind(NamedTuple):
    """What decides which program is compiled; everything else about sampling is traced."""

    greedy: bool
    filtered: bool  # top-k or top-p: needs the ranking, that is a sort of the vocabulary
    penalised: bool


class SamplingArrays(NamedTuple):
    """The numbers of `SamplingParams` as traced scalars: another temperature or seed compiles nothing."""

    temperature: Float32[Array, ""]
    top_k: Int32[Array, ""]
    top_p: Float32[Array, ""]
    log_min_p: Float32[Array, ""]
    repetition_penalty: Float32[Array, ""]
    seed: UInt32[Array, ""]


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
        if not 0 <= self.temperature <= _FLOAT32_MAX:
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

    @property
    def kind(self) -> SamplingKind:
        """The static part. A temperature too small for a normal float32 is greedy: dividing by it would give NaN."""
        greedy = self.temperature < _FLOAT32_TINY
        return SamplingKind(
            greedy=greedy,
            filtered=not greedy and (self.top_k > 0 or self.top_p < 1),
            penalised=self.repetition_penalty != 1,
        )

    def arrays(self) -> SamplingArrays:
        """The traced part, scalars on the default device."""
        return SamplingArrays(
            temperature=jnp.asarray(self.temperature, jnp.float32),
            top_k=jnp.asarray(self.top_k, jnp.int32),
            top_p=jnp.asarray(self.top_p, jnp.float32),
            log_min_p=jnp.asarray(math.log(self.min_p) if self.min_p > 0 else -math.inf, jnp.float32),
            repetition_penalty=jnp.asarray(self.repetition_penalty, jnp.float32),
            seed=jnp.asarray(self.seed, jnp.uint32),
        )


def sample(
    logits: Float32[Array, "B V"],
    arrays: SamplingArrays,
    kind: SamplingKind,
    seen: Bool[Array, "B V"] | None,
    rows: Int[Array, " B"],
    steps: Int[Array, " B"],
) -> tuple[Int32[Array, " B"], Float32[Array, " B"]]:
    """Choose one token per row; a pure function, to be called inside `jax.jit` with `kind` static.

    The randomness of a row depends on (seed, row, step) alone, never on the other rows or on the batch size. The noise
    belongs to token ids, so a filter changes the outcome only where it removes the token chosen without it.

    Args:
        logits: raw float32 logits.
        arrays: `SamplingParams.arrays()`.
        kind: `SamplingParams.kind`.
        seen: which tokens occur in the row's prompt or its text so far; read only if `kind.penalised`.
        rows: index of each row in the caller's list of prompts.
        steps: index of the token to be chosen, from 0.

    Returns:
        tokens and the natural log-softmax of the raw logits (before penalty, temperature and filters) at them.
    """
    scores = _penalise(logits, seen, arrays.repetition_penalty) if kind.penalised and seen is not None else logits
    if kind.greedy:
        tokens = jnp.argmax(scores, axis=-1).astype(jnp.int32)  # argmax returns the first of equals
    else:
        tokens = _draw(scores, arrays, kind, _gumbel(arrays.seed, rows, steps, logits.shape[-1]))
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), tokens[:, None], axis=-1)[:, 0]
    return tokens, logprobs


def _penalise(
    logits: Float32[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float32[Array, ""]
) -> Float32[Array, "B V"]:
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _gumbel(
    seed: UInt32[Array, ""], rows: Int[Array, " B"], steps: Int[Array, " B"], vocab_size: int
) -> Float32[Array, "B V"]:
    key = jax.random.key(seed)

    def noise(row: Int[Array, ""], step: Int[Array, ""]) -> Float32[Array, " V"]:
        return jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(key, row), step), (vocab_size,), jnp.float32)

    return jax.vmap(noise)(rows, steps)


def _draw(
    scores: Float32[Array, "B V"], arrays: SamplingArrays, kind: SamplingKind, noise: Float32[Array, "B V"]
) -> Int32[Array, " B"]:
    """Gumbel-max: the argmax of log p + noise over the survivors is a draw from their renormalised distribution."""
    # The maximum is taken off first: a tiny temperature then sends the others to -inf instead of everything to NaN.
    scaled = (scores - jnp.max(scores, axis=-1, keepdims=True)) / arrays.temperature
    ids = jax.lax.broadcasted_iota(jnp.int32, scaled.shape, 1)
    if kind.filtered:
        negated, ids, noise = jax.lax.sort((-scaled, ids, noise), num_keys=2)
        scaled = -negated
        scaled = jnp.where(_top_p(_top_k(scaled, arrays.top_k), arrays.top_p), scaled, -jnp.inf)
    # The best token survives every filter and its scaled score is 0, so min-p is a bound on scaled scores.
    kept = jnp.where(scaled >= arrays.log_min_p, scaled + noise, -jnp.inf)
    return jnp.take_along_axis(ids, jnp.argmax(kept, axis=-1, keepdims=True), axis=-1)[:, 0]


def _top_k(ranked: Float32[Array, "B V"], top_k: Int32[Array, ""]) -> Float32[Array, "B V"]:
    rank = jax.lax.broadcasted_iota(jnp.int32, ranked.shape, 1)
    return jnp.where((rank < top_k) | (top_k == 0), ranked, -jnp.inf)


def _top_p(ranked: Float32[Array, "B V"], top_p: Float32[Array, ""]) -> Bool[Array, "B V"]:
    """Which ranks survive: those whose better ranks do not yet hold mass p. Rank 0 always does."""
    mass = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1)
    before = jnp.pad(mass[:, :-1], ((0, 0), (1, 0)))
    # At p = 1 rounding in the sum must not cut the tail off.
    return ((before < top_p) | (before == 0) | (top_p >= 1)) & (ranked > -jnp.inf)
