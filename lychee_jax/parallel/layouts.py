"""How weights lie in a TPU's memory, where JAX's default order would cost a copy of them in every program."""

from typing import Any

import jax
from jax.experimental.layout import Format, Layout

from lychee_jax.config import ModelConfig


def weight_format(config: ModelConfig, shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> Format:
    """The order of a weight's dimensions that TPU programs read it in.

    Projections `[E, heads, H]` go head by head: tiles are of the last two dimensions, and a product over E wants E in
    them. In the default order every program of more than one query would copy all of them first (1 GiB for 8 B).
    """
    heads = (config.num_heads, config.num_kv_heads)
    projection = len(shape) == 3 and shape[0] == config.hidden_size and shape[1] in heads
    order = (1, 0, 2) if projection else tuple(range(len(shape)))
    return Format(Layout(order), sharding)


def place_weights(config: ModelConfig, weights: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Weights in the order that programs want; on other platforms than TPU as they are."""

    def place(leaf: Any) -> Any:
        wanted = weight_format(config, leaf.shape, leaf.sharding)
        return jax.device_put(leaf, wanted)

    return tuple(map(place, weights)) if jax.default_backend() == "tpu" else weights
