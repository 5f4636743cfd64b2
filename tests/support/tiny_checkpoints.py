"""Writes tiny random Hugging Face checkpoints, with NumPy and safetensors alone."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from lychee_jax.data import language
from lychee_jax.loading import BUNDLED

NUMPY_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
STORED = {"fp8": ml_dtypes.float8_e4m3fn, "int8": np.int8}

TINY = {
    "llama": {
        "model_type": "llama",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "eos_token_id": None,
        "bos_token_id": None,
    },
    "qwen2": {
        "model_type": "qwen2",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
    "qwen3": {
        "model_type": "qwen3",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
    },
}
"""One small `config.json` for each family, to start from: `TINY["llama"] | {"num_hidden_layers": 3}`."""


def shapes(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that a Hugging Face checkpoint of this `config.json` holds."""
    family = raw["model_type"]
    width, mlp, vocab = raw["hidden_size"], raw["intermediate_size"], raw["vocab_size"]
    heads = raw["num_attention_heads"]
    kv_heads = raw.get("num_key_value_heads") or heads
    head_dim = raw.get("head_dim") or (128 if family == "qwen3" else width // heads)
    o_bias = family != "qwen2" and raw.get("attention_bias", False)
    qkv_bias = family == "qwen2" or o_bias
    mlp_bias = family == "llama" and raw.get("mlp_bias", False)

    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    if not raw.get("tie_word_embeddings", False):
        found["lm_head.weight"] = (vocab, width)
    for layer in range(raw["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        found[f"{prefix}.input_layernorm.weight"] = (width,)
        found[f"{prefix}.post_attention_layernorm.weight"] = (width,)
        for name, rows, columns, bias in (
            ("self_attn.q_proj", heads * head_dim, width, qkv_bias),
            ("self_attn.k_proj", kv_heads * head_dim, width, qkv_bias),
            ("self_attn.v_proj", kv_heads * head_dim, width, qkv_bias),
            ("self_attn.o_proj", width, heads * head_dim, o_bias),
            ("mlp.gate_proj", mlp, width, mlp_bias),
            ("mlp.up_proj", mlp, width, mlp_bias),
            ("mlp.down_proj", width, mlp, mlp_bias),
        ):
            found[f"{prefix}.{name}.weight"] = (rows, columns)
            if bias:
                found[f"{prefix}.{name}.bias"] = (rows,)
        if family == "qwen3":
            found[f"{prefix}.self_attn.q_norm.weight"] = (head_dim,)
            found[f"{prefix}.self_attn.k_norm.weight"] = (head_dim,)
    return found


def random_tensors(raw: dict[str, Any], *, seed: int = 0, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Weights large enough for attention to be peaked and for logits to differ: norms about 1, all else about 0.3."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes(raw).items():
        values = 0.3 * rng.standard_normal(shape)
        tensors[name] = (values + 1 if "norm" in name else values).astype(NUMPY_DTYPES[dtype])
    return tensors


def write_shards(folder: Path, tensors: dict[str, np.ndarray], *, shards: int = 1) -> None:
    """`model.safetensors`, or for more shards numbered files and their index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_checkpoint(
    folder: Path, raw: dict[str, Any], *, seed: int = 0, dtype: str = "float32", shards: int = 1
) -> dict[str, np.ndarray]:
    """Writes `config.json` and random weights into `folder` (made if missing); returns the tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"torch_dtype": dtype} | raw))
    tensors = random_tensors(raw, seed=seed, dtype=dtype)
    write_shards(folder, tensors, shards=shards)
    return tensors


def compressed_tensors(kind: str = "fp8", strategy: str = "channel", **weights: Any) -> dict[str, Any]:
    """The `quantization_config` that compressed-tensors writes; keywords change what it says of weights."""
    form = {"fp8": "float", "int8": "int"}[kind]
    about = {"num_bits": 8, "type": form, "symmetric": True, "dynamic": False, "group_size": None}
    about |= {"actorder": None, "block_structure": None, "observer": "minmax", "observer_kwargs": {}}
    activations = about | {"dynamic": True, "strategy": "token", "observer": None}
    group = {
        "targets": ["Linear"],
        "weights": about | {"strategy": strategy} | weights,
        "input_activations": activations,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": f"{form}-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
    }


def block_fp8(*block: int) -> dict[str, Any]:
    """The `quantization_config` of Qwen's own checkpoints in FP8."""
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": list(block),
        "modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm"],
    }


def quantised(
    tensors: dict[str, np.ndarray],
    kind: str,
    layout: str | tuple[int, int],
    *,
    suffix: str = "_scale",
    scale_dtype: str = "bfloat16",
    skip: tuple[str, ...] = ("lm_head", "embed_tokens"),
) -> dict[str, np.ndarray]:
    """The tensors with their matrices in 8 bits and scales beside them.

    Args:
        tensors: of a whole checkpoint.
        kind: fp8 or int8.
        layout: what shares a scale: "scalar" or "tensor" (a number without or with an axis), "channel", or blocks.
        suffix: of the scales' names.
        scale_dtype: of the scales.
        skip: matrices that have one of these in their name stay as they are.
    """
    result: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        if array.ndim != 2 or any(each in name for each in skip):
            result[name] = array
            continue
        wide = array.astype(np.float32)
        high, across = array.shape if isinstance(layout, str) else layout
        if layout == "channel":
            high = 1
        scale = np.empty((-(-array.shape[0] // high), -(-array.shape[1] // across)), NUMPY_DTYPES[scale_dtype])
        stored = np.empty(array.shape, STORED[kind])
        for row in range(scale.shape[0]):
            for column in range(scale.shape[1]):
                at = slice(row * high, (row + 1) * high), slice(column * across, (column + 1) * across)
                scale[row, column] = np.abs(wide[at]).max() / {"fp8": 440, "int8": 126}[kind]
                numbers = wide[at] / scale[row, column].astype(np.float32)
                stored[at] = (np.rint(numbers) if kind == "int8" else numbers).astype(STORED[kind])
        shape = {"scalar": (), "tensor": (1,)}.get(layout, scale.shape) if isinstance(layout, str) else scale.shape
        result |= {name: stored, f"{name}{suffix}": scale.reshape(shape)}
    return result


def plain_reading(tensors: dict[str, np.ndarray], block: tuple[int, int] | None = None) -> dict[str, np.ndarray]:
    """What such a checkpoint means, written out: every matrix times its scales, each repeated where it counts."""
    result = {}
    for name, array in tensors.items():
        scale = tensors.get(f"{name}_scale", tensors.get(f"{name}_scale_inv"))
        if scale is not None:
            wide = scale.astype(np.float32)
            if block is not None:
                wide = np.kron(wide, np.ones(block, np.float32))[: array.shape[0], : array.shape[1]]
            result[name] = array.astype(np.float32) * wide
        elif "_scale" not in name:
            result[name] = array
    return result


def write_quantised(
    folder: Path, raw: dict[str, Any], config: dict[str, Any], tensors: dict[str, np.ndarray], *, shards: int = 1
) -> None:
    """A checkpoint of these tensors, whose `config.json` has this `quantization_config`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"} | raw | {"quantization_config": config}))
    write_shards(folder, tensors, shards=shards)


def write_speaker(folder: Path, *, seed: int = 0) -> Path:
    """A folder with a tiny random model of 2,048 positions, and the bundled model's tokenizer."""
    raw = TINY["llama"] | {"vocab_size": language.VOCAB_SIZE, "max_position_embeddings": 2048}
    write_checkpoint(folder, raw, seed=seed)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((BUNDLED / name).read_bytes())
    return folder
