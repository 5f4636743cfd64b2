"""Weights as the first format of converted folders has them, and how today's kernels are made of them."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from checkpoints_convert import store
from lychee_jax.config import ModelConfig

FORMAT = "lychee-checkpoint/1"
_FUSED = {"attention.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path → shape: every linear map has a kernel `[*in, *out]`, with heads and head_dim as two axes; sorted."""
    width, mlp, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = (config.num_heads, head_dim), (config.num_kv_heads, head_dim)
    found: dict[str, tuple[int, ...]] = {"embed.embedding": (config.vocab_size, width), "norm.scale": (width,)}
    if not config.tie_word_embeddings:
        found["lm_head.kernel"] = (width, config.vocab_size)
    for layer in range(config.num_layers):
        at = f"layers.{layer}"
        found |= {f"{at}.{norm}.scale": (width,) for norm in ("input_norm", "post_attention_norm")}
        if config.qk_norm:
            found |= {f"{at}.attention.{norm}.scale": (head_dim,) for norm in ("q_norm", "k_norm")}
        for name, into, out, bias in (
            ("attention.q_proj", (width,), queries, config.qkv_bias),
            ("attention.k_proj", (width,), keys, config.qkv_bias),
            ("attention.v_proj", (width,), keys, config.qkv_bias),
            ("attention.o_proj", queries, (width,), config.o_bias),
            ("mlp.gate_proj", (width,), (mlp,), config.mlp_bias),
            ("mlp.up_proj", (width,), (mlp,), config.mlp_bias),
            ("mlp.down_proj", (mlp,), (width,), config.mlp_bias),
        ):
            found[f"{at}.{name}.kernel"] = (*into, *out)
            if bias:
                found[f"{at}.{name}.bias"] = out
    return dict(sorted(found.items()))


def fused(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Today's weights by path: kernels `[out, in]`, those of q, k and v one, and those of gate and up."""
    rows = {}
    for path, array in weights.items():
        *modules, module, leaf = path.split(".")
        if leaf == "kernel":
            array = array.reshape(-1, array.shape[-1]) if module == "o_proj" else array.reshape(len(array), -1)
            array = array.T
        rows[path] = array.reshape(-1) if leaf == "bias" else array
    result = dict(rows)
    for path in rows:
        *modules, module, leaf = path.split(".")
        for name, parts in _FUSED.items():
            if module in parts:
                del result[path]
                at = ".".join(modules[:-1])
                names = (f"{at}.{name.split('.')[0]}.{part}.{leaf}" for part in parts)
                result[f"{at}.{name}.{leaf}"] = np.concatenate([rows[part] for part in names])
    return result


def write(folder: Path, raw: Mapping[str, object], weights: Mapping[str, np.ndarray]) -> None:
    """A converted folder of the first format."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "lychee.json").write_text(json.dumps({"format": FORMAT}))
    write_weights(folder, weights)


def write_weights(folder: Path, weights: Mapping[str, np.ndarray]) -> None:
    """The tensors of a converted folder, by path."""
    tensors = {path: store.Unread(array.shape, array.dtype, array.copy) for path, array in weights.items()}
    store.write(folder / store.WEIGHTS, tensors)
