"""Which KV heads lie on which device."""

import itertools

import numpy as np
import pytest

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.cli.main import main
from lychee_jax.parallel.balance import balanced, slowest


def least(roles: np.ndarray, devices: int) -> int:
    """By trying every order."""
    heads = roles.shape[1]
    return min(slowest(order, devices, roles) for order in itertools.permutations(range(heads)))


@pytest.mark.parametrize(("heads", "devices"), [(6, 2), (6, 3), (4, 4)])
@pytest.mark.parametrize("density", [0.1, 0.3, 0.6])
def test_no_order_is_better(heads: int, devices: int, density: float) -> None:
    for seed in range(3):
        roles = np.random.default_rng(seed).random((7, heads)) < density
        roles[0] = True
        places = balanced(heads, devices, roles)
        assert sorted(places) == list(range(heads))
        assert slowest(places, devices, roles) == least(roles, devices)


def test_a_layer_costs_what_its_slowest_device_has() -> None:
    roles = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0]], bool)
    assert slowest((0, 1, 2, 3), 2, roles) == 2 + 2 + 1
    assert slowest((0, 2, 1, 3), 2, roles) == 2 + 1 + 1
    assert balanced(4, 2, roles) == (0, 2, 1, 3)


@pytest.mark.parametrize(("heads", "devices"), [(3, 2), (8, 3), (2, 4), (10, 4), (8, 16), (1, 1)])
def test_every_head_has_a_place_whatever_does_not_divide(heads: int, devices: int) -> None:
    roles = np.random.default_rng(0).random((5, heads)) < 0.4
    for places in (balanced(heads, devices), balanced(heads, devices, roles)):
        share = -(-heads // devices)
        assert len(places) == share * devices
        assert sorted(head for head in places if head >= 0) == list(range(heads))
    assert balanced(heads, devices, roles) == balanced(heads, devices, roles)


def test_a_large_map_is_shared_out_quickly() -> None:
    """80 layers of 32 KV heads: much better than the model's order, close to what layers need at least."""
    roles = np.random.default_rng(0).random((80, 32)) < 0.125
    found, before = (slowest(places, 4, roles) for places in (balanced(32, 4, roles), balanced(32, 4)))
    assert -(-roles.sum(axis=1) // 4).sum() <= found < before


def test_heads_show_tells_the_balance(tmp_path, capsys) -> None:
    file = tmp_path / "heads.json"
    HeadMap(3, 4, ((0, 1, 2, 3), (0, 1), (1, 2)), "tiny").save(file)
    assert main(["heads", "show", str(file), "--tensor-parallel", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[4:] == [
        "2 devices: the one with most retrieval heads of a layer has 4 over all layers, 4 if every layer divided "
        "evenly, 5 in the model's order",
        "device  0  KV heads 0 2: 4 retrieve over all layers",
        "device  1  KV heads 1 3: 4 retrieve over all layers",
    ]
    assert main(["heads", "show", str(file), "--tensor-parallel-size", "8"]) == 0
    assert "device  7  KV heads none: 0 retrieve over all layers" in capsys.readouterr().out
    assert main(["heads", "show", str(file), "--tensor-parallel", "0"]) == 2
    assert capsys.readouterr().err == "error: --tensor-parallel is 0; it must be at least 1\n"
