"""The golden files of `tests/golden`, and their models with weights placed by hand."""

import dataclasses
import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from lychee_jax.config import ModelConfig
from lychee_jax.models.decoder import Decoder
from lychee_jax.models.spec import ModelSpec

GOLDEN = Path(__file__).parents[1] / "golden"


CASES = sorted(folder.parent.name for folder in GOLDEN.glob("*/golden.npz"))


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One golden prompt: [T] ids, [T, V] logits, [n] greedy ids and the [n, V] logits that they were chosen from."""

    prompt: np.ndarray
    logits: np.ndarray
    tokens: np.ndarray
    token_logits: np.ndarray


def golden_prompts(case: str) -> list[Prompt]:
    arrays = np.load(GOLDEN / case / "golden.npz")
    count = sum(name.startswith("prompt_") for name in arrays)
    return [
        Prompt(*(arrays[f"{name}_{index}"] for name in ("prompt", "logits", "tokens", "token_logits")))
        for index in range(count)
    ]


@functools.cache
def golden_model(case: str) -> Decoder:
    """The case's model in float32, its weights placed by hand: no code is shared with the conversion under test."""
    config = ModelConfig.from_folder(GOLDEN / case)
    tensors = load_file(GOLDEN / case / "model.safetensors")
    fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    spec, shapes = ModelSpec.abstract(config, jnp.float32)
    weights = []
    for path, leaf in zip(spec.names, shapes, strict=True):
        *modules, kind = path.split(".")
        parts = []
        for module in fused.get(modules[-1], modules[-1:]):
            name = ".".join(["model", *modules[:-1], module]) if modules != ["lm_head"] else "lm_head"
            for ours, theirs in (
                ("attention.", "self_attn."),
                ("input_norm", "input_layernorm"),
                ("post_attention_norm", "post_attention_layernorm"),
                ("model.embed", "model.embed_tokens"),
            ):
                name = name.replace(ours, theirs)
            parts.append(tensors.pop(f"{name}.{'bias' if kind == 'bias' else 'weight'}"))
        weights.append(jnp.asarray(np.concatenate(parts)))
        assert weights[-1].shape == leaf.shape, path
    assert not tensors
    return spec.merge(tuple(weights))
