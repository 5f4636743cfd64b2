"""Weights of ours as a Hugging Face checkpoint: the reverse, for models that are trained here."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors.numpy import save_file

from checkpoints_convert.keys import keys
from checkpoints_convert.source import SINGLE
from checkpoints_convert.weights import NUMPY_DTYPES
from lychee_jax.config import ModelConfig
from lychee_jax.errors import UserError
from lychee_jax.files import json_text, write_text

_ARCHITECTURES = {"llama": "LlamaForCausalLM"}


def export_hugging_face(folder: Path, config: ModelConfig, params: Mapping[str, Float[np.ndarray, "..."]]) -> None:
    """Write `model.safetensors`, `config.json` and `generation_config.json` into a folder.

    Args:
        folder: made if it is missing; files of these names are replaced.
        config: of the Llama family, with the default rope and no biases; its dtype is the one that is written.
        params: dotted path → array, every parameter of the decoder.

    Raises:
        UserError: a config that is not written here.
    """
    if config.family != "llama" or config.rope.kind != "default" or config.qkv_bias or config.o_bias or config.mlp_bias:
        raise UserError("only Llama models with the default rope and without biases are exported")
    folder.mkdir(parents=True, exist_ok=True)
    dtype = NUMPY_DTYPES[config.dtype]
    tensors = {
        part.name: np.ascontiguousarray(params[key.path][part.rows]).astype(dtype)
        for key in keys(config)
        for part in key.parts
    }
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_ids[0]}
    raw = {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope.theta},
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_word_embeddings,
        "dtype": config.dtype,
        **ids,
    }
    write_text(folder / "config.json", json_text(raw, indent=2) + "\n")
    write_text(folder / "generation_config.json", json_text(ids, indent=2) + "\n")
