"""How Hugging Face names and lays out each parameter of the decoder: the only place that knows its names."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Shaped

from lychee_jax.config import ModelConfig
from lychee_jax.models.decoder import Decoder

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"

_TOP = {"embed.embedding": EMBEDDING, "norm.scale": "model.norm.weight", "lm_head.kernel": LM_HEAD}
_MODULES = {
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "attention": "self_attn",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def is_derived(name: str) -> bool:
    """Whether a tensor of a checkpoint only repeats what its config says: old ones store the rotary frequencies."""
    return name.endswith("rotary_emb.inv_freq")


@dataclasses.dataclass(frozen=True)
class Key:
    """One parameter: `path` and `shape` are ours, `name` is Hugging Face's.

    Hugging Face stores linear maps as `[out, in]` with heads and head_dim flattened into one axis; our kernels are
    `[*in, *out]`. `inputs` counts a kernel's input axes (0: no kernel, stored as it is but for flattened heads).
    """

    path: str
    name: str
    shape: tuple[int, ...]
    inputs: int

    @property
    def source_shape(self) -> tuple[int, ...]:
        """The shape in the Hugging Face checkpoint."""
        if self.inputs:
            return (math.prod(self.shape[self.inputs :]), math.prod(self.shape[: self.inputs]))
        return self.shape if self.name == EMBEDDING else (math.prod(self.shape),)

    def source_view(self, array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """`array`, contiguous and in our layout, seen in Hugging Face's: a view, so writing to it fills `array`."""
        if self.inputs:
            return array.reshape(self.source_shape[::-1]).T
        return array.reshape(self.source_shape)


def keys(config: ModelConfig) -> tuple[Key, ...]:
    """Every parameter of the decoder that `config` describes, shapes from the module itself (no memory is taken)."""
    found = []
    for parts, leaf in nnx.to_flat_state(nnx.state(abstract_decoder(config))):
        path = dotted(parts)
        found.append(Key(path, _name(path), tuple(leaf.shape), _inputs(path)))
    return tuple(found)


@functools.lru_cache(maxsize=4)
def abstract_decoder(config: ModelConfig) -> Decoder:
    """The decoder without its weights: shapes stand for them. Not to be changed."""
    return nnx.eval_shape(lambda: Decoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))


def dotted(parts: Iterable[Any]) -> str:
    """A path in the module's state as the string that names a parameter here."""
    return ".".join(map(str, parts))


def _name(path: str) -> str:
    if path in _TOP:
        return _TOP[path]
    *modules, leaf = path.split(".")
    return ".".join(["model", *(_MODULES.get(module, module) for module in modules), _LEAVES[leaf]])


def _inputs(path: str) -> int:
    if not path.endswith(".kernel"):
        return 0
    return 2 if path.endswith(".o_proj.kernel") else 1
