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
from lychee_jax.parallel.layouts import Axes, Layout


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """The structure of a model without its weights: the static half of every program.

    Models of one configuration have one structure, so that equal configurations share compiled programs.

    Attributes:
        config: with the layout all that is compared.
        layout: how the weights lie on several devices; `merge` then gives what one of them runs.
        names: a dotted path for every weight ("layers.0.mlp.down_proj.kernel"), in the order of the weights.
        axes: the logical axes of every weight; none: the same on all devices.
    """

    config: ModelConfig
    layout: Layout | None
    names: tuple[str, ...] = dataclasses.field(compare=False)
    axes: tuple[Axes, ...] = dataclasses.field(compare=False, repr=False)
    graphdef: Any = dataclasses.field(compare=False, repr=False)
    treedef: Any = dataclasses.field(compare=False, repr=False)

    @classmethod
    @functools.lru_cache(maxsize=8)
    def abstract(
        cls, config: ModelConfig, dtype: DTypeLike, layout: Layout | None = None
    ) -> tuple["ModelSpec", tuple[jax.ShapeDtypeStruct, ...]]:
        """The structure of a model that `split` would give, and the shapes of its weights; no memory is taken.

        What a program is lowered and compiled from before the weights are there.
        """
        spec, shapes = cls.split(nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0), layout=layout)))
        if layout is not None:
            shapes = tuple(layout.shape(*each) for each in zip(spec.axes, shapes, strict=True))
        return spec, shapes

    @classmethod
    def split(cls, model: Decoder) -> tuple["ModelSpec", tuple[Any, ...]]:
        """Take a module apart once, so that no module is walked on the host in a decode loop."""
        graphdef, state = nnx.split(model)
        paths, treedef = jax.tree.flatten_with_path(state)
        names = tuple(
            jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path, _ in paths
        )
        axes = tuple(_axes(model, name) for name in names)
        return cls(model.config, model.layout, names, axes, graphdef, treedef), tuple(leaf for _, leaf in paths)

    def merge(self, weights: tuple[Any, ...]) -> Decoder:
        """The module again, around traced weights."""
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, weights))


def _axes(model: Decoder, name: str) -> Axes:
    *path, leaf = name.split(".")
    module: Any = model
    for part in path:
        module = module[int(part)] if part.isdecimal() else getattr(module, part)
    axes: Axes = getattr(module, "axes", ())
    return axes if leaf in ("kernel", "embedding") else axes[:1]  # scales and biases belong to output channels


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
