"""The price of gates that are not 0: a Lagrangian on the expected L0 norm (arXiv 2602.04541)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

_LOWEST, _HIGHEST = 1e-12, 20.0

type Multiplier = dict[str, jax.Array]
"""`multiplier`, λ, and `excess`, the moving average of how far the density is above its target."""


@dataclasses.dataclass(frozen=True)
class Lagrangian:
    """λ · C, C the moving average of relu(density − target), and λ ← clip(λ · exp(rate · C), 1e-12, 20)."""

    target: float
    start: float = 2.0
    rate: float = 0.001
    momentum: float = 0.9

    def initial(self) -> Multiplier:
        """Before the first step."""
        return {"multiplier": jnp.float32(self.start), "excess": jnp.float32(0.0)}

    def penalty(self, state: Multiplier, density: Float32[Array, ""]) -> tuple[Float32[Array, ""], Multiplier]:
        """The term of the loss, and the state after the step.

        The value is the moving average's, the gradient that of this step's density. λ never falls, as C ≥ 0.
        """
        now = jax.nn.relu(density - self.target)
        excess = self.momentum * state["excess"] + (1.0 - self.momentum) * jax.lax.stop_gradient(now)
        constraint = excess + now - jax.lax.stop_gradient(now)
        grown = jnp.clip(state["multiplier"] * jnp.exp(self.rate * excess), _LOWEST, _HIGHEST)
        return state["multiplier"] * constraint, {"multiplier": grown, "excess": excess}
