"""The gated way to attend: `z · full + (1 − z) · sparse`, every query position treated as the decode step there."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lychee_jax.attention.backend import Full
from lychee_jax.attention.gated import Gated
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.models.rope import rotary_tables
from tests.support import oracle
from tests.support.hybrid_models import BUDGET, make_model

T, K, G, H, PAGE = 22, 3, 2, 8, 4
LAYERS = 3
SCALE = H**-0.5
POLICY = SelectionPolicy(3 * PAGE, PAGE, PAGE)


@functools.cache
def qkv(layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys and values of two sequences, peaked enough that pages differ."""
    rng = np.random.default_rng(layer)
    q, k, v = (rng.standard_normal((2, T, *heads, H), np.float32) for heads in ((K, G), (K,), (K,)))
    return 2 * q, k, v


def whole(z: jax.Array, policy: SelectionPolicy, rows: int, length: int, *, page: int = PAGE, block: int = 8) -> Gated:
    """The way for whole sequences of which every position is decoded by `z [L, K]`."""
    return Gated(
        jnp.broadcast_to(z, (rows, *z.shape)), jnp.zeros(rows, jnp.int32), jnp.ones((rows, length), bool), policy, page,
        query_block=block,
    )  # fmt: skip


@functools.cache
def program(policy: SelectionPolicy) -> Any:
    """All layers, compiled once for every z: `(z, inputs) → [(out, mask)]`. The last block of queries is a part."""

    @jax.jit
    def layers(z: jax.Array, inputs: Any) -> list[tuple[jax.Array, jax.Array]]:
        backend, state, results = whole(z, policy, 2, T), None, []
        for index, (q, k, v) in enumerate(inputs):
            out, state = backend(index, q, k, v, state)
            results.append((out, state))
        return results

    return layers


def gated(z: Any, policy: SelectionPolicy = POLICY) -> list[tuple[np.ndarray, np.ndarray]]:
    """Output `[B, T, K, G, H]` and handed-up mask `[B, K, T, P]` of every layer, each fed its own `qkv`."""
    inputs = [tuple(jnp.asarray(x) for x in qkv(layer)) for layer in range(LAYERS)]
    results = program(policy)(jnp.broadcast_to(jnp.asarray(z, jnp.float32), (LAYERS, K)), inputs)
    return [(np.asarray(out), np.asarray(mask)) for out, mask in results]


def judged(z: np.ndarray, rule: oracle.Rule) -> tuple[list[np.ndarray], list[dict[tuple[int, int, int], list[int]]]]:
    """The same by the oracle, one decode step for every position of every sequence."""
    outs, handed = [], []
    below: dict[tuple[int, int, int], list[int]] = {}
    for layer in range(LAYERS):
        q, k, v = (x.astype(np.float64) for x in qkv(layer))
        out, above = np.zeros(q.shape), {}
        for b, t, head in np.ndindex(2, T, K):
            keys, values = k[b, : t + 1, head], v[b, : t + 1, head]
            scores = oracle.page_scores(oracle.token_scores(q[b, t, head], keys, SCALE), PAGE, rule.page_score)
            picked = oracle.pick(scores, rule)
            assert picked.margin > 1e-5, "another seed: rounding may decide a page"
            share = 1.0 if layer == 0 else z[layer, head]
            above[b, t, head] = picked.pages if share > 0.5 else below[b, t, head]
            out[b, t, head] = share * oracle.attend(q[b, t, head], keys, values, SCALE)
            if share < 1.0:
                pages = below[b, t, head]
                out[b, t, head] += (1 - share) * oracle.attend_pages(q[b, t, head], keys, values, pages, PAGE, SCALE)
        outs.append(out)
        handed.append(above)
        below = above
    return outs, handed


@pytest.mark.parametrize(
    ("policy", "rule"),
    [
        (POLICY, oracle.Rule(3, 1, 1)),
        (SelectionPolicy(16, 0, 1, rule="top_p", top_p=0.6), oracle.Rule(4, 0, 1, "top_p", 0.6, "lse")),
        # Nothing is forced and few pages are worth it, so that some positions read nothing at all.
        (SelectionPolicy(16, 0, 0, rule="threshold", threshold=0.4), oracle.Rule(4, 0, 0, "threshold", 0.4, "lse")),
    ],
    ids=["budget", "top_p", "threshold"],
)
def test_gated_attention_is_the_oracles(policy: SelectionPolicy, rule: oracle.Rule) -> None:
    z = np.array([[0.3, 0.0, 1.0], [0.0, 1.0, 0.25], [0.0, 0.7, 0.5]])
    outs, handed = judged(z, rule)
    for layer, (out, mask) in enumerate(gated(z, policy)):
        np.testing.assert_allclose(out, outs[layer], atol=2e-5)
        for b, t, head in np.ndindex(2, T, K):
            assert np.flatnonzero(mask[b, head, t]).tolist() == handed[layer][b, t, head], (layer, b, t, head)


def test_z_mixes_two_ways_linearly() -> None:
    """z = 1 is dense attention, and any z lies on the line from the sparse output to it."""
    full, sparse, between = (gated([[1.0] * K, [z] * K, [z] * K]) for z in (1.0, 0.0, 0.3))
    q, k, v = (jnp.asarray(x) for x in qkv(LAYERS - 1))
    np.testing.assert_allclose(full[-1][0], jax.jit(Full(), static_argnums=0)(2, q, k, v, None)[0], atol=1e-5)
    for layer in range(LAYERS):
        mixed = 0.3 * full[layer][0] + 0.7 * sparse[layer][0]
        np.testing.assert_allclose(between[layer][0], mixed, atol=1e-5)
    assert np.abs(full[1][0] - sparse[1][0]).max() > 0.1


def test_the_gradient_of_z_is_full_minus_sparse() -> None:
    below = jnp.asarray(gated(1.0)[0][1])
    q, k, v = (jnp.asarray(x) for x in qkv(1))

    @jax.jit
    def total(z: jax.Array, q: jax.Array) -> jax.Array:
        out, _ = whole(jnp.broadcast_to(z, (LAYERS, K)), POLICY, 2, T)(1, q, k, v, below)
        return jnp.sum(out, axis=(0, 1, 3, 4))

    slope = jax.jit(jax.jacobian(total))(jnp.array([[0.2, 0.5, 0.9]]), q)[:, 0]
    ends = total(jnp.ones((1, K)), q) - total(jnp.zeros((1, K)), q)
    np.testing.assert_allclose(slope, np.diag(ends), atol=1e-3)


def test_hard_gates_are_hybrid_decoding() -> None:
    """With every z 0 or 1, position t of a sequence is what a decode step would compute there."""
    engine, weights = make_model(BUDGET)
    tokens = np.random.default_rng(9).integers(0, BUDGET.config.vocab_size, 30)
    z = np.zeros((len(BUDGET.retrieval), BUDGET.kv_heads), np.float32)
    for layer, heads in enumerate(BUDGET.retrieval):
        z[layer, list(heads)] = 1.0
    judge = oracle.Oracle(weights, BUDGET.config, BUDGET.page_size)
    roles: dict[str, Any] = {"retrieval": BUDGET.retrieval, "rule": BUDGET.rule}
    want = judge.generate([int(tokens[0])], len(tokens) - 1, feed=tokens[1:].tolist(), **roles)
    assert want.margin > 1e-4, "another seed: rounding may decide a page"

    @jax.jit
    def logprobs(tokens: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        model = engine.spec.merge(engine.weights)
        backend = whole(jnp.asarray(z), BUDGET.policy, 1, len(tokens[0]), page=BUDGET.page_size, block=128)
        hidden, _ = model(tokens, cos, sin, backend, None)
        return jax.nn.log_softmax(model.logits(hidden), axis=-1)

    positions = np.arange(len(tokens))[None]
    config = BUDGET.config
    angles = rotary_tables(config.rope, config.head_dim, config.max_position_embeddings, positions, positions + 1)
    got = np.asarray(logprobs(jnp.asarray(tokens[None], jnp.int32), *angles))[0]
    chosen = got[np.arange(len(tokens) - 1), tokens[1:]]
    np.testing.assert_allclose(chosen, want.logprobs, atol=2e-4)
