"""The layers that every Llama-like decoder shares: Linear, RMSNorm, gated MLP, embedding."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Shaped

from lychee_jax.config import Quantization
from lychee_jax.models.quantization import STORED
from lychee_jax.parallel import axes
from lychee_jax.parallel.layouts import Layout, first_token_here, sum_over_devices

# What a fresh model is drawn from; checkpoints overwrite it.
_INIT_STD = 0.02
# Output channels that a CPU converts from 8 bits at a time.
_TILE = 128


class Linear(nnx.Module):
    """`y = x · kernelᵀ · scale + bias`: beside the embedding's read-out the only multiplication by weights.

    The kernel is stored output-major, so that the contracted axis lies last in both operands: only then does XLA fuse
    the conversion of 8-bit weights into the product.

    Attributes:
        axes: the logical axes of the kernel, of `parallel.axes`.
        kernel: `[out, in]`.
        scale: a float32 number per output channel `[out]`, for kernels that are stored scaled; None: all are 1.
        bias: `[out]`, or None.
        summed: whether every device of a layout has some of the inputs, so that results are added up.

    A fresh kernel of 8 bits (`quantize`) is all zeros: such weights are made from others (`models.quantization`).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        axes: tuple[str, str],
        bias: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        quantize: Quantization | None = None,
        layout: Layout | None = None,
    ):
        self.axes = axes
        self.summed = layout is not None and layout.divides(axes[1])
        self.scale: nnx.Param | None = nnx.data(None)
        if quantize is None:
            self.kernel = nnx.Param(_INIT_STD * jax.random.normal(rngs.params(), (outputs, inputs), dtype))
        else:
            self.kernel = nnx.Param(jnp.zeros((outputs, inputs), STORED[quantize]))
            self.scale = nnx.Param(jnp.ones((outputs,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((outputs,), dtype)) if bias else None

    def __call__(
        self, x: Float[Array, "*lead inputs"], dtype: DTypeLike | None = None
    ) -> Float[Array, "*lead outputs"]:
        """Map the last axis of `x`; the result has the dtype of `x`, or `dtype`, in which sums are then accumulated."""
        result = x.dtype if dtype is None else jnp.dtype(dtype)
        if self.scale is None:
            out = contract(x, self.kernel[...], dtype)
        else:
            # Not rounded before it is scaled: float16 could not hold what 8-bit numbers add up to.
            out = jax.lax.platform_dependent(x, self.kernel[...], cpu=_contract_tiles, default=_contract_float32)
            out = (out * _channels(self.scale[...], out.ndim)).astype(result)
        if self.summed:
            out = sum_over_devices(out)
        return out if self.bias is None else out + _channels(self.bias[...].astype(result), out.ndim)


def contract(
    x: Float[Array, "*lead inputs"], kernel: Shaped[Array, "outputs inputs"], dtype: DTypeLike | None = None
) -> Float[Array, "*lead outputs"]:
    """`x · kernelᵀ` from operands in the dtype of `x`, accumulated in `dtype` (no float32 copy of a large kernel)."""
    product = functools.partial(_product, dtype=dtype)
    if math.prod(x.shape[:-1]) != 1:
        return product(x, kernel)
    return jax.lax.platform_dependent(x, kernel, tpu=functools.partial(_two_rows, product), default=product)


def _product(x: jax.Array, kernel: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    return jax.lax.dot_general(
        x, kernel.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype
    )


def _two_rows(product: Callable[..., jax.Array], x: jax.Array, kernel: jax.Array) -> jax.Array:
    """For TPUs, where XLA multiplies a single row without the matrix unit: four to seven times as long as it reads."""
    rows = jnp.pad(x.reshape(1, -1), ((0, 1), (0, 0)))
    return product(rows, kernel)[:1].reshape(*x.shape[:-1], -1)


def _contract_float32(
    x: Float[Array, "*lead inputs"], kernel: Shaped[Array, "outputs inputs"]
) -> Float32[Array, "*lead outputs"]:
    return contract(x, kernel, jnp.float32)


def _contract_tiles(
    x: Float[Array, "*lead inputs"], kernel: Shaped[Array, "outputs inputs"]
) -> Float32[Array, "*lead outputs"]:
    """For CPUs, where XLA would write the whole kernel out in the dtype of `x` before it multiplies."""
    (outputs, inputs), stored = kernel.shape, kernel.dtype
    tile = math.gcd(outputs, _TILE)
    if stored != jnp.int8:  # as bytes: XLA would take tiles of e4m3 out of a copy in float16
        kernel = jax.lax.bitcast_convert_type(kernel, jnp.int8)
    tiles = kernel.reshape(outputs // tile, tile, inputs)

    def one(rows: Shaped[Array, "tile inputs"]) -> Float32[Array, "*lead tile"]:
        return contract(x, jax.lax.bitcast_convert_type(rows, stored), jnp.float32)

    out = jax.lax.map(one, tiles)  # [tiles, *lead, tile]
    return jnp.moveaxis(out, 0, -2).reshape(*x.shape[:-1], outputs)


def _channels(vector: Float[Array, " outputs"], ndim: int) -> Float[Array, "..."]:
    return vector.reshape((1,) * (ndim - 1) + vector.shape)


class RMSNorm(nnx.Module):
    """x / rms(x) · scale over the last axis, in float32 whatever the dtype of `x`."""

    def __init__(self, size: int, *, eps: float, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((size,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*lead size"]) -> Float[Array, "*lead size"]:
        """Normalise the last axis."""
        wide = x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        # Hugging Face rounds to the model's dtype before it scales: bfloat16 results follow it to the bit this way.
        return scale.astype(x.dtype) * normal.astype(x.dtype)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)); rows of `gate_up_proj`: gate, then up."""

    def __init__(
        self,
        embed: int,
        inner: int,
        *,
        bias: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        quantize: Quantization | None = None,
        layout: Layout | None = None,
    ):
        linear = functools.partial(Linear, bias=bias, dtype=dtype, rngs=rngs, quantize=quantize, layout=layout)
        self.gate_up_proj = linear(embed, 2 * inner, axes=(axes.GATE_UP, axes.EMBED))
        self.down_proj = linear(inner, embed, axes=(axes.EMBED, axes.MLP))

    def __call__(self, x: Float[Array, "*lead E"]) -> Float[Array, "*lead E"]:
        """Apply the block at every position."""
        gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(jax.nn.silu(gate) * up)


class Embedding(nnx.Module):
    """Token vectors; with tied embeddings the same table also reads logits out."""

    def __init__(self, vocab: int, embed: int, *, dtype: DTypeLike, rngs: nnx.Rngs, layout: Layout | None = None):
        self.axes = (axes.VOCAB, axes.EMBED)
        self.divided = layout is not None
        self.embedding = nnx.Param(_INIT_STD * jax.random.normal(rngs.params(), (vocab, embed), dtype))

    def __call__(self, tokens: Int[Array, "*lead"]) -> Float[Array, "*lead E"]:
        """Look tokens up."""
        table = self.embedding[...]
        if not self.divided:
            return table[tokens]
        here = tokens - first_token_here(len(table))
        own = (here >= 0) & (here < len(table))
        found = table[jnp.where(own, here, 0)]
        return sum_over_devices(jnp.where(own[..., None], found, jnp.zeros((), found.dtype)))

    def attend(self, x: Float[Array, "*lead E"]) -> Float32[Array, "*lead V"]:
        """Float32 logits of every token of the vocabulary."""
        return contract(x, self.embedding[...], jnp.float32)
