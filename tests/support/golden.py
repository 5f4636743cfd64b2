"""The golden files of `tests/golden`, and their models with weights placed by hand."""

import dataclasses
import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from lychee_jax.config import ModelConfig
from lychee_jax.models.decoder import Decoder

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
    weights = load_file(GOLDEN / case / "model.safetensors")
    heads = {
        "q_proj": config.num_heads,
        "k_proj": config.num_kv_heads,
        "v_proj": config.num_kv_heads,
    }
    model = nnx.eval_shape(lambda: Decoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    state = nnx.state(model)
    for path, leaf in nnx.to_flat_state(state):
        *modules, kind = (str(part) for part in path)
        name = ".".join(["model", *modules]) if modules != ["lm_head"] else "lm_head"
        for ours, theirs in (
            ("attention.", "self_attn."),
            ("input_norm", "input_layernorm"),
            ("post_attention_norm", "post_attention_layernorm"),
            ("model.embed", "model.embed_tokens"),
        ):
            name = name.replace(ours, theirs)
        value = weights.pop(f"{name}.{'bias' if kind == 'bias' else 'weight'}")
        if kind == "kernel":
            value = value.T
        if modules[-1] in heads:
            value = value.reshape(*value.shape[:-1], heads[modules[-1]], config.head_dim)
        if modules[-1] == "o_proj" and kind == "kernel":
            value = value.reshape(config.num_heads, config.head_dim, -1)
        assert value.shape == leaf.shape, name
        leaf.set_value(jnp.asarray(value))
    assert not weights
    nnx.update(model, state)
    return model
