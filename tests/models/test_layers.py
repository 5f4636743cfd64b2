"""Linear: the product, its scale and bias, what it accumulates in, and how 8-bit kernels are read."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lychee_jax.benchmarks import tpu_compiler
from lychee_jax.benchmarks.tpu_compiler import CHIPS, compile_for
from lychee_jax.config import ModelConfig
from lychee_jax.models.decoder import Decoder
from lychee_jax.models.layers import Embedding, Linear
from lychee_jax.models.spec import ModelSpec
from lychee_jax.parallel import axes

IN, OUT = 48, 80


def linear(
    dtype: Any = jnp.float32, *, bias: bool = False, scaled: bool = False, seed: int = 0
) -> tuple[Linear, dict[str, np.ndarray]]:
    """A Linear of random numbers, int8 ones if it is scaled, and its numbers in float64."""
    rng = np.random.default_rng(seed)
    module = Linear(IN, OUT, axes=(axes.MLP, axes.EMBED), bias=bias, dtype=dtype, rngs=nnx.Rngs(0))
    if scaled:
        module.kernel = nnx.Param(jnp.asarray(rng.integers(-127, 128, (OUT, IN)), jnp.int8))
        module.scale = nnx.Param(jnp.asarray(rng.uniform(0.5, 2.0, OUT) / 127, jnp.float32))
    else:
        module.kernel = nnx.Param(jnp.asarray(rng.standard_normal((OUT, IN)), dtype))
    if bias:
        module.bias = nnx.Param(jnp.asarray(rng.standard_normal(OUT), dtype))
    found = {name: getattr(module, name) for name in ("kernel", "scale", "bias")}
    return module, {name: np.asarray(leaf[...], np.float64) for name, leaf in found.items() if leaf is not None}


def product(x: jax.Array, numbers: dict[str, np.ndarray]) -> np.ndarray:
    y = np.asarray(x, np.float64) @ numbers["kernel"].T
    return y * numbers.get("scale", 1.0) + numbers.get("bias", 0.0)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_it_is_the_product_by_output_channels(lead: tuple[int, ...], bias: bool, scaled: bool) -> None:
    module, numbers = linear(bias=bias, scaled=scaled)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((*lead, IN)), jnp.float32)
    with jax.default_matmul_precision("highest"):
        y = module(x)
    assert (y.shape, y.dtype) == ((*lead, OUT), jnp.float32)
    np.testing.assert_allclose(y, product(x, numbers), rtol=0, atol=5e-5)
    assert module.kernel[...].shape == (OUT, IN)


@pytest.mark.parametrize("weights", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_activations_keep_their_dtype_whatever_that_of_the_weights(dtype: Any, weights: Any) -> None:
    scaled = weights == jnp.int8
    module, numbers = linear(jnp.float32 if scaled else weights, bias=not scaled, scaled=scaled)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, IN)), dtype)
    y = module(x)
    assert y.dtype == dtype
    np.testing.assert_allclose(np.asarray(y, np.float64), product(x, numbers), atol=60 * float(jnp.finfo(dtype).eps))


def test_logits_are_accumulated_in_float32() -> None:
    """The embedding's read-out, too: operands in bfloat16, each product exact, nothing rounded before the end."""
    module, numbers = linear(jnp.bfloat16)
    table = Embedding(OUT, IN, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    table.embedding = nnx.Param(module.kernel[...])
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, IN)), jnp.bfloat16)
    for y in (module(x, jnp.float32), table.attend(x)):
        assert y.dtype == jnp.float32
        np.testing.assert_allclose(y, product(x, numbers), rtol=0, atol=2e-5)
    assert np.abs(np.asarray(module(x), np.float64) - product(x, numbers)).max() > 1e-3, "bfloat16 does round"


def test_a_scaled_sum_may_be_larger_than_the_dtype_of_the_result_holds() -> None:
    module, _ = linear(scaled=True)
    module.kernel = nnx.Param(jnp.full((OUT, IN), 127, jnp.int8))
    module.scale = nnx.Param(jnp.full((OUT,), 1e-3, jnp.float32))
    x = jnp.full((2, IN), 20.0, jnp.float16)
    np.testing.assert_allclose(np.asarray(module(x), np.float64), 20 * 127 * IN * 1e-3, rtol=1e-3)


def test_every_multiplication_by_weights_is_a_linear_whose_axes_have_names() -> None:
    config = ModelConfig("llama", 61, 24, 40, 2, 4, 2, 8, 128, qkv_bias=True, o_bias=True, mlp_bias=True)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    sizes = {
        axes.EMBED: 24, axes.HEADS: 4 * 8, axes.QKV: (4 + 2 * 2) * 8, axes.MLP: 40, axes.GATE_UP: 2 * 40,
        axes.VOCAB: 61,
    }  # fmt: skip
    layers = [module for _, module in nnx.iter_modules(model) if isinstance(module, Linear)]
    assert len(layers) == 4 * config.num_layers + 1
    for module in layers:
        for size, axis in zip(module.kernel.shape, module.axes, strict=True):
            assert size == sizes[axis]
    names = ModelSpec.abstract(config, jnp.float32)[0].names
    assert sum(name.endswith(".kernel") for name in names) == len(layers)
    assert model.embed.axes == (axes.VOCAB, axes.EMBED)


@pytest.mark.libtpu
@pytest.mark.skipif(not tpu_compiler.installed(), reason="libtpu, the TPU compiler, is not installed here")
@pytest.mark.parametrize("rows", [1, 64])
def test_a_tpu_reads_an_8_bit_kernel_as_it_lies(rows: int) -> None:
    """No copy of it in the dtype of the activations, and none in another order."""

    def run(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
        module = Linear(IN, OUT, axes=(axes.MLP, axes.EMBED), bias=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        module.kernel, module.scale = nnx.Param(kernel), nnx.Param(scale)
        return module(x)

    shapes = (((rows, 2048), jnp.bfloat16), ((4096, 2048), jnp.int8), ((4096,), jnp.float32))
    compiled = compile_for(CHIPS["v5e"], jax.jit(run), *(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    assert "s8[4096,2048]" in text
    assert "bf16[4096,2048]" not in text
    assert memory.temp_size_in_bytes == 0
