"""Heads of a ranking and its best entries, against sorting in float64: ties, infinities, borders."""

import jax
import numpy as np
import pytest

from lychee_jax.engine import ranking

SIZE = 37
head, best = jax.jit(ranking.head), jax.jit(ranking.best, static_argnums=1)


def ranked(values: np.ndarray) -> np.ndarray:
    """Indices by value, descending, equal ones by index."""
    return np.lexsort((np.arange(len(values)), -values))


def shortest_head(values: np.ndarray, weights: np.ndarray, least: float) -> np.ndarray:
    order = ranked(values)
    sums = np.cumsum(weights[order].astype(np.float64))
    count = int(np.searchsorted(sums, least)) + 1
    kept = np.zeros(len(values), bool)
    kept[order[:count]] = True
    return kept


def rows() -> np.ndarray:
    rng = np.random.default_rng(0)
    values = rng.normal(0, 3, (10, SIZE)).astype(np.float32)
    values[1] = np.round(values[1])  # many ties
    values[2] = 0.0
    values[3] = -np.inf
    values[4, rng.permutation(SIZE)[:30]] = -np.inf
    values[5] = np.where(rng.random(SIZE) < 0.5, -0.0, 0.0)  # all equal
    values[6] = -(values[6] ** 2) * 1e-42  # subnormal
    values[7] = np.arange(SIZE)
    values[8] = -np.arange(SIZE)
    values[9, :3] = 3e38, -3e38, 3e38
    return values


@pytest.mark.parametrize("count", [1, 2, 5, 20, SIZE - 1, SIZE, 1000, np.inf])
def test_heads_of_so_many_entries(count: float) -> None:
    values, ones = rows(), np.ones((10, SIZE), np.float32)
    found = np.asarray(head(values, ones, np.full(10, count, np.float32)))
    for row, kept in zip(np.delete(values, 6, 0), np.delete(found, 6, 0), strict=True):
        np.testing.assert_array_equal(kept, shortest_head(row, ones[0], count))
    assert found[6].sum() == min(count, SIZE), "subnormal numbers may all count as 0, or not"


@pytest.mark.parametrize("share", [1e-30, 0.01, 0.37, 0.5, 0.93, 0.999])
def test_heads_of_a_probability_mass(share: float) -> None:
    values = np.delete(rows(), [3, 6, 9], 0)
    weights = np.exp(values - values.max(axis=1, keepdims=True))
    least = (share * weights.sum(axis=1, dtype=np.float64)).astype(np.float32)
    found = np.asarray(head(values, weights, least))
    for row, own, kept, bound in zip(values, weights, found, least, strict=True):
        np.testing.assert_array_equal(kept, shortest_head(row, own, float(bound)))


def test_each_row_has_a_bound_of_its_own() -> None:
    values = rows()[[0, 1, 2]]
    found = head(values, np.ones_like(values), np.asarray([3, 7, np.inf], np.float32))
    assert np.asarray(found).sum(axis=1).tolist() == [3, 7, SIZE]


def test_a_mass_within_rounding_of_the_bound_moves_the_head_by_an_entry_at_most() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(0, 1, (2, 5000)).astype(np.float32)
    weights = np.exp(values)
    order = ranked(values[0])
    least = np.cumsum(weights[0][order].astype(np.float64))[2499]  # exactly 2,500 entries
    found = np.asarray(head(values, weights, np.full(2, least, np.float32)))[0]
    assert abs(int(found.sum()) - 2500) <= 1
    assert found[order[:2499]].all()


@pytest.mark.parametrize("count", [1, 20, SIZE])
def test_the_best_entries_are_in_the_order_of_their_rank(count: int) -> None:
    values = np.delete(rows(), 6, 0)
    found, ids = best(values, count)
    for row, numbers, places in zip(values, np.asarray(found), np.asarray(ids), strict=True):
        assert places.tolist() == ranked(row)[:count].tolist()
        np.testing.assert_array_equal(numbers, row[places])
