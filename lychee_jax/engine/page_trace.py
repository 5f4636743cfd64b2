"""What each head reads in one decode step: the pages, layer by layer, for pictures and for a look inside."""

import dataclasses

import numpy as np
from jaxtyping import Bool

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.cache.allocator import pages_for
from lychee_jax.engine.engine import Engine
from lychee_jax.engine.options import AttentionOptions
from lychee_jax.engine.programs import watch_step
from lychee_jax.engine.request import Request
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


def trace_step(engine: Engine, prompt: tuple[int, ...], attention: AttentionOptions) -> Reading:
    """Read a prompt, feed the likeliest next token with the roles of `attention`, and see which pages every head reads.

    Raises:
        UserError: a prompt that the engine cannot take, or other requests are under way.
    """
    if engine.has_work:
        raise UserError("the engine is busy; a step can be watched when no other request is under way")
    model = engine.spec.config
    head_map = attention.heads or HeadMap.all(model)
    request = Request("trace", prompt, 1, attention=AttentionOptions("dense"))
    engine.add_request(request, hold=True)
    token = None
    while token is None:
        for output in engine.step():
            if output.error is not None:
                raise UserError(output.error)
            token = output.tokens[0]
    runner = engine.runner
    assert runner is not None
    allocated = engine.pages(request.id)
    width = runner.config.min_rows
    positions = np.full((width,), len(prompt), np.int64)
    table = np.zeros((width, runner.max_pages), np.int32)
    table[0, : len(allocated)] = allocated
    cos, sin = runner.rotary(positions[:, None], positions[:, None] + 1)
    plan = runner.plan(AttentionOptions("hybrid", head_map, attention.policy), np.zeros((1,), bool))
    seen = runner.programs(
        watch_step, width, (engine.spec, dataclasses.replace(plan, steps=1)), engine.weights, runner.pools,
        np.full((width,), token, np.int32), positions.astype(np.int32), np.arange(width) == 0, table, cos, sin,
    )  # fmt: skip
    selected = np.asarray(seen)[:, 0]
    engine.finish(request.id)

    count = pages_for(len(prompt) + 1, engine.options.page_size)
    pages = np.zeros((model.num_layers, model.num_kv_heads, count), bool)
    for layer in range(model.num_layers):
        for head in range(model.num_kv_heads):
            if head in head_map.retrieval[layer]:
                pages[layer, head] = True
            else:
                chosen = selected[layer, head]
                pages[layer, head, chosen[chosen >= 0]] = True
    return Reading(pages, len(prompt) + 1, engine.options.page_size, head_map)
