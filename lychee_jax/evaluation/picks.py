"""Which pages sparse heads pick over a quantised cache, and which over a plain one: the same prompts, one step each.

A wrong answer is seen; a page that was left out is not, until an answer needs it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from lychee_jax.engine.options import GenerateOptions
from lychee_jax.engine.page_trace import Reading
from lychee_jax.errors import UserError
from lychee_jax.llm import LLM


@dataclasses.dataclass(frozen=True)
class PickComparison:
    """Pages of all sparse heads in the step after each prompt, those left out that are always read.

    Attributes:
        picked: over the cache that is not quantised.
        differ: how many of these are not picked over the quantised one.
    """

    kv_dtype: str
    prompts: int
    picked: int
    differ: int

    @property
    def share(self) -> float:
        """Of the picked pages, how many differ."""
        return self.differ / self.picked if self.picked else 0.0

    def __str__(self) -> str:
        return f"{self.differ:,} of {self.picked:,} picked pages differ ({self.share:.2%}) over {self.prompts} prompts"


def compare_picks(
    model: LLM,
    prompts: Sequence[Sequence[int]],
    options: GenerateOptions,
    on_progress: Callable[[int], None] = lambda done: None,
) -> PickComparison:
    """Read every prompt into both caches, and feed both the likeliest token of the one that is not quantised.

    Args:
        model: whose heads pick.
        prompts: rows of token ids.
        options: of which `kv_dtype`, the head map, the policy and the page size count.
        on_progress: called with how many readings are done, of two for each prompt.

    Raises:
        UserError: the options name no quantised cache, or a prompt that this model cannot take.
    """
    if options.kv_dtype is None:
        raise UserError("there is nothing to compare: --kv-dtype is auto; give int8 or fp8")
    plain = dataclasses.replace(options, kv_dtype=None)
    wanted: list[Reading] = []
    for prompt in prompts:  # one engine after the other: each has a cache of its own
        wanted.append(model.read_pages(prompt, plain))
        on_progress(len(wanted))
    picked = differ = 0
    for index, (prompt, want) in enumerate(zip(prompts, wanted, strict=True)):
        got = model.read_pages(prompt, options, token=want.token)
        ours, theirs = (_choices(reading, options) for reading in (want, got))
        picked += int(ours.sum())
        differ += int((ours & ~theirs).sum())
        on_progress(len(wanted) + index + 1)
    return PickComparison(options.kv_dtype, len(wanted), picked, differ)


def _choices(reading: Reading, options: GenerateOptions) -> np.ndarray:
    """The pages that were picked, `[L, K, P]`: of sparse heads, and not those that are always read."""
    spec = options.policy.spec(options.page_size)
    chosen = reading.pages.copy()
    for layer, heads in enumerate(reading.head_map.retrieval):
        chosen[layer, list(heads)] = False
    chosen[..., : spec.sink_pages] = False
    chosen[..., max(0, chosen.shape[-1] - spec.recent_pages) :] = False
    return chosen
