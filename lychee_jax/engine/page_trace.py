"""What each head reads in one decode step: the pages, layer by layer, for pictures and for a look inside."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int32

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

    `length` counts the tokens in the cache, `token`, which was fed, included; `head_map` says who picked.
    """

    pages: Bool[np.ndarray, "L K P"]
    length: int
    page_size: int
    head_map: HeadMap
    token: int

    @property
    def share(self) -> float:
        """Of the cache that all heads read together."""
        return float(self.pages.mean())


def trace_step(
    engine: Engine, prompt: tuple[int, ...], attention: AttentionOptions, token: int | None = None
) -> Reading:
    """Read a prompt, feed a token with the roles of `attention`, and see which pages every head reads.

    The step is hybrid whatever the mode; without a token, the likeliest one is fed.

    Raises:
        UserError: a prompt that the engine cannot take, or other requests are under way.
    """
    if engine.has_work:
        raise UserError("the engine is busy; a step can be watched when no other request is under way")
    model = engine.spec.config
    head_map = attention.heads or HeadMap.all(model)
    hybrid = AttentionOptions("hybrid", head_map, attention.policy)
    request = Request("trace", prompt, 1, attention=hybrid)
    engine.add_request(request, hold=True)
    try:
        likeliest = _first_token(engine)
        token = likeliest if token is None else token
        selected = _selected(engine, request, hybrid, token)
    finally:
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
    return Reading(pages, len(prompt) + 1, engine.options.page_size, head_map, token)


def _first_token(engine: Engine) -> int:
    """What the only request of the engine begins with."""
    while True:
        for output in engine.step():
            if output.error is not None:
                raise UserError(output.error)
            return output.tokens[0]


def _selected(engine: Engine, request: Request, attention: AttentionOptions, token: int) -> Int32[np.ndarray, "L K M"]:
    """Feed a token after the request's prompt: the pages that each layer hands up, padded with −1."""
    runner, allocated, position = engine.runner, engine.pages(request.id), len(request.prompt)
    assert runner is not None
    width, heads = runner.config.min_rows, engine.spec.config.num_kv_heads
    table = np.zeros((width, runner.max_pages), np.int32)
    table[0, : len(allocated)] = allocated
    positions = np.full((width, 1), position, np.int64)
    cos, sin = runner.rotary(positions, positions + 1)
    plan = runner.plan(attention, np.zeros((1,), bool), 1)
    runner.pools, seen = runner.programs(
        watch_step, width, (engine.spec, plan), engine.weights, runner.pools, np.full((width,), token, np.int32),
        positions[:, 0].astype(np.int32), np.arange(width) == 0, table, cos, sin,
    )  # fmt: skip
    picked = np.asarray(seen)[:, 0]
    layout = engine.spec.layout
    return picked if layout is None else picked[:, [layout.places.index(head) for head in range(heads)]]
