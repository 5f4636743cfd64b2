"""Head maps whose layers several devices share evenly."""

import itertools

import numpy as np
import pytest

from lychee_jax.attention.head_map import even_roles, highest_roles
from lychee_jax.errors import UserError


def allowed(sizes: tuple[int, ...], kv_heads: int, devices: int) -> bool:
    return sum(size % devices != 0 and size != kv_heads for size in sizes) <= 1


def best_sum(scores: np.ndarray, count: int, devices: int) -> float:
    """By trying every number of heads of every layer."""
    layers, kv_heads = scores.shape
    ranked = -np.sort(-scores[1:], axis=1)
    return max(
        sum(ranked[layer, :size].sum() for layer, size in enumerate(sizes))
        for sizes in itertools.product(range(kv_heads + 1), repeat=layers - 1)
        if sum(sizes) == count - kv_heads and allowed(sizes, kv_heads, devices)
    )


@pytest.mark.parametrize(("kv_heads", "devices"), [(4, 2), (4, 4), (5, 2), (3, 4)])
def test_no_even_map_has_higher_scores(kv_heads: int, devices: int) -> None:
    for seed in range(3):
        scores = np.random.default_rng(seed).random((5, kv_heads)).astype(np.float32)
        for count in range(kv_heads, 5 * kv_heads + 1):
            roles = even_roles(scores, count, devices)
            assert roles.sum() == count
            assert roles[0].all()
            assert allowed(tuple(roles[1:].sum(axis=1).tolist()), kv_heads, devices)
            assert scores[1:][roles[1:]].sum() == pytest.approx(best_sum(scores, count, devices), abs=1e-5)


def test_for_one_device_they_are_the_highest() -> None:
    scores = np.random.default_rng(0).random((6, 8)).astype(np.float32)
    for count in (8, 9, 20, 48):
        assert (even_roles(scores, count, 1) == highest_roles(scores, count)).all()
    for count in (7, 49):
        with pytest.raises(UserError, match=f"{count} retrieval heads"):
            even_roles(scores, count, 2)
