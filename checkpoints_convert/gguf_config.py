"""The `config.json` that says what the metadata of a GGUF file says."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from checkpoints_convert.gguf_file import GGUFTensor, Metadata
from checkpoints_convert.gguf_tokenizer import special_ids
from lychee_jax.errors import UserError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""GGUF's names, which are Hugging Face's model types too, and Hugging Face's model classes."""

FREQUENCY_FACTORS = "rope_freqs.weight"
"""A tensor that no layer has: what the rotary frequencies are divided by. It becomes a part of the config."""

# Where one of these is neither missing nor zero, the file means another arithmetic.
_UNSUPPORTED = (
    "expert_count",
    "attention.sliding_window",
    "attention.scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "logit_scale",
    "embedding_scale",
    "residual_scale",
    "rope.scaling.alpha",
    "rope.scaling.yarn_log_multiplier",
)


def hugging_face_config(metadata: Metadata, tensors: Mapping[str, GGUFTensor]) -> dict[str, Any]:
    """What Hugging Face's config of the same model says.

    Args:
        metadata: the file's.
        tensors: its tensors by GGUF's names, of which shapes, presence and types count.

    Raises:
        UserError: an architecture, a kind of file or an arithmetic that is not supported, by its name.
    """
    arch = metadata.text("general.architecture")
    kind = metadata.text("general.type", "model")
    if kind != "model":
        raise UserError(f"{metadata.path} holds no model but a GGUF {kind}")
    if arch not in ARCHITECTURES:
        raise UserError(
            f"{metadata.path}: architecture {arch!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    for key in _UNSUPPORTED:
        if metadata.values.get(f"{arch}.{key}"):
            raise UserError(f"{metadata.path}: {arch}.{key} = {metadata.values[f'{arch}.{key}']} is not supported")
    if not metadata.flag(f"{arch}.attention.causal", True):
        raise UserError(f"{metadata.path}: {arch}.attention.causal = False is not supported")

    heads = _one(metadata, f"{arch}.attention.head_count")
    width = metadata.integer(f"{arch}.embedding_length")
    head_dim = metadata.integer(f"{arch}.attention.key_length", width // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.integer(f"{arch}.{key}", head_dim) != head_dim:
            raise UserError(
                f"{metadata.path}: {arch}.{key} = {metadata.values[f'{arch}.{key}']} is not supported; it must be the "
                f"size of a head ({head_dim})"
            )
    embedding = tensors.get("token_embd.weight")
    context = metadata.integer(f"{arch}.context_length")
    bos, eos = special_ids(metadata)
    return {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": arch,
        "vocab_size": embedding.shape[0] if embedding else metadata.integer(f"{arch}.vocab_size"),
        "hidden_size": width,
        "intermediate_size": _one(metadata, f"{arch}.feed_forward_length"),
        "num_hidden_layers": metadata.integer(f"{arch}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _one(metadata, f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rope_parameters": _rope(metadata, arch, context, tensors.get(FREQUENCY_FACTORS)),
        "rms_norm_eps": metadata.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "attention_bias": arch == "qwen2" or "blk.0.attn_output.bias" in tensors,
        **({"mlp_bias": "blk.0.ffn_gate.bias" in tensors} if arch == "llama" else {}),
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": _dtype(tensors),
        "bos_token_id": bos,
        "eos_token_id": list(eos),
    }


def _dtype(tensors: Mapping[str, GGUFTensor]) -> str:
    """bfloat16 if anything is quantised; else the dtype of the matrices, float32 where they differ."""
    matrices = [tensor for tensor in tensors.values() if len(tensor.shape) > 1]
    if any(tensor.quantised for tensor in matrices):
        return "bfloat16"
    dtypes = {str(tensor.loaded_dtype) for tensor in matrices}
    return dtypes.pop() if len(dtypes) == 1 and None not in dtypes else "float32"


def _one(metadata: Metadata, key: str, default: int | None = None) -> int:
    """A number of every layer; files may list it for each."""
    value = metadata.values.get(key)
    if not isinstance(value, list):
        return metadata.integer(key, default)
    if len(set(value)) != 1:
        raise UserError(f"{metadata.path}: {key} is not the same in all layers, which is not supported")
    return int(value[0])


def _rope(metadata: Metadata, arch: str, context: int, factors: GGUFTensor | None) -> dict[str, Any]:
    """`rope_parameters` as transformers 5 writes them."""

    def number(key: str, default: float | None = None) -> float:
        return metadata.number(f"{arch}.rope.scaling.{key}", default)

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": metadata.number(f"{arch}.rope.freq_base", 10000.0)}
    # A factor without a type is a linear one, and once had a key of its own.
    factor = number("factor", 0.0) or metadata.number(f"{arch}.rope.scale_linear", 0.0) or 1.0
    kind = metadata.text(f"{arch}.rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise UserError(f"{metadata.path}: rope scaling {kind!r} is not supported; supported are none, linear and yarn")
    attention = number("attn_factor", 1.0) * number("yarn_attn_factor", 1.0)
    if kind == "linear" and factor != 1:
        rope |= {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = metadata.integer(f"{arch}.rope.scaling.original_context_length", context)
        rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        rope |= {"beta_fast": number("yarn_beta_fast", 32.0), "beta_slow": number("yarn_beta_slow", 1.0)}
        if attention != 1:
            rope["attention_factor"] = attention * (0.1 * float(np.log(max(factor, 1.0))) + 1.0)
    elif attention != 1:
        raise UserError(f"{metadata.path}: {arch}.rope.scaling.attn_factor is supported with yarn only")
    if kind == "yarn" and number("yarn_ext_factor", 1.0) not in (1.0, -1.0):  # −1: not set
        raise UserError(f"{metadata.path}: {arch}.rope.scaling.yarn_ext_factor must be 1 to be supported")
    if factors is None:
        return rope
    values = [float(value) for value in factors.rows(0, factors.shape[0])]
    if all(value == 1 for value in values):
        return rope
    if rope["rope_type"] != "default":
        raise UserError(f"{metadata.path}: {FREQUENCY_FACTORS} together with {kind} rope scaling is not supported")
    # Two equal lists: Hugging Face's way to say that every frequency has a factor of its own.
    return rope | {
        "rope_type": "longrope",
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": context,
        "short_factor": values,
        "long_factor": values,
    }
