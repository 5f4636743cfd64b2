"""The price of gates that are not 0, against the recurrence written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lychee_jax.training.lagrangian import Lagrangian

PRICE = Lagrangian(target=0.125)


def follow(price: Lagrangian, densities: list[float]) -> list[tuple[float, float, float]]:
    """(term of the loss, λ and C after it) of every step."""
    state, found = price.initial(), []
    for density in densities:
        term, state = price.penalty(state, jnp.float32(density))
        found.append((float(term), float(state["multiplier"]), float(state["excess"])))
    return found


def by_hand(densities: list[float], *, target: float, start: float, rate: float, momentum: float):
    multiplier, excess, found = start, 0.0, []
    for density in densities:
        excess = momentum * excess + (1 - momentum) * max(0.0, density - target)
        term = multiplier * excess
        multiplier = min(20.0, max(1e-12, multiplier * np.exp(rate * excess)))
        found.append((term, multiplier, excess))
    return found


@pytest.mark.parametrize("numbers", [(0.125, 2.0, 0.001, 0.9), (0.5, 0.1, 0.7, 0.0), (0.0, 19.0, 0.3, 0.99)], ids=str)
def test_the_recurrence(numbers):
    target, start, rate, momentum = numbers
    densities = np.random.default_rng(0).uniform(0.0, 1.0, 60).tolist()
    wanted = by_hand(densities, target=target, start=start, rate=rate, momentum=momentum)
    np.testing.assert_allclose(follow(Lagrangian(target, start, rate, momentum), densities), wanted, rtol=2e-5)


def test_the_multiplier_never_falls_and_ends_at_20():
    """It stands still while the moving average is 0, and grows as long as that remembers an excess."""
    price = Lagrangian(0.125, rate=0.5)
    before = [multiplier for _, multiplier, _ in follow(price, [0.1, 0.0, 0.125])]
    assert before == [2.0, 2.0, 2.0]
    multipliers = [multiplier for _, multiplier, _ in follow(price, [0.9] * 5 + [0.0] * 5 + [1.0] * 40)]
    assert multipliers == sorted(multipliers)
    assert multipliers[4] < multipliers[9] < 20.0
    assert multipliers[-1] == 20.0


def test_no_excess_has_no_price():
    assert follow(PRICE, [0.0, 0.1, 0.125]) == [(0.0, 2.0, 0.0)] * 3


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_the_gradient_is_that_of_this_steps_density(density):
    """λ above the target and 0 below, whatever the moving average holds and however little of it is of this step."""
    state = {"multiplier": jnp.float32(3.0), "excess": jnp.float32(0.4)}
    slope = jax.grad(lambda x: PRICE.penalty(state, x)[0])(jnp.float32(density))
    assert float(slope) == (3.0 if density > PRICE.target else 0.0)


def test_the_state_carries_no_gradient():
    def after(density):
        state = PRICE.penalty(PRICE.initial(), density)[1]
        return state["multiplier"] + state["excess"]

    assert float(jax.grad(after)(jnp.float32(0.5))) == 0.0
