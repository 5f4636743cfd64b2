"""How Hugging Face names and divides each parameter of the decoder: the only place that knows its names."""

import dataclasses
from collections.abc import Callable, Collection

import jax.numpy as jnp

from lychee_jax.config import ModelConfig, Quantization
from lychee_jax.models.quantization import STORED
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

_WEIGHT_SCALES = ("weight_scale", "weight_scale_inv")  # both are what a stored number is multiplied by
_ACTIVATION_SCALES = ("input_scale", "input_zero_point", "act_scale", "output_scale")
_CACHE_SCALES = ("k_scale", "v_scale", "q_scale", "kv_scale")
_QUANTISED = ("qweight", "qzeros", "g_idx", "scales", "weight_packed", "absmax", *_WEIGHT_SCALES)


def is_quantised(name: str) -> bool:
    """Whether a tensor of a checkpoint belongs to quantised weights: their numbers, or what scales them."""
    return name.rpartition(".")[2] in _QUANTISED


def weight_of_scale(name: str) -> str | None:
    """The weight that a tensor of a checkpoint scales; None: the tensor is no such scale."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.weight" if leaf in _WEIGHT_SCALES else None


def is_cache_scale(name: str) -> bool:
    """Whether a tensor of a checkpoint is what keys or values of a quantised cache are divided by."""
    return name.rpartition(".")[2] in _CACHE_SCALES or name.endswith(("k_proj.output_scale", "v_proj.output_scale"))


def is_activation_scale(name: str) -> bool:
    """Whether a tensor of a checkpoint says how activations are quantised."""
    return name.rpartition(".")[2] in _ACTIVATION_SCALES


def is_derived(name: str) -> bool:
    """Whether a tensor of a checkpoint only repeats what its config says: old ones store the rotary frequencies."""
    return name.endswith("rotary_emb.inv_freq")


def renaming(found: Collection[str], *, tied: bool) -> Callable[[str], str]:
    """From the usual names to those of a checkpoint with the tensors `found`.

    One that was saved from the base model's class has no "model." in front (Qwen3-Embedding); of tied tensors either
    may be the one that is stored.
    """
    if EMBEDDING not in found and EMBEDDING.removeprefix("model.") in found:
        return lambda name: name.removeprefix("model.")
    if EMBEDDING not in found and LM_HEAD in found and tied:
        return lambda name: LM_HEAD if name == EMBEDDING else name
    return lambda name: name


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

    def renamed(self, rename: Callable[[str], str]) -> "Key":
        """The key with other names for the checkpoint's tensors."""
        parts = tuple(dataclasses.replace(part, name=rename(part.name)) for part in self.parts)
        return dataclasses.replace(self, parts=parts)


def keys(config: ModelConfig) -> tuple[Key, ...]:
    """Every parameter of the decoder that `config` describes, shapes from the module itself (no memory is taken).

    What has 8 bits there is a parameter like the others here: see `Target`.
    """
    config = dataclasses.replace(config, quantize=None, quantize_head=False)
    spec, weights = ModelSpec.abstract(config, jnp.float32)
    return tuple(
        Key(path, leaf.shape, _parts(path, leaf.shape, config)) for path, leaf in zip(spec.names, weights, strict=True)
    )


@dataclasses.dataclass(frozen=True)
class Target:
    """What our model stores of a parameter: an array in `dtype`, or a kernel of 8 bits with a scale for each channel.

    Attributes:
        key: the parameter, as a checkpoint has it.
        path: of the array or kernel; not the parameter's where a tied embedding also becomes a head of 8 bits.
        dtype: of the array.
        quantize: the kernel's; None: there is only an array.
    """

    key: Key
    path: str
    dtype: str
    quantize: Quantization | None = None

    @property
    def scale(self) -> str:
        """The path of the kernel's scales."""
        return f"{self.path.removesuffix('kernel')}scale"

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Path → shape and dtype of what is stored."""
        if self.quantize is None:
            return {self.path: (self.key.shape, self.dtype)}
        return {
            self.path: (self.key.shape, STORED[self.quantize].name),
            self.scale: (self.key.shape[:1], "float32"),
        }


def targets(keys: Collection[Key], config: ModelConfig) -> tuple[Target, ...]:
    """Everything that a model of `config` stores, from these parameters of its checkpoint."""
    spec, _ = ModelSpec.abstract(config, jnp.float32)
    names = set(spec.names)
    found = []
    for key in keys:
        small = Target(key, key.path, config.dtype, config.quantize)
        if key.path == "embed.embedding" and config.tie_word_embeddings and "lm_head.kernel" in names:
            # A tied table is read out as it is, unless the head has 8 bits.
            found += [Target(key, key.path, config.dtype), dataclasses.replace(small, path="lm_head.kernel")]
        elif config.quantize is not None and key.path.endswith(".kernel") and small.scale in names:
            found.append(small)
        else:
            found.append(Target(key, key.path, config.dtype))
    return tuple(found)


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
