"""A decode step over the cache: rows that are dense beside hybrid ones, and the provider that finds pages."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from lychee_jax.attention.decode import Decode
from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.provider import FullScan
from lychee_jax.attention.selection import SelectionPolicy
from pallas_kernels import KVPages

PAGE, KV_HEADS, HEAD_DIM, ROWS, PAGES, LAYERS = 4, 3, 8, 4, 6, 2
HEADS = HeadMap(LAYERS, KV_HEADS, ((0, 1, 2), (1,)))
POLICY = SelectionPolicy(budget=8, sink=4, recent=4)
USED = np.array([6, 6, 2, 0])  # pages of every row; the last one is not active


def attend(**options: Any) -> tuple[np.ndarray, np.ndarray]:
    """The output of the last layer `[B, K, G, H]` and the pages that all layers read."""
    rng = np.random.default_rng(0)
    shape = (ROWS * PAGES + ROWS, KV_HEADS, PAGE, 2 * HEAD_DIM)
    pools = tuple(KVPages(jnp.asarray(rng.standard_normal(shape), jnp.float32)) for _ in range(LAYERS))
    table = jnp.arange(ROWS * PAGES, dtype=jnp.int32).reshape(ROWS, PAGES)
    positions, active = jnp.array([23, 20, 5, 9], jnp.int32), jnp.array([True, True, True, False])
    arguments: dict[str, Any] = {"head_map": HEADS, "policy": POLICY, "implementation": "xla"} | options
    backend = Decode(table, positions, active, **arguments)
    state, out = backend.start(pools), jnp.zeros(())
    for index in range(LAYERS):
        q = jnp.asarray(3 * rng.standard_normal((ROWS, 1, KV_HEADS, 2, HEAD_DIM)), jnp.float32)
        k, v = jnp.asarray(rng.standard_normal((2, ROWS, 1, KV_HEADS, HEAD_DIM)), jnp.float32)
        out, state = backend(index, q, k, v, state)
    return np.asarray(out)[:, 0], np.asarray(state.pages_read)


def test_dense_rows_beside_hybrid_ones() -> None:
    dense, dense_read = attend(head_map=None)
    hybrid, hybrid_read = attend()
    np.testing.assert_array_equal(dense_read, LAYERS * KV_HEADS * USED)
    np.testing.assert_array_equal(hybrid_read, KV_HEADS * USED + USED + 2 * np.minimum(USED, 2))
    assert np.abs(dense - hybrid)[:2].max() > 0.1, "the budget is too large to be seen"
    flags = np.array([True, False, True, True])
    mixed, read = attend(dense=jnp.asarray(flags))
    np.testing.assert_allclose(mixed, np.where(flags[:, None, None, None], dense, hybrid), atol=1e-6)
    np.testing.assert_array_equal(read, np.where(flags, dense_read, hybrid_read))
    np.testing.assert_array_equal(mixed[3], 0.0)


@dataclasses.dataclass(frozen=True)
class Counting:
    """The full scan, and a note of the layers that asked for it."""

    layers: list[int]

    def __call__(self, index: int, *args: Any, **options: Any) -> Any:
        self.layers.append(index)
        return FullScan()(index, *args, **options)


def test_pages_are_found_by_the_provider() -> None:
    layers: list[int] = []
    found, read = attend(provider=Counting(layers))
    assert layers == [0, 1]
    expected, expected_read = attend()
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(read, expected_read)
