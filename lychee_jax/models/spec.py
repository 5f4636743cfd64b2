"""The structure of a model without its weights."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from lychee_jax.config import ModelConfig
from lychee_jax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """The structure of a model without its weights: the static half of every program.

    Models of one configuration have one structure, so that equal configurations share compiled programs.
    """

    config: ModelConfig
    graphdef: Any = dataclasses.field(compare=False)
    treedef: Any = dataclasses.field(compare=False)

    @classmethod
    def split(cls, model: Decoder) -> tuple["ModelSpec", tuple[jax.Array, ...]]:
        """Take a module apart once, so that no module is walked on the host in a decode loop."""
        graphdef, state = nnx.split(model)
        leaves, treedef = jax.tree.flatten(state)
        return cls(model.config, graphdef, treedef), tuple(leaves)

    def merge(self, weights: tuple[jax.Array, ...]) -> Decoder:
        """The module again, around traced weights."""
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, weights))


type Params = dict[str, jax.Array]


class Functional:
    """A decoder as a pure function of its parameters."""

    def __init__(self, config: ModelConfig) -> None:
        model = nnx.eval_shape(lambda: Decoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
        self._graph, state = nnx.split(model)
        leaves, self._tree = jax.tree.flatten(state)
        paths = [path for path, _ in jax.tree.leaves_with_path(state)]
        self.shapes = {
            jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf.shape
            for path, leaf in zip(paths, leaves, strict=True)
        }

    def bind(self, params: Params, dtype: DTypeLike) -> Decoder:
        """The decoder with these parameters, cast to `dtype`."""
        leaves = [params[name].astype(dtype) for name in self.shapes]
        return nnx.merge(self._graph, jax.tree.unflatten(self._tree, leaves))

    def initial(self, seed: int, residual_scale: float) -> Params:
        """Normal kernels of variance 1 / inputs; those that write to the residual stream times `residual_scale`."""
        keys = jax.random.split(jax.random.key(seed), len(self.shapes))
        params: Params = {}
        for key, (name, shape) in zip(keys, self.shapes.items(), strict=True):
            if name.endswith("scale"):
                params[name] = jnp.ones(shape, jnp.float32)
            elif name.endswith("bias"):
                params[name] = jnp.zeros(shape, jnp.float32)
            else:
                writes = name.endswith(("o_proj.kernel", "down_proj.kernel"))
                inputs = int(np.prod(shape[:-1])) if writes else shape[0]
                std = residual_scale / inputs**0.5 if writes else 1.0 / inputs**0.5
                if name.startswith("embed"):
                    std = 1.0 / shape[1] ** 0.5
                params[name] = std * jax.random.normal(key, shape, jnp.float32)
        return params
