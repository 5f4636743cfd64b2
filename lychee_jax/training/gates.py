"""Gates between 0 and 1 for every KV head above layer 0: 1 reads the whole cache, 0 reads what was picked below.

`HardKuma` is LycheeDecode's (arXiv 2602.04541): a Kumaraswamy variable on (0, 1), stretched to (p, q) = (−0.1, 1.1) and
rectified, so that it takes the values 0 and 1 themselves with some probability, and has a gradient in between.
`HardConcrete` (arXiv 1712.01312) and `Plain` (a number that is rounded at the end, as in arXiv 2410.10819) are what it
is compared with. All have the methods of `Gates`; parameters are arrays of the gates' shape, float32, and are to be put
through `project` after every step of an optimiser: outside of their bounds nothing is promised.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32

from lychee_jax.attention.head_map import highest_roles

type GateParams = dict[str, jax.Array]

STRETCH = (-0.1, 1.1)
EDGE = 1e-6
"""Uniform draws stay this far from 0 and 1: nearer, float32 has no steps left."""
_LOWEST, _HIGHEST = 1e-6, 100.0  # of α and β
_CONCRETE_TEMPERATURE = 2.0 / 3.0
_HIGHEST_LOGIT = 10.0
# Gates start at E[z] = 1/2, which in float32 comes out a rounding above it: that must not make heads retrieve.
_MORE_THAN_HALF = 0.5 + 1e-6

# Where the stretched variable is 0 and 1, on the scale of the variable itself.
_AT_ZERO = -STRETCH[0] / (STRETCH[1] - STRETCH[0])
_AT_ONE = (1.0 - STRETCH[0]) / (STRETCH[1] - STRETCH[0])
# Gauss-Legendre on [0, 1], the nodes on the scale of the variable itself. The survival functions are smooth there, as
# their singular points 0 and 1 lie outside of what [0, 1] is stretched from; at 48 points float32 sees no error.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(48)
_NODES = _AT_ZERO + (_AT_ONE - _AT_ZERO) * 0.5 * (_NODES + 1.0)
_WEIGHTS = 0.5 * _WEIGHTS


class Gates(Protocol):
    """A family of distributions of gates."""

    def initial(self, shape: tuple[int, ...]) -> GateParams:
        """Parameters to start from."""
        ...

    def project(self, params: GateParams) -> GateParams:
        """The nearest parameters that are allowed."""
        ...

    def sample(self, params: GateParams, uniform: jax.Array) -> jax.Array:
        """Gates in [0, 1] from uniform draws; differentiable in the parameters. Leading axes of draws broadcast."""
        ...

    def nonzero(self, params: GateParams) -> jax.Array:
        """P(z ≠ 0), the gate's share of the expected L0 norm."""
        ...

    def expected(self, params: GateParams) -> jax.Array:
        """E[z]."""
        ...


@dataclasses.dataclass(frozen=True)
class HardKuma:
    """z = min(1, max(0, p + (q − p)·s)), s ~ Kumaraswamy(α, β), F(s) = 1 − (1 − s^α)^β.

    Parameters `alpha` and `beta`, in [1e-6, 100], start at 1: s is uniform, E[z] = 1/2, P(z ≠ 0) = 11/12.
    """

    def initial(self, shape: tuple[int, ...]) -> GateParams:
        """α = β = 1."""
        return {"alpha": jnp.ones(shape, jnp.float32), "beta": jnp.ones(shape, jnp.float32)}

    def project(self, params: GateParams) -> GateParams:
        """Clip to [1e-6, 100]."""
        return {name: jnp.clip(value, _LOWEST, _HIGHEST) for name, value in params.items()}

    def sample(self, params: GateParams, uniform: Float32[Array, "..."]) -> Float32[Array, "..."]:
        """Stretched and rectified s = (1 − (1 − u)^{1/β})^{1/α}."""
        # In logarithms: the powers themselves under- and overflow, and their gradients become NaN. A small α divides
        # what is left of the inner logarithm, so it must be exact near 0 too.
        minus_log = -jnp.log1p(-_inside(uniform)) / params["beta"]
        return _rectified(jnp.exp(jax.nn.log1mexp(minus_log) / params["alpha"]))

    def zero(self, params: GateParams) -> Float32[Array, "..."]:
        """P(z = 0) = F(−p / (q − p)); exact also where it is tiny and 1 − P(z ≠ 0) is rounding alone."""
        return -jnp.expm1(_kuma_log_survival(params, _AT_ZERO))

    def nonzero(self, params: GateParams) -> Float32[Array, "..."]:
        """1 − F(−p / (q − p))."""
        return _kuma_survival(params, _AT_ZERO)

    def one(self, params: GateParams) -> Float32[Array, "..."]:
        """P(z = 1) = 1 − F((1 − p) / (q − p))."""
        return _kuma_survival(params, _AT_ONE)

    def expected(self, params: GateParams) -> Float32[Array, "..."]:
        """E[z] = ∫₀¹ (1 − F((t − p) / (q − p))) dt, of the stretched and rectified variable, by quadrature."""
        return _mean(_kuma_survival, params)


@dataclasses.dataclass(frozen=True)
class HardConcrete:
    """z = min(1, max(0, p + (q − p)·s)), s = sigmoid((logit u + log α) / τ), τ = 2/3 (arXiv 1712.01312).

    The parameter `log_alpha`, in [−10, 10], starts at 0: E[z] = 1/2.
    """

    def initial(self, shape: tuple[int, ...]) -> GateParams:
        """Zeros: E[z] = 1/2."""
        return {"log_alpha": jnp.zeros(shape, jnp.float32)}

    def project(self, params: GateParams) -> GateParams:
        """Clip to [−10, 10]."""
        return {"log_alpha": jnp.clip(params["log_alpha"], -_HIGHEST_LOGIT, _HIGHEST_LOGIT)}

    def sample(self, params: GateParams, uniform: Float32[Array, "..."]) -> Float32[Array, "..."]:
        """A stretched and rectified binary concrete variable."""
        u = _inside(uniform)
        logit = jnp.log(u) - jnp.log1p(-u)
        return _rectified(jax.nn.sigmoid((logit + params["log_alpha"]) / _CONCRETE_TEMPERATURE))

    def nonzero(self, params: GateParams) -> Float32[Array, "..."]:
        """P(s > −p / (q − p)) = sigmoid(log α − τ·log(−p / q))."""
        return _concrete_survival(params, _AT_ZERO)

    def expected(self, params: GateParams) -> Float32[Array, "..."]:
        """E[z] = ∫₀¹ P(z > t) dt, by quadrature."""
        return _mean(_concrete_survival, params)


@dataclasses.dataclass(frozen=True)
class Plain:
    """A number in [0, 1] that is optimised as it is and rounded at the end; its L1 norm stands for the L0 norm.

    The parameter `value` starts at 1 (arXiv 2410.10819).
    """

    def initial(self, shape: tuple[int, ...]) -> GateParams:
        """All heads read the whole cache."""
        return {"value": jnp.ones(shape, jnp.float32)}

    def project(self, params: GateParams) -> GateParams:
        """Clip to [0, 1]."""
        return {"value": jnp.clip(params["value"], 0.0, 1.0)}

    def sample(self, params: GateParams, uniform: Float32[Array, "..."]) -> Float32[Array, "..."]:
        """The number itself, whatever was drawn."""
        return jnp.broadcast_to(params["value"], uniform.shape)

    def nonzero(self, params: GateParams) -> Float32[Array, "..."]:
        """The number itself."""
        return params["value"]

    def expected(self, params: GateParams) -> Float32[Array, "..."]:
        """The number itself."""
        return params["value"]


FAMILIES: dict[str, Gates] = {"hardkuma": HardKuma(), "hardconcrete": HardConcrete(), "plain": Plain()}


def with_first_layer(gates: Float32[Array, "*lead above K"]) -> Float32[Array, "*lead L K"]:
    """Gates of all layers: layer 0 has none, all of its heads retrieve."""
    first = jnp.ones((*gates.shape[:-2], 1, gates.shape[-1]), gates.dtype)
    return jnp.concatenate([first, gates], axis=-2)


def harden(expected: Float32[np.ndarray, "L K"], count: int | None = None) -> Bool[np.ndarray, "L K"]:
    """Which heads retrieve: all of layer 0, and those with E[z] > 1/2 or, with `count`, the highest until so many.

    Ties go to the lower layer, then to the lower head. What stands in row 0 does not matter.

    Raises:
        UserError: fewer than layer 0 has, or more than there are.
    """
    if count is not None:
        return highest_roles(expected, count)
    roles = expected > _MORE_THAN_HALF
    roles[0] = True
    return roles


def _inside(uniform: jax.Array) -> jax.Array:
    return jnp.clip(uniform, EDGE, 1.0 - EDGE)


def _rectified(s: jax.Array) -> jax.Array:
    return jnp.clip(STRETCH[0] + (STRETCH[1] - STRETCH[0]) * s, 0.0, 1.0)


def _kuma_survival(params: GateParams, x: float | np.ndarray) -> jax.Array:
    """P(s > x) = (1 − x^α)^β."""
    return jnp.exp(_kuma_log_survival(params, x))


def _kuma_log_survival(params: GateParams, x: float | np.ndarray) -> jax.Array:
    """The logarithm of P(s > x)."""
    return params["beta"] * jax.nn.log1mexp(params["alpha"] * _constant(-np.log(x)))


def _concrete_survival(params: GateParams, x: float | np.ndarray) -> jax.Array:
    """P(s > x)."""
    return jax.nn.sigmoid(params["log_alpha"] - _constant(_CONCRETE_TEMPERATURE * (np.log(x) - np.log1p(-x))))


def _constant(value: float | np.ndarray) -> jax.Array:
    return jnp.asarray(value, jnp.float32)


def _mean(survival: Callable[[GateParams, np.ndarray], jax.Array], params: GateParams) -> jax.Array:
    """E[z] = ∫₀¹ P(z > t) dt, from P(s > x) of the variable before it is stretched."""
    # The nodes come last, a multiple of every vector width: each gate is then worked out by the same instructions, and
    # equal gates tie to the last bit. And no matrix product, which an accelerator would round to fewer bits.
    spread = {name: value[..., None] for name, value in params.items()}
    return jnp.sum(survival(spread, _NODES) * _constant(_WEIGHTS), axis=-1)
