"""Rotary position embedding (Su et al., arXiv 2104.09864) with the methods of stretching it for long contexts.

Angles are computed on the host in float64: at position 2²⁰ a float32 angle is off by hundredths of a radian, a float64
one by 1e-10, and no compiler's idea of a cosine is involved. The tables are small beside the weights of each step.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Integer

from lychee_jax.config import RopeConfig


def rotary_tables(
    rope: RopeConfig,
    head_dim: int,
    max_position_embeddings: int,
    positions: Integer[np.ndarray, "B T"],
    lengths: Integer[np.ndarray, "B ..."],
) -> tuple[Float32[np.ndarray, "B T half"], Float32[np.ndarray, "B T half"]]:
    """Cosines and sines of every position's angles, yarn's attention factor multiplied in.

    Args:
        rope: which frequencies.
        head_dim: H; `half` is H / 2.
        max_position_embeddings: the length above which a dynamic base grows.
        positions: absolute positions, from 0.
        lengths: what a dynamic base is computed from, [B] or [B, T]: for prefill the row's whole prompt length, for a
            decode step at position p the length p + 1. The other kinds ignore it.

    Returns:
        (cos, sin), right to float32's rounding at any position below 2³⁰.
    """
    dynamic = rope.kind == "dynamic"
    per_token = np.broadcast_to(lengths.reshape(len(lengths), -1), positions.shape)
    same_length = not dynamic or (per_token == per_token[:1]).all()
    if len(positions) > 1 and same_length and (positions == positions[:1]).all():
        cos, sin = rotary_tables(rope, head_dim, max_position_embeddings, positions[:1], lengths[:1])
        return np.repeat(cos, len(positions), axis=0), np.repeat(sin, len(positions), axis=0)

    if dynamic:
        distinct, which = np.unique(np.maximum(per_token, max_position_embeddings), return_inverse=True)
        bases = _dynamic_thetas(rope, head_dim, max_position_embeddings, distinct)
        frequencies = _plain_frequencies(bases[:, None], head_dim)[which.reshape(positions.shape)]
    else:
        frequencies = inverse_frequencies(rope, head_dim)
    angles = positions[..., None].astype(np.float64) * frequencies
    scale = yarn_attention_factor(rope)
    return (np.cos(angles) * scale).astype(np.float32), (np.sin(angles) * scale).astype(np.float32)


def apply_rotary(
    x: Float[Array, "B T heads H"], cos: Float[Array, "#B T half"], sin: Float[Array, "#B T half"]
) -> Float[Array, "B T heads H"]:
    """Turns the pairs (x[i], x[i + H/2]) by the tables' angles, in float32; the result has x's dtype.

    The halves are paired, not neighbours: that is how Hugging Face checkpoints store their q and k projections.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :].astype(jnp.float32), sin[:, :, None, :].astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Float64[np.ndarray, " half"]:
    """Radians per position of each pair; for dynamic those of a sequence that needs no stretching."""
    plain = _plain_frequencies(rope.theta, head_dim)
    match rope.kind:
        case "linear":
            return plain / rope.factor
        case "llama3":
            return _llama3_frequencies(rope, plain)
        case "yarn":
            return _yarn_frequencies(rope, plain, head_dim)
        case "longrope":
            return plain / np.array(rope.factors, np.float64)
        case _:
            return plain


def yarn_attention_factor(rope: RopeConfig) -> float:
    """What yarn multiplies queries and keys with (arXiv 2309.00071, section 3.4: 0.1 ln(factor) + 1); else 1."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return temperature(1.0)


def _plain_frequencies(theta: float | np.ndarray, head_dim: int) -> np.ndarray:
    return theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def _dynamic_thetas(rope: RopeConfig, head_dim: int, max_position_embeddings: int, lengths: np.ndarray) -> np.ndarray:
    """NTK-aware bases of sequences of at least max_position_embeddings tokens (arXiv 2309.00071, appendix A.1)."""
    stretch = rope.factor * lengths / max_position_embeddings - (rope.factor - 1)
    return rope.theta * stretch ** (head_dim / (head_dim - 2))


def _llama3_frequencies(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Llama 3.1: long waves are stretched by `factor`, short ones kept, those between blended by their turns."""
    turns = rope.original_max_position_embeddings * plain / (2 * math.pi)  # full turns within the original context
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return plain * (kept + (1 - kept) / rope.factor)


def _yarn_frequencies(rope: RopeConfig, plain: np.ndarray, head_dim: int) -> np.ndarray:
    """NTK-by-parts (arXiv 2309.00071, section 3.2), its ramp over pair indices."""

    def pair_that_turns(turns: float) -> float:
        wavelength = rope.original_max_position_embeddings / turns
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001  # transformers' width of an empty ramp
    stretched = np.clip((np.arange(head_dim // 2) - low) / width, 0.0, 1.0)
    return plain * (1 - stretched + stretched / rope.factor)
