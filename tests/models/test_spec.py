"""ModelSpec: a structure without weights from which programs are compiled that the weights then run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lychee_jax.config import ModelConfig
from lychee_jax.loading import load
from lychee_jax.models.decoder import Decoder
from lychee_jax.models.rope import rotary_tables
from lychee_jax.models.spec import Functional, ModelSpec
from tests.support import tiny_checkpoints

BIASED = ModelConfig("llama", 61, 24, 40, 2, 4, 2, 8, 128, qkv_bias=True, o_bias=True, mlp_bias=True)
TIED = ModelConfig("qwen3", 61, 24, 40, 2, 4, 2, 8, 128, qk_norm=True, tie_word_embeddings=True)


@pytest.mark.parametrize("config", [BIASED, TIED], ids=["llama", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_abstract_is_what_split_gives(config: ModelConfig, dtype: str) -> None:
    spec, shapes = ModelSpec.abstract(config, dtype)
    made, weights = ModelSpec.split(Decoder(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))
    assert (spec, hash(spec)) == (made, hash(made))
    assert (spec.names, spec.graphdef, spec.treedef) == (made.names, made.graphdef, made.treedef)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in shapes)
    assert [(leaf.shape, leaf.dtype) for leaf in shapes] == [(leaf.shape, leaf.dtype) for leaf in weights]
    heads = (4 + 2 * 2) * 8
    named = dict(zip(spec.names, (leaf.shape for leaf in shapes), strict=True))
    assert named["layers.1.attention.qkv_proj.kernel"] == (heads, 24)
    assert named["layers.1.attention.o_proj.kernel"] == (24, 4 * 8)
    assert named["layers.1.mlp.gate_up_proj.kernel"] == (2 * 40, 24)
    assert named["layers.1.mlp.down_proj.kernel"] == (24, 40)
    assert named.get("lm_head.kernel") == (None if config.tie_word_embeddings else (61, 24))
    assert named.get("layers.1.attention.qkv_proj.bias") == ((heads,) if config.qkv_bias else None)


def test_a_program_compiled_without_weights_runs_a_loaded_model(tmp_path) -> None:
    tiny_checkpoints.write_checkpoint(tmp_path / "hf", tiny_checkpoints.TINY["qwen2"])
    loaded = load(tmp_path / "hf")
    config = loaded.config
    traced = 0

    @functools.partial(jax.jit, static_argnums=0)
    def logits(spec, weights, tokens, cos, sin):
        nonlocal traced
        traced += 1
        model = spec.merge(weights)
        return model.logits(model.hidden(tokens, cos, sin))

    positions = np.arange(5)[None]
    angles = rotary_tables(config.rope, config.head_dim, config.max_position_embeddings, positions, positions + 1)
    inputs = (jnp.arange(5, dtype=jnp.int32)[None], *map(jnp.asarray, angles))
    spec, shapes = ModelSpec.abstract(config, config.dtype)
    compiled = logits.lower(spec, shapes, *inputs).compile()
    made, weights = ModelSpec.split(loaded.model)
    np.testing.assert_array_equal(compiled(weights, *inputs), logits(made, weights, *inputs))
    assert traced == 1


@pytest.mark.parametrize("config", [BIASED, TIED], ids=["llama", "qwen3"])
def test_trained_parameters_are_the_models_weights(config: ModelConfig) -> None:
    """By the same names, each kernel of variance 1 / inputs, those that write to the residual stream smaller."""
    family = Functional(config)
    params = family.initial(3, 0.5)
    spec, weights = ModelSpec.split(family.bind(params, jnp.bfloat16))
    assert tuple(params) == spec.names == ModelSpec.abstract(config, jnp.bfloat16)[0].names
    for name, leaf in zip(spec.names, weights, strict=True):
        assert (leaf.shape, leaf.dtype) == (params[name].shape, jnp.bfloat16)
        if name.endswith("kernel") or name.startswith("embed"):
            residual = name.endswith(("o_proj.kernel", "down_proj.kernel"))
            wanted = (0.5 if residual else 1.0) * leaf.shape[-1] ** -0.5
            assert np.std(params[name]) == pytest.approx(wanted, rel=0.1)
            assert (residual, leaf.shape[-1]) in {(False, 24), (True, 32), (True, 40)}
