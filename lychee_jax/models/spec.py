"""The structure of a model without its weights."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lychee_jax.config import ModelConfig
from lychee_jax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """The structure of a model without its weights: the static half of every program.

    Models of one configuration have one structure, so that equal configurations share compiled programs.

    Attributes:
        config: all that is compared.
        names: a dotted path for every weight ("layers.0.mlp.down_proj.kernel"), in the order of the weights.
    """

    config: ModelConfig
    names: tuple[str, ...] = dataclasses.field(compare=False)
    graphdef: Any = dataclasses.field(compare=False, repr=False)
    treedef: Any = dataclasses.field(compare=False, repr=False)

    @classmethod
    @functools.lru_cache(maxsize=8)
    def abstract(cls, config: ModelConfig, dtype: DTypeLike) -> tuple["ModelSpec", tuple[jax.ShapeDtypeStruct, ...]]:
        """The structure of a model that `split` would give, and the shapes of its weights; no memory is taken.

        What a program is lowered and compiled from before the weights are there.
        """
        return cls.split(nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0))))

    @classmethod
    def split(cls, model: Decoder) -> tuple["ModelSpec", tuple[Any, ...]]:
        """Take a module apart once, so that no module is walked on the host in a decode loop."""
        graphdef, state = nnx.split(model)
        paths, treedef = jax.tree.flatten_with_path(state)
        names = (jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path, _ in paths)
        return cls(model.config, tuple(names), graphdef, treedef), tuple(leaf for _, leaf in paths)

    def merge(self, weights: tuple[Any, ...]) -> Decoder:
        """The module again, around traced weights."""
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, weights))


type Params = dict[str, jax.Array]


class Functional:
    """A decoder as a pure function of its parameters."""

    def __init__(self, config: ModelConfig) -> None:
        self._spec, weights = ModelSpec.abstract(config, jnp.float32)
        self.shapes = {name: leaf.shape for name, leaf in zip(self._spec.names, weights, strict=True)}

    def bind(self, params: Params, dtype: DTypeLike) -> Decoder:
        """The decoder with these parameters, cast to `dtype`."""
        return self._spec.merge(tuple(params[name].astype(dtype) for name in self._spec.names))

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
                std = shape[-1] ** -0.5
                if name.endswith(("o_proj.kernel", "down_proj.kernel")):
                    std *= residual_scale
                params[name] = std * jax.random.normal(key, shape, jnp.float32)
        return params
