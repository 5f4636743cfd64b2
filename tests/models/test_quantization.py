"""Weights of 8 bits: rounding channel by channel, and programs that never hold a kernel in another dtype."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from lychee_jax.benchmarks import tpu_compiler
from lychee_jax.benchmarks.tpu_compiler import CHIPS, Chip, compile_for
from lychee_jax.config import ModelConfig, Quantization
from lychee_jax.errors import UserError
from lychee_jax.models.layers import Linear, contract
from lychee_jax.models.quantization import STORED, check_quantization, quantize_kernel
from lychee_jax.models.spec import ModelSpec
from lychee_jax.parallel import axes

KINDS: tuple[Quantization, ...] = ("int8", "fp8")


@pytest.mark.parametrize("quantize", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_every_number_becomes_the_nearest_of_its_channel(quantize: Quantization, dtype: Any) -> None:
    rng = np.random.default_rng()
    kernel = (rng.standard_normal((37, 53)) * 10.0 ** rng.uniform(-4, 3, (37, 1))).astype(dtype)
    kernel[5] = 0
    stored, scale = quantize_kernel(kernel, quantize)
    wide = kernel.astype(np.float64)
    grid = np.arange(-127.0, 128.0)
    if quantize == "fp8":
        grid = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        grid = np.unique(grid[np.isfinite(grid)])
    channels = scale.astype(np.float64)[:, None]
    nearest = np.abs(grid[None, None] * channels[..., None] - wide[..., None]).min(axis=-1)
    error = np.abs(stored.astype(np.float64) * channels - wide)
    # Scaling is done in float32: what lies between two numbers may go to either.
    np.testing.assert_array_less(error, nearest + 1e-6 * np.abs(wide).max(axis=1, keepdims=True) + 1e-300)
    largest = np.abs(stored.astype(np.float64)).max(axis=1)
    assert set(largest) == {0.0, grid[-1]}, "every channel but that of zeros uses the whole range"
    assert scale[5] == 1
    assert scale.dtype == np.float32


@pytest.mark.parametrize("quantize", KINDS)
def test_extreme_channels(quantize: Quantization) -> None:
    kernel = np.zeros((3, 4), np.float32)
    kernel[0] = [3.4e38, -3.4e38, 1e38, 0]
    kernel[1] = [1e-45, 0, 0, 0]  # the scale would be 0
    stored, scale = quantize_kernel(kernel, quantize)
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    found = stored.astype(np.float64) * scale[:, None]
    np.testing.assert_allclose(found[0], kernel[0], rtol=0.05)
    np.testing.assert_array_equal(found[1:], 0)
    kernel[2, 3] = np.nan
    with pytest.raises(UserError, match="NaN or infinite"):
        quantize_kernel(kernel, quantize)


def test_other_formats_are_refused() -> None:
    check_quantization(None)
    with pytest.raises(UserError, match="quantize is 'int4'; use int8 or fp8, or none at all"):
        check_quantization("int4")


OUTPUTS, INPUTS = 1536, 256


def apply(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
    """A `Linear` with a kernel of 8 bits."""
    outputs, inputs = kernel.shape
    kind: Quantization = "int8" if kernel.dtype == jnp.int8 else "fp8"
    module = Linear(
        inputs, outputs, axes=(axes.MLP, axes.EMBED), bias=False, dtype=x.dtype, rngs=nnx.Rngs(0), quantize=kind
    )
    module.kernel, module.scale = nnx.Param(kernel), nnx.Param(scale)
    return module(x)


@jax.jit
def steps(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
    """A loop, as decoding is one: nothing is taken out of it either."""
    start = jnp.zeros((*x.shape[:-1], len(kernel)), x.dtype)
    return jax.lax.fori_loop(0, 3, lambda _, y: y + apply(x, kernel, scale), start)


def shapes(quantize: Quantization, outputs: int, inputs: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    return (
        jax.ShapeDtypeStruct((2, 3, inputs), jnp.bfloat16),
        jax.ShapeDtypeStruct((outputs, inputs), STORED[quantize]),
        jax.ShapeDtypeStruct((outputs,), jnp.float32),
    )


@pytest.mark.parametrize("quantize", KINDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_cpu_never_holds_the_kernel_in_another_dtype(quantize: Quantization, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    stored, scale = quantize_kernel(rng.standard_normal((OUTPUTS, INPUTS)).astype(np.float32), quantize)
    x = jnp.asarray(rng.standard_normal((2, 3, INPUTS)), dtype)
    compiled = steps.lower(x, jnp.asarray(stored), jnp.asarray(scale)).compile()
    memory: Any = compiled.memory_analysis()
    # A copy has two or four bytes for each number; one in 8 bits is allowed, e4m3 needs it.
    assert memory.temp_size_in_bytes < 1.5 * stored.size
    wanted = np.asarray(x, np.float64) @ (stored.astype(np.float64) * scale[:, None]).T
    found = np.asarray(compiled(x, jnp.asarray(stored), jnp.asarray(scale)), np.float64) / 3
    np.testing.assert_allclose(found, wanted, atol=8 * float(jnp.finfo(dtype).eps) * np.abs(wanted).max())


@pytest.mark.parametrize("quantize", KINDS)
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_get_a_conversion_and_a_product_that_xla_fuses(quantize: Quantization, platform: str) -> None:
    """Nothing but that has the kernel's shape, and both operands are contracted along their last axis."""
    code = jax.export.export(jax.jit(apply), platforms=[platform])(*shapes(quantize, OUTPUTS, INPUTS)).mlir_module()
    made = re.findall(r"= stablehlo\.(\w+).*tensor<1536x256x(\w+)>$", code.replace(" loc(", "\n"), re.MULTILINE)
    assert made == [("convert", "bf16")]
    (product,) = re.findall(r"stablehlo\.dot_general.*", code)
    assert "contracting_dims = [2] x [1]" in product
    assert "-> tensor<2x3x1536xf32>" in product


@pytest.mark.libtpu
@pytest.mark.skipif(not tpu_compiler.installed(), reason="libtpu, the TPU compiler, is not installed here")
@pytest.mark.parametrize("quantize", KINDS)
@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_a_tpu_never_holds_the_kernel_in_another_dtype(quantize: Quantization, chip: Chip) -> None:
    """A kernel so large that a copy of it has no place in a chip's VMEM, where it would not be seen."""
    outputs, inputs = 16384, 8192
    memory: Any = compile_for(chip, steps, *shapes(quantize, outputs, inputs)).memory_analysis()
    assert memory.temp_size_in_bytes < outputs * inputs


@pytest.mark.libtpu
@pytest.mark.skipif(not tpu_compiler.installed(), reason="libtpu, the TPU compiler, is not installed here")
@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_tpu_multiplies_a_single_row_with_its_matrix_unit(quantize: Quantization | None, chip: Chip) -> None:
    """What the compiler expects of it is near the time of the kernel's bytes, and no multiple of that."""
    outputs, inputs = 28672, 4096
    _, kernel, scale = shapes(quantize or "int8", outputs, inputs)
    x = jax.ShapeDtypeStruct((1, 1, inputs), jnp.bfloat16)
    if quantize is None:
        kernel = jax.ShapeDtypeStruct(kernel.shape, jnp.bfloat16)
        compiled = compile_for(chip, jax.jit(contract), x, kernel)
    else:
        compiled = compile_for(chip, jax.jit(apply), x, kernel, scale)
    cycles = sum(int(found) for found in re.findall(r'"estimated_cycles":"(\d+)"', compiled.as_text() or ""))
    reading = kernel.size * kernel.dtype.itemsize / (chip.bandwidth * chip.cores)
    assert 0 < cycles / (chip.clock_ghz * 1e9) < 2.5 * reading


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", [True, False])
def test_what_a_model_stores_in_8_bits(tied: bool, head: bool) -> None:
    config = ModelConfig(
        "qwen2", 61, 24, 40, 2, 4, 2, 8, 128, qkv_bias=True, tie_word_embeddings=tied, quantize="int8",
        quantize_head=head,
    )  # fmt: skip
    spec, weights = ModelSpec.abstract(config, jnp.bfloat16)
    dtypes = {name: leaf.dtype for name, leaf in zip(spec.names, weights, strict=True)}
    small = {name.removesuffix(".kernel") for name, dtype in dtypes.items() if dtype == jnp.int8}
    linear = {
        f"layers.{n}.{m}"
        for n in (0, 1)
        for m in ("attention.qkv_proj", "attention.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    }
    assert small == linear | ({"lm_head"} if head else set())
    assert all(dtypes[f"{name}.scale"] == jnp.float32 for name in small)
    for name in ("embed.embedding", "norm.scale", "layers.0.attention.qkv_proj.bias"):
        assert dtypes[name] == jnp.bfloat16
    assert ("lm_head.kernel" in dtypes) == (head or not tied)
    plain = ModelConfig("qwen2", 61, 24, 40, 2, 4, 2, 8, 128, qkv_bias=True, tie_word_embeddings=tied)
    assert config.fingerprint() == plain.fingerprint(), "head maps fit both"
