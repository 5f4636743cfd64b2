"""Gates against float64 references that share no formula with them.

A Kumaraswamy variable to the power α is Beta(1, β): scipy's incomplete beta function and numpy's beta draws are what
probabilities, means and samples are held against; gradients are held against central differences of the references.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from lychee_jax.errors import UserError
from lychee_jax.training.gates import FAMILIES, HardConcrete, HardKuma, Plain, harden, with_first_layer

type Parameters = dict[str, np.ndarray]

KUMA, CONCRETE, PLAIN = HardKuma(), HardConcrete(), Plain()
# What the papers say, not what the module says.
LOW, HIGH = -0.1, 1.1
TEMPERATURE = 2 / 3
EXTREMES = [1e-6, 1e-4, 1e-2, 0.1, 0.5, 1.0, 2.0, 10.0, 30.0, 100.0]
ENDS = [0.0, 1e-30, 1e-7, 1e-6, 1e-3, 0.5, 0.999, 1 - 1e-6, 1 - 6e-8, 1.0]


def single(values: Any) -> np.ndarray:
    return np.array(values, np.float32)


def unstretched(z: Any) -> Any:
    return (z - LOW) / (HIGH - LOW)


def kuma_cdf(x: float, p: Parameters) -> np.ndarray:
    return special.betainc(1.0, p["beta"], x ** p["alpha"])


def kuma_survival(x: float, p: Parameters) -> np.ndarray:
    # Beta(1, β) from the other end: 1 − x^α is tiny for a tiny α.
    return special.betainc(p["beta"], 1.0, -special.expm1(p["alpha"] * np.log(x)))


def kuma_draw(u: np.ndarray, p: Parameters) -> np.ndarray:
    """Stretched but not rectified."""
    rest = np.exp(np.log1p(-u) / p["beta"])
    return LOW + (HIGH - LOW) * np.exp(np.log1p(-rest) / p["alpha"])


def concrete_survival(x: float, p: Parameters) -> np.ndarray:
    return stats.logistic.sf(TEMPERATURE * special.logit(x), loc=p["log_alpha"])


def concrete_draw(u: np.ndarray, p: Parameters) -> np.ndarray:
    """Stretched but not rectified."""
    return LOW + (HIGH - LOW) * special.expit(stats.logistic.ppf(u, loc=p["log_alpha"]) / TEMPERATURE)


def mean(survival: Any, p: Parameters) -> np.ndarray:
    value, error = integrate.quad_vec(
        lambda t: survival(unstretched(t), p), 0, 1, epsabs=1e-13, epsrel=1e-13, norm="max"
    )
    assert error < 1e-9
    return value


REFERENCES = {
    "zero": lambda p: kuma_cdf(unstretched(0.0), p),
    "nonzero": lambda p: kuma_survival(unstretched(0.0), p),
    "one": lambda p: kuma_survival(unstretched(1.0), p),
    "expected": lambda p: mean(kuma_survival, p),
}
CONCRETE_REFERENCES = {
    "nonzero": lambda p: concrete_survival(unstretched(0.0), p),
    "expected": lambda p: mean(concrete_survival, p),
}


def extremes() -> Parameters:
    alpha, beta = np.meshgrid(single(EXTREMES), single(EXTREMES), indexing="ij")
    return {"alpha": alpha.astype(np.float64), "beta": beta.astype(np.float64)}


def logits() -> Parameters:
    return {"log_alpha": np.linspace(-10, 10, 81, dtype=np.float32).astype(np.float64)}


def kuma(alpha: Any, beta: Any) -> dict[str, jax.Array]:
    return {"alpha": jnp.float32(alpha), "beta": jnp.float32(beta)}


def given(p: Parameters) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value, jnp.float32) for name, value in p.items()}


def gradients(function: Any, p: Parameters) -> Parameters:
    """Of every gate in its own parameters, times the parameter: comparable from 1e-6 to 100."""
    result = jax.jit(jax.grad(lambda params: function(params).sum()))(given(p))
    return {name: np.asarray(value, np.float64) * p[name] for name, value in result.items()}


def differences(function: Any, p: Parameters, step: float = 1e-5) -> Parameters:
    """Central differences of a float64 function, times the parameter as well."""
    found = {}
    for name, value in p.items():
        h = step * np.where(value == 0, 1.0, np.abs(value))
        slope = (function({**p, name: value + h}) - function({**p, name: value - h})) / (2 * h)
        found[name] = slope * value
    return found


def fresh() -> tuple[np.random.Generator, str]:
    """Other draws on every run, and what to say if they fail."""
    seed = np.random.SeedSequence()
    return np.random.default_rng(seed), f"seed {seed.entropy}"


def agree(sampled: np.ndarray, probability: Any, note: str) -> None:
    """The mean of draws in [0, 1] must be within six standard errors, and what Bernstein adds for rare events."""
    error = abs(np.mean(sampled, dtype=np.float64) - float(probability))
    n = sampled.size
    assert error < 6 * np.std(sampled, dtype=np.float64) / np.sqrt(n) + 50 / n, (error, float(probability), note)


def test_start_has_known_values():
    for shape in [(1, 1), (31, 8)]:
        params = KUMA.initial(shape)
        for method, value in [("zero", 1 / 12), ("nonzero", 11 / 12), ("one", 1 / 12), ("expected", 0.5)]:
            got = getattr(KUMA, method)(params)
            assert got.shape == shape
            assert got.dtype == jnp.float32
            np.testing.assert_allclose(got, value, rtol=5e-7, err_msg=method)
        np.testing.assert_allclose(CONCRETE.expected(CONCRETE.initial(shape)), 0.5, rtol=5e-7)


@pytest.mark.parametrize("c", [1e-6, 0.3, 2.5, 20.0, 100.0])
def test_closed_forms(c: float):
    c = float(np.float32(c))
    low, high = 1 / 12, 11 / 12
    mean = 1.2 * (high ** (c + 1) - low ** (c + 1)) / (c + 1)
    first = {"zero": low**c, "one": -np.expm1(c * np.log(high)), "expected": 1 - mean}  # β = 1: F(s) = s^α
    second = {"nonzero": high**c, "one": low**c, "expected": mean}  # α = 1: 1 − F(s) = (1 − s)^β
    # What underflows in float32 may be 0.
    for method, value in first.items():
        np.testing.assert_allclose(getattr(KUMA, method)(kuma(c, 1)), value, rtol=1e-5, atol=1e-37, err_msg=method)
    for method, value in second.items():
        np.testing.assert_allclose(getattr(KUMA, method)(kuma(1, c)), value, rtol=1e-5, atol=1e-37, err_msg=method)


@pytest.mark.parametrize("method", REFERENCES)
def test_probabilities_and_mean(method: str):
    p = extremes()
    got = np.asarray(jax.jit(getattr(KUMA, method))(given(p)))
    np.testing.assert_allclose(got, REFERENCES[method](p), rtol=2e-5, atol=3e-7)
    assert got.min() >= 0
    assert got.max() <= 1 + 2e-7


def test_tiny_probabilities_are_exact():
    p = extremes()
    zero, one = REFERENCES["zero"](p), REFERENCES["one"](p)
    tiny = (zero > 1e-36) & (zero < 1e-6)
    assert tiny.sum() > 15
    np.testing.assert_allclose(np.asarray(KUMA.zero(given(p)))[tiny], zero[tiny], rtol=3e-5)
    tiny = (one > 1e-36) & (one < 1e-6)
    assert tiny.sum() > 5
    np.testing.assert_allclose(np.asarray(KUMA.one(given(p)))[tiny], one[tiny], rtol=3e-5)


def test_probabilities_belong_together():
    params = given(extremes())
    zero, nonzero, one = (np.asarray(f(params)) for f in (KUMA.zero, KUMA.nonzero, KUMA.one))
    expected = np.asarray(KUMA.expected(params))
    between = nonzero - one
    assert between.min() >= 0
    np.testing.assert_allclose(zero + between + one, 1, atol=3e-7)
    assert (expected <= nonzero + 3e-7).all()
    assert (expected >= one - 3e-7).all()
    # A larger α moves mass up, a larger β moves it down.
    for values in (nonzero, one, expected, -zero):
        assert np.diff(values, axis=0).min() >= -3e-7
        assert np.diff(values, axis=1).max() <= 3e-7


@pytest.mark.parametrize("method", REFERENCES)
def test_gradients_of_probabilities_and_mean(method: str):
    p = extremes()
    got, want = gradients(getattr(KUMA, method), p), differences(REFERENCES[method], p)
    for name in p:
        assert np.abs(want[name]).max() > 0.1  # there is something to compare
        np.testing.assert_allclose(got[name], want[name], rtol=3e-4, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("p", [kuma(*each) for each in [(1, 1), (0.3, 0.2), (5, 0.5), (0.5, 5), (3, 8)]])
def test_mean_is_the_mean_of_the_samples(p: dict[str, jax.Array]):
    """The integral over u of the very samples, which knows nothing of survival functions."""
    middles = (np.arange(200_000) + 0.5) / 200_000
    z = KUMA.sample(p, jnp.asarray(middles, jnp.float32))
    np.testing.assert_allclose(KUMA.expected(p), np.mean(np.asarray(z), dtype=np.float64), atol=2e-5)


def aimed(rng: np.random.Generator, n: int) -> tuple[Parameters, np.ndarray]:
    """Parameters of all sizes, and draws of which most give z between 0 and 1."""
    alpha, beta = (np.exp(rng.uniform(np.log(1e-6), np.log(100), n)).astype(np.float32) for _ in range(2))
    p = {"alpha": alpha.clip(1e-6, 100).astype(np.float64), "beta": beta.clip(1e-6, 100).astype(np.float64)}
    u = 1 - kuma_survival(unstretched(rng.uniform(-0.05, 1.05, n)), p)
    keep = (u > 2e-6) & (u < 1 - 2e-6)
    return {name: value[keep] for name, value in p.items()}, u[keep].astype(np.float32)


def test_samples_and_their_gradients():
    rng, note = fresh()
    p, u = aimed(rng, 20_000)
    want = kuma_draw(u.astype(np.float64), p)
    got = np.asarray(KUMA.sample(given(p), jnp.asarray(u)))
    np.testing.assert_allclose(got, want.clip(0, 1), atol=1e-5, err_msg=note)

    # Not next to the kinks, where either side is right.
    inside, outside = (want > 1e-4) & (want < 1 - 1e-4), (want < -1e-4) | (want > 1 + 1e-4)
    for name in p:
        for part in (p[name] < 1e-4, p[name] > 10):
            assert (inside & part).sum() > 50, note
    assert outside.sum() > 50, note
    slopes = gradients(lambda params: KUMA.sample(params, jnp.asarray(u)), p)
    exact = differences(lambda q: kuma_draw(u.astype(np.float64), q), p)
    for name in p:
        np.testing.assert_allclose(slopes[name][inside], exact[name][inside], rtol=1e-3, atol=1e-5, err_msg=note)
        assert not slopes[name][outside].any(), note


@pytest.mark.parametrize("family", [KUMA, CONCRETE])
def test_samples_at_the_ends(family: Any):
    p = given(extremes() if family is KUMA else logits())
    u = jnp.float32(ENDS).reshape(-1, *[1] * next(iter(p.values())).ndim)
    for sample in (family.sample, jax.jit(family.sample)):
        z = np.asarray(sample(p, u))
        assert z.shape == (len(ENDS), *next(iter(p.values())).shape)
        assert np.isfinite(z).all()
        assert z.min() == 0
        assert z.max() == 1
        assert (np.diff(z, axis=0) >= 0).all()  # in u
        if family is KUMA:
            assert (np.diff(z, axis=1) >= -1e-6).all()  # in α
            assert (np.diff(z, axis=2) <= 1e-6).all()  # in β
        else:
            assert (np.diff(z, axis=1) >= -1e-6).all()
    # Draw by draw, so that nothing cancels.
    pull = jax.jit(jax.vmap(jax.grad(lambda q, u: family.sample(q, u).sum()), in_axes=(None, 0)))
    for slope in jax.tree.leaves(pull(p, u)):
        assert np.isfinite(slope).all()
        assert np.any(slope)


@pytest.mark.parametrize(
    ("alpha", "beta"), [(1, 1), (0.05, 0.1), (0.4, 3), (3, 0.4), (6, 40), (100, 100), (1e-6, 0.05), (1e-6, 1e-6)]
)
def test_monte_carlo(alpha: float, beta: float):
    rng, note = fresh()
    n = 200_000
    p = kuma(alpha, beta)
    z = np.asarray(KUMA.sample(p, jnp.asarray(rng.random(n, np.float32))))
    agree(z == 0, KUMA.zero(p), note)
    agree(z != 0, KUMA.nonzero(p), note)
    agree(z == 1, KUMA.one(p), note)
    agree(z, KUMA.expected(p), note)
    # And draws of another make: s^α is Beta(1, β).
    y = rng.beta(1.0, float(p["beta"]), n)
    with np.errstate(under="ignore"):
        other = (LOW + (HIGH - LOW) * y ** (1 / float(p["alpha"]))).clip(0, 1)
    agree(other == 0, KUMA.zero(p), note)
    agree(other == 1, KUMA.one(p), note)
    agree(other, KUMA.expected(p), note)
    for level in (0.1, 0.3, 0.5, 0.7, 0.9):
        exact = {name: np.asarray(value, np.float64) for name, value in p.items()}
        agree(z > level, kuma_survival(unstretched(level), exact), note)


@pytest.mark.parametrize("method", CONCRETE_REFERENCES)
def test_concrete_probability_and_mean(method: str):
    p = logits()
    got = np.asarray(getattr(CONCRETE, method)(given(p)))
    np.testing.assert_allclose(got, CONCRETE_REFERENCES[method](p), rtol=1e-5, atol=1e-7)
    slopes, exact = gradients(getattr(CONCRETE, method), p), differences(CONCRETE_REFERENCES[method], p)
    np.testing.assert_allclose(slopes["log_alpha"], exact["log_alpha"], rtol=1e-4, atol=1e-6)


def test_concrete_samples_and_their_gradients():
    rng, note = fresh()
    n = 5000
    p = {"log_alpha": rng.uniform(-10, 10, n).astype(np.float32).astype(np.float64)}
    u = stats.logistic.cdf(TEMPERATURE * special.logit(unstretched(rng.uniform(-0.05, 1.05, n))) - p["log_alpha"])
    u = u.clip(2e-6, 1 - 2e-6).astype(np.float32)
    want = concrete_draw(u.astype(np.float64), p)
    np.testing.assert_allclose(CONCRETE.sample(given(p), jnp.asarray(u)), want.clip(0, 1), atol=1e-5, err_msg=note)
    inside, outside = (want > 1e-4) & (want < 1 - 1e-4), (want < -1e-4) | (want > 1 + 1e-4)
    assert min(inside.sum(), outside.sum()) > 100, note
    slopes = gradients(lambda params: CONCRETE.sample(params, jnp.asarray(u)), p)["log_alpha"]
    exact = differences(lambda q: concrete_draw(u.astype(np.float64), q), p)["log_alpha"]
    np.testing.assert_allclose(slopes[inside], exact[inside], rtol=1e-3, atol=1e-4, err_msg=note)
    assert not slopes[outside].any(), note


@pytest.mark.parametrize("log_alpha", [-10.0, -2.0, 0.0, 0.7, 5.0])
def test_concrete_monte_carlo(log_alpha: float):
    rng, note = fresh()
    n = 200_000
    p = {"log_alpha": jnp.float32(log_alpha)}
    other = (LOW + (HIGH - LOW) * special.expit((rng.logistic(log_alpha, 1, n)) / TEMPERATURE)).clip(0, 1)
    for z in (np.asarray(CONCRETE.sample(p, jnp.asarray(rng.random(n, np.float32)))), other):
        agree(z != 0, CONCRETE.nonzero(p), note)
        agree(z == 1, concrete_survival(unstretched(1.0), {"log_alpha": np.array(log_alpha)}), note)
        agree(z, CONCRETE.expected(p), note)


def test_plain_is_the_number_itself():
    value = np.random.default_rng().uniform(0, 1, (3, 2)).astype(np.float32)
    params = {"value": jnp.asarray(value)}
    u = jnp.asarray(np.random.default_rng().random((5, 3, 2), np.float32))
    assert (np.asarray(PLAIN.sample(params, u)) == value).all()
    assert PLAIN.sample(params, u).shape == (5, 3, 2)
    for function, slope in [(PLAIN.nonzero, 1), (PLAIN.expected, 1), (lambda p: PLAIN.sample(p, u), 5)]:
        assert (np.asarray(jax.grad(lambda p, f=function: f(p).sum())(params)["value"]) == slope).all()
    assert (np.asarray(PLAIN.nonzero(params)) == value).all()
    assert (np.asarray(PLAIN.expected(params)) == value).all()
    assert (np.asarray(PLAIN.initial((3, 2))["value"]) == 1).all()


@pytest.mark.parametrize(
    ("family", "low", "high"), [("hardkuma", 1e-6, 100.0), ("hardconcrete", -10.0, 10.0), ("plain", 0.0, 1.0)]
)
def test_families_start_and_stay_within_bounds(family: str, low: float, high: float):
    gates = FAMILIES[family]
    start = gates.initial((3, 2))
    for name, value in gates.project(start).items():
        assert value.shape == (3, 2)
        assert (np.asarray(value) == np.asarray(start[name])).all()
    inner = np.float32(low + 0.3 * (high - low))
    ragged = jnp.float32([-np.inf, low - 1, low, inner, high, high + 1, np.inf])
    for value in gates.project(dict.fromkeys(start, ragged)).values():
        assert np.asarray(value).tolist() == single([low, low, low, inner, high, high, high]).tolist()
    # Draws for many batches at once, and another draw is another sample unless nothing is drawn.
    u = jnp.asarray(np.random.default_rng().uniform(0.3, 0.7, (5, 3, 2)).astype(np.float32))
    z = np.asarray(gates.sample(start, u))
    assert z.shape == (5, 3, 2)
    assert len(np.unique(z)) == (1 if family == "plain" else len(np.unique(u)))


def test_first_layer_is_whole():
    gates = jnp.asarray(np.random.default_rng().random((4, 2, 3), np.float32))
    whole = np.asarray(with_first_layer(gates))
    assert whole.shape == (4, 3, 3)
    assert (whole[:, 0] == 1).all()
    assert (whole[:, 1:] == np.asarray(gates)).all()
    assert with_first_layer(gates[0]).shape == (3, 3)
    assert with_first_layer(gates).dtype == jnp.float32
    assert np.asarray(with_first_layer(jnp.zeros((0, 3)))).tolist() == [[1, 1, 1]]  # a model of one layer
    assert (np.asarray(jax.grad(lambda g: with_first_layer(g).sum())(gates)) == 1).all()


def test_harden_takes_what_is_more_than_half():
    expected = single([[0, 0.2, 0.9], [0.5, 0.50001, 0.49999], [1, 0, 0.51]])
    before = expected.copy()
    assert harden(expected).tolist() == [[True] * 3, [False, True, False], [True, False, True]]
    assert (expected == before).all()


@pytest.mark.parametrize("shape", [(7, 3), (31, 8)])
def test_harden_takes_no_gate_that_never_moved(shape: tuple[int, int]):
    for family in (KUMA, CONCRETE):
        expected = np.asarray(with_first_layer(jax.jit(family.expected)(family.initial(shape))))
        assert harden(expected).sum() == shape[1]


@pytest.mark.parametrize("order", ["C", "F"])
def test_harden_takes_the_highest(order: Any):
    rng, note = fresh()
    for _ in range(200):
        layers, kv_heads = int(rng.integers(1, 7)), int(rng.integers(1, 6))
        # Few values, so that most are tied.
        expected = rng.choice(single([0, 0.2, 0.5, 0.7, 1]), (layers, kv_heads))
        count = int(rng.integers(kv_heads, layers * kv_heads + 1))
        roles = harden(np.asarray(expected, order=order), count)
        above = [(-expected[layer, head], layer, head) for layer in range(1, layers) for head in range(kv_heads)]
        chosen = {(layer, head) for _, layer, head in sorted(above)[: count - kv_heads]}
        chosen |= {(0, head) for head in range(kv_heads)}
        assert roles.dtype == bool
        assert roles.sum() == count
        assert {(int(layer), int(head)) for layer, head in np.argwhere(roles)} == chosen, note


def test_harden_breaks_ties_downwards():
    tied = np.full((3, 4), 0.3, np.float32)
    assert harden(tied, 9).tolist() == [[True] * 4, [True] * 4, [True, False, False, False]]
    tied[2, 3] = 0.4
    assert harden(tied, 6).tolist() == [[True] * 4, [True, False, False, False], [False, False, False, True]]


@pytest.mark.parametrize("count", [-1, 0, 3, 13])
def test_harden_refuses(count: int):
    with pytest.raises(
        UserError, match=rf"^{count} retrieval heads: layer 0 alone has 4, and the model has 12 KV heads$"
    ):
        harden(np.zeros((3, 4), np.float32), count)


@pytest.mark.parametrize("shape", [(7, 3), (35, 4), (31, 8)])
def test_equal_gates_have_equal_means(shape: tuple[int, int]):
    """Or ties would be decided by rounding: wherever a gate stands, its mean is the same to the last bit."""
    rng, note = fresh()
    mean_of_kuma, mean_of_concrete = jax.jit(KUMA.expected), jax.jit(CONCRETE.expected)
    for alpha, beta in np.exp(rng.uniform(-6, 4, (100, 2))).astype(np.float32):
        means = mean_of_kuma(kuma(np.full(shape, alpha), np.full(shape, beta)))
        assert len(np.unique(np.asarray(means))) == 1, note
        means = mean_of_concrete({"log_alpha": jnp.full(shape, np.log(alpha))})
        assert len(np.unique(np.asarray(means))) == 1, note
