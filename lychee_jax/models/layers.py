"""The layers that every Llama-like decoder shares: projection, RMSNorm, gated MLP, embedding."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

# What a fresh model is drawn from; checkpoints overwrite it.
_INIT_STD = 0.02


class Projection(nnx.Module):
    """A linear map from the trailing axes `inputs` to `outputs`, its kernel stored as `[*inputs, *outputs]`."""

    def __init__(
        self, inputs: tuple[int, ...], outputs: tuple[int, ...], *, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.kernel = nnx.Param(_INIT_STD * jax.random.normal(rngs.params(), (*inputs, *outputs), dtype))
        self.bias = nnx.Param(jnp.zeros(outputs, dtype)) if bias else None
        self.num_inputs = len(inputs)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Contract the last `num_inputs` axes of `x` with the kernel; the result has the dtype of `x`."""
        kernel = self.kernel[...].astype(x.dtype)
        inner = tuple(range(x.ndim - self.num_inputs, x.ndim))
        out = jax.lax.dot_general(x, kernel, ((inner, tuple(range(self.num_inputs))), ((), ())))
        if self.bias is not None:
            bias = self.bias[...].astype(x.dtype)
            out = out + bias.reshape((1,) * (out.ndim - bias.ndim) + bias.shape)
        return out


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
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, embed: int, inner: int, *, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        self.gate_proj = Projection((embed,), (inner,), bias=bias, dtype=dtype, rngs=rngs)
        self.up_proj = Projection((embed,), (inner,), bias=bias, dtype=dtype, rngs=rngs)
        self.down_proj = Projection((inner,), (embed,), bias=bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*lead E"]) -> Float[Array, "*lead E"]:
        """Apply the block at every position."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Embedding(nnx.Module):
    """Token vectors; with tied embeddings the same table also reads logits out."""

    def __init__(self, vocab: int, embed: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.embedding = nnx.Param(_INIT_STD * jax.random.normal(rngs.params(), (vocab, embed), dtype))

    def __call__(self, tokens: Int[Array, "*lead"]) -> Float[Array, "*lead E"]:
        """Look tokens up."""
        return self.embedding[...][tokens]

    def attend(self, x: Float[Array, "*lead E"]) -> Float[Array, "*lead V"]:
        """Float32 logits of every token of the vocabulary."""
        return logits_from(x, self.embedding[...], vocab_axis=0)


def logits_from(x: Float[Array, "*lead E"], table: Float[Array, "..."], *, vocab_axis: int) -> Float[Array, "*lead V"]:
    """Logits accumulated in float32 from operands kept in their storage dtype (no float32 copy of a large table)."""
    return jax.lax.dot_general(
        x,
        table.astype(x.dtype),
        (((x.ndim - 1,), (1 - vocab_axis,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
