"""Rotary tables against 60-digit decimal arithmetic, and what the way of turning pairs promises."""

import decimal
import math
from decimal import Decimal

import jax.numpy as jnp
import numpy as np
import pytest

from lychee_jax.config import RopeConfig
from lychee_jax.models.rope import apply_rotary, rotary_tables, yarn_attention_factor

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803")
MAX_POSITION = 8192
FAR = np.array([[0, 1, 999, 8191, 2**20 - 1, 2**20 + 12345, 2**21]])

ROPES = [
    RopeConfig(theta=10000.0),
    RopeConfig(theta=5e6),
    RopeConfig("linear", theta=1e4, factor=3.3),
    RopeConfig("dynamic", theta=1e4, factor=4.0, original_max_position_embeddings=MAX_POSITION),
    RopeConfig("llama3", theta=5e5, factor=8.0, original_max_position_embeddings=8192),
    RopeConfig("yarn", theta=1e6, factor=4.0, original_max_position_embeddings=32768),
    RopeConfig("yarn", theta=1e4, factor=40.0, original_max_position_embeddings=4096, truncate=False, beta_fast=16.0),
    RopeConfig("yarn", theta=1e4, factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=0.7),
]


def decimal_frequencies(rope: RopeConfig, head_dim: int, length: int) -> list[Decimal]:
    """The definitions once more, case by case."""
    theta, factor, original = Decimal(rope.theta), Decimal(rope.factor), Decimal(rope.original_max_position_embeddings)
    if rope.kind == "dynamic" and length > MAX_POSITION:
        stretch = factor * length / MAX_POSITION - (factor - 1)
        theta *= stretch ** (Decimal(head_dim) / (head_dim - 2))
    plain = [1 / theta ** (Decimal(2 * i) / head_dim) for i in range(head_dim // 2)]
    if rope.kind == "linear":
        return [frequency / factor for frequency in plain]
    if rope.kind == "llama3":
        low, high = Decimal(rope.low_freq_factor), Decimal(rope.high_freq_factor)
        found = []
        for frequency in plain:
            wavelength = 2 * PI / frequency
            if wavelength < original / high:
                found.append(frequency)
            elif wavelength > original / low:
                found.append(frequency / factor)
            else:
                smooth = (original / wavelength - low) / (high - low)
                found.append((1 - smooth) * frequency / factor + smooth * frequency)
        return found
    if rope.kind == "yarn":
        borders = []
        for turns in (rope.beta_fast, rope.beta_slow):
            borders.append(head_dim * (original / (2 * PI * Decimal(turns))).ln() / (2 * theta.ln()))
        low, high = borders
        if rope.truncate:
            low = low.to_integral_value(decimal.ROUND_FLOOR)
            high = high.to_integral_value(decimal.ROUND_CEILING)
        low, high = max(low, Decimal(0)), min(high, Decimal(head_dim - 1))
        found = []
        for i, frequency in enumerate(plain):
            ramp = min(max((i - low) / (high - low), Decimal(0)), Decimal(1))
            found.append(frequency / factor * ramp + frequency * (1 - ramp))
        return found
    return plain


def decimal_cos_sin(angle: Decimal) -> tuple[float, float]:
    """Taylor's series, after whole turns are taken off exactly."""
    angle %= 2 * PI
    term, cos, sin = Decimal(1), Decimal(0), Decimal(0)
    for n in range(80):
        if n % 2:
            sin += term if n % 4 == 1 else -term
        else:
            cos += term if n % 4 == 0 else -term
        term *= angle / (n + 1)
    return float(cos), float(sin)


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: f"{rope.kind}-{rope.theta:.0e}")
@pytest.mark.parametrize("head_dim", [16, 128])
def test_tables_are_right_to_a_millionth_at_two_million(rope, head_dim):
    length = int(FAR.max()) + 1
    cos, sin = rotary_tables(rope, head_dim, MAX_POSITION, FAR, np.array([length]))
    with decimal.localcontext(prec=60):
        frequencies = decimal_frequencies(rope, head_dim, length)
        pairs = np.array([[decimal_cos_sin(int(p) * f) for f in frequencies] for p in FAR[0]])
    scale = yarn_attention_factor(rope)
    np.testing.assert_allclose(cos[0] / scale, pairs[..., 0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(sin[0] / scale, pairs[..., 1], rtol=0, atol=1e-6)
    assert cos.dtype == sin.dtype == np.float32


def test_longrope_divides_each_frequency_by_its_own_factor():
    factors = tuple(1 + pair / 3 for pair in range(8))
    rope = RopeConfig("longrope", theta=5e5, factors=factors)
    cos, sin = rotary_tables(rope, 16, MAX_POSITION, FAR, np.array([1]))
    with decimal.localcontext(prec=60):
        plain = decimal_frequencies(RopeConfig(theta=5e5), 16, 1)
        frequencies = [each / Decimal(factor) for each, factor in zip(plain, factors, strict=True)]
        pairs = np.array([[decimal_cos_sin(int(p) * f) for f in frequencies] for p in FAR[0]])
    np.testing.assert_allclose(cos[0], pairs[..., 0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(sin[0], pairs[..., 1], rtol=0, atol=1e-6)


def test_float32_angles_would_not_do():
    """What the tables are protected from, so that the test above is known to be a demanding one."""
    rope = RopeConfig(theta=1e6)
    cos, _ = rotary_tables(rope, 128, MAX_POSITION, FAR, np.array([2**21]))
    frequencies = (1 / 1e6 ** (np.arange(0, 128, 2) / 128)).astype(np.float32)
    naive = np.cos(FAR[0, :, None].astype(np.float32) * frequencies)
    assert np.abs(naive - cos[0]).max() > 0.01


def test_dynamic_base_belongs_to_the_row_and_grows_with_it():
    rope = RopeConfig("dynamic", factor=4.0)
    positions = np.arange(40)[None]
    plain = rotary_tables(RopeConfig(), 16, 32, positions, np.array([40]))

    def tables(lengths):
        return rotary_tables(rope, 16, 32, positions, np.array(lengths))

    # Up to max_position_embeddings nothing is stretched, however short the row.
    for length in (1, 31, 32):
        np.testing.assert_array_equal(tables([length]), plain)
    longer, longest = tables([33]), tables([64])
    assert np.abs(longer[0] - plain[0]).max() > 1e-3
    assert np.abs(longest[0] - longer[0]).max() > 1e-3
    # theta · (4 · 64 / 32 − 3) ^ (16 / 14), by hand
    stretched = 10000.0 * 5 ** (16 / 14) * np.ones(1)
    by_hand = np.cos(39 * stretched ** -(np.arange(8) / 8))
    np.testing.assert_allclose(longest[0][0, 39], by_hand, atol=1e-6)

    # Prompt of 34, then single steps: every position keeps the base of the time at which it was written.
    lengths = np.maximum(positions + 1, 34)
    grown = rotary_tables(rope, 16, 32, positions, lengths)
    for position, length in ((0, 34), (33, 34), (34, 35), (39, 40)):
        alone = rotary_tables(rope, 16, 32, np.array([[position]]), np.array([length]))
        np.testing.assert_array_equal(grown[0][:, position : position + 1], alone[0])


@pytest.mark.parametrize("rope", ROPES[2:6], ids=lambda rope: rope.kind)
def test_rows_do_not_know_of_each_other(rope):
    positions = np.array([[5, 6, 7], [5, 6, 7], [9000, 9001, 9002]])
    lengths = np.array([8, 9000, 9003])
    together = rotary_tables(rope, 32, MAX_POSITION, positions, lengths)
    for row in range(3):
        alone = rotary_tables(rope, 32, MAX_POSITION, positions[row : row + 1], lengths[row : row + 1])
        np.testing.assert_array_equal(together[0][row], alone[0][0])
        np.testing.assert_array_equal(together[1][row], alone[1][0])
    same = rotary_tables(rope, 32, MAX_POSITION, positions[:2], np.array([8, 8]))
    np.testing.assert_array_equal(same[0][0], same[0][1])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"attention_factor": 1.5}, 1.5),
        ({"attention_factor": 1.5, "mscale": 1.0, "mscale_all_dim": 0.5}, 1.5),
        ({"mscale": 2.0, "mscale_all_dim": 0.5}, (0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1)),
        ({"mscale": 2.0}, 0.1 * math.log(4) + 1),
        ({"mscale": 0.0, "mscale_all_dim": 1.0}, 0.1 * math.log(4) + 1),
        ({"factor": 1.0}, 1.0),
        ({"factor": 0.5}, 1.0),
    ],
)
def test_yarn_scales_attention(options, expected):
    rope = RopeConfig("yarn", **({"factor": 4.0} | options))
    assert yarn_attention_factor(rope) == pytest.approx(expected, rel=1e-12)
    cos, sin = rotary_tables(rope, 8, 64, np.array([[0, 7]]), np.array([8]))
    np.testing.assert_allclose(cos**2 + sin**2, expected**2, rtol=1e-6)


def test_halves_are_paired():
    x = jnp.arange(8, dtype=jnp.float32).reshape(1, 1, 1, 8)
    angles = np.array([[[0.1, 0.2, 0.3, 0.4]]], np.float32)
    turned = np.asarray(apply_rotary(x, jnp.cos(angles), jnp.sin(angles)))[0, 0, 0]
    for i, angle in enumerate(angles[0, 0]):
        assert turned[i] == pytest.approx(i * math.cos(angle) - (i + 4) * math.sin(angle), abs=1e-5)
        assert turned[i + 4] == pytest.approx((i + 4) * math.cos(angle) + i * math.sin(angle), abs=1e-5)


def test_scores_depend_on_distance_alone():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 2, 3, 32)), jnp.float32) for _ in range(2))
    scores = []
    for start in (0, 100_000):
        cos, sin = rotary_tables(RopeConfig(), 32, 2048, np.array([[start + 7, start]]), np.array([1]))
        tables = jnp.asarray(cos), jnp.asarray(sin)
        scores.append(np.einsum("hd,hd->h", apply_rotary(q, *tables)[0, 0], apply_rotary(k, *tables)[0, 1]))
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)


def test_bfloat16_is_turned_in_float32_by_one_row_of_tables():
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((3, 5, 2, 16)), jnp.bfloat16)
    cos, sin = (jnp.asarray(t) for t in rotary_tables(RopeConfig(), 16, 64, np.arange(5)[None], np.array([5])))
    turned = apply_rotary(x, cos, sin)
    assert turned.dtype == jnp.bfloat16
    expected = apply_rotary(x.astype(jnp.float32), cos, sin).astype(jnp.bfloat16)
    np.testing.assert_array_equal(turned.astype(jnp.float32), expected.astype(jnp.float32))
