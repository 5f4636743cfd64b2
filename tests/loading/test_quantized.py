"""Models loaded with kernels of 8 bits: what is stored, what they compute, and that the engine takes them."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_convert import convert
from lychee_jax.config import Quantization
from lychee_jax.errors import UserError
from lychee_jax.llm import LLM
from lychee_jax.loading import load
from lychee_jax.models.quantization import quantize_kernel
from lychee_jax.models.rope import rotary_tables
from lychee_jax.models.spec import ModelSpec
from tests.support import tiny_checkpoints

CASES = {
    "llama-tied": tiny_checkpoints.TINY["llama"] | {"tie_word_embeddings": True},
    "qwen2": tiny_checkpoints.TINY["qwen2"],
    "qwen3": tiny_checkpoints.TINY["qwen3"],
}


def arrays(model: LLM) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in zip(model.spec.names, model.weights, strict=True)}


def logits(model: LLM, tokens: np.ndarray) -> np.ndarray:
    config = model.config
    at = np.arange(tokens.shape[1])[None]
    needed = np.array([tokens.shape[1]])
    tables = rotary_tables(config.rope, config.head_dim, config.max_position_embeddings, at, needed)
    with jax.default_matmul_precision("highest"):
        return np.asarray(model.model.logits(model.model.hidden(jnp.asarray(tokens), *map(jnp.asarray, tables))))


def widened(model: LLM) -> LLM:
    """The model with the numbers that its 8-bit kernels stand for, in float32."""
    stored = arrays(model)
    config = dataclasses.replace(model.config, quantize=None, quantize_head=False, tie_word_embeddings=False)
    spec, _ = ModelSpec.abstract(config, "float32")
    weights = dict(stored)
    for name, kernel in stored.items():
        if name.endswith(".kernel") and (scale := stored.get(f"{name[:-6]}scale")) is not None:
            weights[name] = kernel.astype(np.float32) * scale[:, None]
    weights.setdefault("lm_head.kernel", weights["embed.embedding"])
    module = spec.merge(tuple(jnp.asarray(weights[name], jnp.float32) for name in spec.names))
    return LLM(model.path, config, module, None, ())


@pytest.fixture(scope="module", params=CASES)
def folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / request.param
    tiny_checkpoints.write_checkpoint(folder, CASES[request.param])
    return folder


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
@pytest.mark.parametrize("head", [False, True])
def test_kernels_are_rounded_once_from_the_checkpoint(folder: Path, quantize: Quantization, head: bool) -> None:
    """Not by way of the dtype of the activations."""
    whole, small = load(folder), load(folder, "bfloat16", quantize=quantize, quantize_head=head)
    assert (small.config.quantize, small.config.quantize_head, small.dtype) == (quantize, head, jnp.bfloat16)
    before, after = arrays(whole), arrays(small)
    if head and whole.config.tie_word_embeddings:
        before["lm_head.kernel"] = before["embed.embedding"]
    quantised = {
        name for name in before
        if name.endswith(".kernel") and (head or not name.startswith("lm_head")) and not name.startswith("embed")
    }  # fmt: skip
    assert len(quantised) >= 4 * whole.config.num_layers
    for name, array in before.items():
        if name in quantised:
            kernel, scale = quantize_kernel(array, quantize)
            np.testing.assert_array_equal(after.pop(name).view(np.uint8), kernel.view(np.uint8))
            np.testing.assert_array_equal(after.pop(f"{name[:-6]}scale"), scale)
        else:
            np.testing.assert_array_equal(after.pop(name), array.astype(jnp.bfloat16))
    assert not after


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_logits_are_those_of_the_numbers_that_are_stored(folder: Path, quantize: Quantization) -> None:
    small = load(folder, quantize=quantize, quantize_head=True)
    tokens = np.random.default_rng().integers(0, small.config.vocab_size, (2, 19))
    wanted = logits(widened(small), tokens)
    np.testing.assert_allclose(logits(small, tokens), wanted, atol=2e-4 * np.abs(wanted).max())


def test_a_converted_folder_gives_the_same_kernels_and_the_engine_takes_them(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "converted")
    one, other = (load(path, quantize="int8") for path in (folder, tmp_path / "converted"))
    for name, array in arrays(one).items():
        np.testing.assert_array_equal(array, arrays(other)[name])
    options: dict[str, Any] = {"page_size": 16, "budget": 48, "sink": 16, "recent": 16, "max_new_tokens": 6}
    prompt = np.random.default_rng(0).integers(3, one.config.vocab_size, 90).tolist()
    found = one.generate([prompt], attention="hybrid", ignore_eos=True, **options)
    wanted = widened(one).generate([prompt], attention="hybrid", ignore_eos=True, **options)
    assert found.tokens == wanted.tokens
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=2e-3)
    assert one.weights_digest() == other.weights_digest() != widened(one).weights_digest()


def test_what_cannot_be_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="use int8 or fp8"):
        load(folder, quantize="int4")
    with pytest.raises(UserError, match="quantize is none"):
        load(folder, quantize_head=True)
