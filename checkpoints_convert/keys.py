"""How Hugging Face names and divides each parameter of the decoder: the only place that knows its names."""

import dataclasses

import jax.numpy as jnp

from lychee_jax.config import ModelConfig
from lychee_jax.models.spec import ModelSpec

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"

_TOP = {"embed.embedding": EMBEDDING, "norm.scale": "model.norm.weight", "lm_head.kernel": LM_HEAD}
_MODULES = {
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "attention": "self_attn",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


_QUANTISED = ("qweight", "qzeros", "g_idx", "scales", "weight_scale", "weight_scale_inv", "weight_packed", "absmax")


def is_quantised(name: str) -> bool:
    """Whether a tensor of a checkpoint belongs to quantised weights: their numbers, or what scales them."""
    return name.rpartition(".")[2] in _QUANTISED


def is_derived(name: str) -> bool:
    """Whether a tensor of a checkpoint only repeats what its config says: old ones store the rotary frequencies."""
    return name.endswith("rotary_emb.inv_freq")


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows of one of our parameters that are a tensor of their own in a Hugging Face checkpoint, of shape `shape`.

    `module` is what that tensor's linear map is called there: "q_proj", where our parameter belongs to `qkv_proj`.
    """

    name: str
    module: str
    rows: slice
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Key:
    """One parameter: `path` and `shape` are ours; Hugging Face stores its rows as one tensor, or as several.

    Both store linear maps as `[out, in]`, heads and head_dim flattened into one axis.
    """

    path: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def keys(config: ModelConfig) -> tuple[Key, ...]:
    """Every parameter of the decoder that `config` describes, shapes from the module itself (no memory is taken)."""
    spec, weights = ModelSpec.abstract(config, jnp.float32)
    return tuple(
        Key(path, leaf.shape, _parts(path, leaf.shape, config)) for path, leaf in zip(spec.names, weights, strict=True)
    )


def _parts(path: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[Part, ...]:
    *modules, module, leaf = path.split(".")
    parts, start = [], 0
    for part, rows in _fused(config).get(module, {module: shape[0]}).items():
        name = _TOP.get(path)
        if name is None:
            names = (_MODULES.get(each, each) for each in (*modules, part))
            name = ".".join(["model", *names, _LEAVES[leaf]])
        parts.append(Part(name, part, slice(start, start + rows), (rows, *shape[1:])))
        start += rows
    return tuple(parts)


def _fused(config: ModelConfig) -> dict[str, dict[str, int]]:
    """Our modules that hold several of Hugging Face's, with the rows of each, in their order."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    mlp = config.intermediate_size
    return {
        "qkv_proj": {"q_proj": queries, "k_proj": keys, "v_proj": keys},
        "gate_up_proj": {"gate_proj": mlp, "up_proj": mlp},
    }
