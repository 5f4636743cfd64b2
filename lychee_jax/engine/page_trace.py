"""What each head reads in one decode step: the pages, layer by layer, for pictures and for a look inside."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.cache.allocator import pages_for
from lychee_jax.engine.compile_timer import Caller
from lychee_jax.engine.engine import Engine
from lychee_jax.engine.options import GenerateOptions
from lychee_jax.engine.outputs import Prefilled
from lychee_jax.engine.programs import DecodePlan, watch_step
from lychee_jax.engine.sampling import SamplingParams
from lychee_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Reading:
    """One step of one sequence: `pages [L, K, P]` says which pages each KV head of each layer read.

    `length` counts the tokens in the cache, the one that was fed included; `head_map` says who picked.
    """

    pages: Bool[np.ndarray, "L K P"]
    length: int
    page_size: int
    head_map: HeadMap

    @property
    def share(self) -> float:
        """Of the cache that all heads read together."""
        return float(self.pages.mean())


def read_pages(engine: Engine, filled: Prefilled, options: GenerateOptions, *, row: int = 0) -> Reading:
    """Feed the likeliest next token of one row, in hybrid attention, and see which pages every head reads.

    The cache is left as it was.

    Raises:
        UserError: there is no such row, or the cache was decoded already.
    """
    if not 0 <= row < len(filled.prompts):
        raise UserError(f"row is {row}; there are {len(filled.prompts)} prompts")
    if filled.pools is None:
        raise UserError("this cache was decoded already; prefill again, or decode it with keep=True")
    config = engine.config
    head_map = options.heads or HeadMap.all(config)
    position = len(filled.prompts[row])
    active = jnp.arange(filled.page_table.shape[0]) == row
    positions = jnp.where(active, position, 0).astype(jnp.int32)
    at = np.asarray(positions)[:, None]
    cos, sin = engine.rotary(at, at + 1)
    plan = DecodePlan(head_map, options.policy, SamplingParams().kind, 1, options.implementation)
    seen = Caller(engine.dtype)(
        watch_step, engine.spec, plan, engine.weights, filled.pools, filled.last, positions, active,
        filled.page_table, cos, sin,
    )  # fmt: skip
    selected = np.asarray(seen)[:, row]

    count = pages_for(position + 1, filled.page_size)
    pages = np.zeros((config.num_layers, config.num_kv_heads, count), bool)
    for layer in range(config.num_layers):
        for head in range(config.num_kv_heads):
            if head in head_map.retrieval[layer]:
                pages[layer, head] = True
            else:
                chosen = selected[layer, head]
                pages[layer, head, chosen[chosen >= 0]] = True
    return Reading(pages, position + 1, filled.page_size, head_map)
