"""The decoder: tokens → hidden states → logits. How queries read keys is the caller's choice, an `AttentionBackend`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from lychee_jax.attention.backend import AttentionBackend, Full
from lychee_jax.config import ModelConfig
from lychee_jax.models.layers import MLP, Embedding, Linear, RMSNorm
from lychee_jax.models.rope import apply_rotary
from lychee_jax.parallel import axes
from lychee_jax.parallel.layouts import Layout, mask_padding


class DecoderLayer(nnx.Module):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs, layout: Layout | None = None):
        self.input_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs, layout=layout)
        self.post_attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.mlp = MLP(
            config.hidden_size, config.intermediate_size, bias=config.mlp_bias, dtype=dtype, rngs=rngs,
            quantize=config.quantize, layout=layout,
        )  # fmt: skip

    def __call__(
        self,
        x: Float[Array, "B T E"],
        cos: Float[Array, "#B T half"],
        sin: Float[Array, "#B T half"],
        backend: AttentionBackend,
        index: int,
        state: Any,
    ) -> tuple[Float[Array, "B T E"], Any]:
        """One block; `state` is what the attention backend carries from layer to layer."""
        out, state = self.attention(self.input_norm(x), cos, sin, backend, index, state)
        x = x + out
        return x + self.mlp(self.post_attention_norm(x)), state


class Decoder(nnx.Module):
    """A Llama, Qwen2 or Qwen3 decoder. The layers are a plain list, unrolled: scanning stacked weights is slower.

    With a layout this is what one device runs: the modules have the sizes of its share, and logits are those of its
    share of the vocabulary. `config` is the whole model's all the same.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        layout: Layout | None = None,
    ):
        self.config, self.layout = config, layout
        config = config if layout is None else layout.share(config)
        self.embed = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs, layout=layout)
        self.layers = nnx.List(
            [DecoderLayer(config, dtype=dtype, rngs=rngs, layout=layout) for _ in range(config.num_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        width, vocab, by_vocab = config.hidden_size, config.vocab_size, (axes.VOCAB, axes.EMBED)
        # A tied table is read out as it is, unless the head is to have 8 bits: then it is a copy.
        head = config.quantize if config.quantize_head else None
        own = head is not None or not config.tie_word_embeddings
        linear = functools.partial(Linear, axes=by_vocab, bias=False, dtype=dtype, rngs=rngs, quantize=head)
        self.lm_head = linear(width, vocab) if own else None

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        cos: Float[Array, "#B T half"],
        sin: Float[Array, "#B T half"],
        backend: AttentionBackend,
        state: Any,
    ) -> tuple[Float[Array, "B T E"], Any]:
        """Final-normed hidden states, and the state that the attention backend has carried through all layers.

        `cos` and `sin` come from `rope.rotary_tables`, one row for all sequences or one each.
        """
        x = self.embed(tokens)
        for index, layer in enumerate(self.layers):
            x, state = layer(x, cos, sin, backend, index, state)
        return self.norm(x), state

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        cos: Float[Array, "#B T half"],
        sin: Float[Array, "#B T half"],
        *,
        remat: bool = False,
    ) -> Float[Array, "B T E"]:
        """Final-normed hidden states of whole sequences under dense causal attention, without a cache."""
        x = self.embed(tokens)
        backend = Full()
        for index, layer in enumerate(self.layers):

            def block(x: jax.Array, layer: DecoderLayer = layer, index: int = index) -> jax.Array:
                return layer(x, cos, sin, backend, index, None)[0]

            x = jax.checkpoint(block)(x) if remat else block(x)
        return self.norm(x)

    def logits(self, hidden: Float[Array, "*lead E"]) -> Float32[Array, "*lead V"]:
        """Float32 logits of hidden states; with a layout, of the running device's share of the vocabulary."""
        logits = self.embed.attend(hidden) if self.lm_head is None else self.lm_head(hidden, jnp.float32)
        return logits if self.layout is None else mask_padding(logits, self.config.vocab_size, self.layout.size)


class Attention(nnx.Module):
    """Grouped-query attention: project, normalise (Qwen3), rotate, attend in the given backend, project back.

    Rows of `qkv_proj`: the query heads, the key heads, the value heads, `head_dim` rows each.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs, layout: Layout | None = None):
        embed, head_dim = config.hidden_size, config.head_dim
        queries, keys = config.num_heads * head_dim, config.num_kv_heads * head_dim
        self.head_dim, self.splits = head_dim, (queries, queries + keys)
        linear = functools.partial(Linear, dtype=dtype, rngs=rngs, quantize=config.quantize, layout=layout)
        self.qkv_proj = linear(embed, queries + 2 * keys, axes=(axes.QKV, axes.EMBED), bias=config.qkv_bias)
        self.o_proj = linear(queries, embed, axes=(axes.EMBED, axes.HEADS), bias=config.o_bias)
        self.q_norm = RMSNorm(head_dim, eps=config.rms_norm_eps, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps=config.rms_norm_eps, dtype=dtype) if config.qk_norm else None

    def __call__(
        self,
        x: Float[Array, "B T E"],
        cos: Float[Array, "#B T half"],
        sin: Float[Array, "#B T half"],
        backend: AttentionBackend,
        index: int,
        state: Any,
    ) -> tuple[Float[Array, "B T E"], Any]:
        """Attend as layer `index`; query head n belongs to KV head n // G."""
        batch, length, _ = x.shape
        parts = jnp.split(self.qkv_proj(x), self.splits, axis=-1)
        q, k, v = (part.reshape(batch, length, -1, self.head_dim) for part in parts)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        grouped = q.reshape(batch, length, k.shape[2], -1, self.head_dim)
        out, state = backend(index, grouped, k, v, state)
        return self.o_proj(out.reshape(batch, length, -1)), state
