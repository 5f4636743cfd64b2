"""Small models of random shapes against the float64 oracle: seeded, so that a failure comes again."""

import numpy as np
import pytest

from lychee_jax.attention.selection import SelectionPolicy
from tests.support import oracle
from tests.support.hybrid_models import NEW, Case, make_model, run


def random_case(seed: int) -> Case:
    """Heads, roles, pages, policy and prompts drawn at random; layer 0 retrieves, as it must."""
    rng = np.random.default_rng(seed)
    kv_heads, layers = int(rng.integers(1, 5)), int(rng.integers(2, 5))
    every = tuple(range(kv_heads))
    above = [tuple(head for head in every if rng.random() < 0.4) for _ in range(layers - 1)]
    page_size = int(rng.choice([4, 8, 16]))
    budget, sink = int(rng.integers(2, 5)), int(rng.integers(0, 2))
    policy = SelectionPolicy(
        budget * page_size, sink * page_size, page_size,
        rule=("budget", "ratio", "top_p")[int(rng.integers(3))], ratio=0.5, top_p=0.8,
    )  # fmt: skip
    lengths = tuple(int(length) for length in rng.integers(1, 46, int(rng.integers(1, 5))))
    return Case(
        f"fuzz {seed}", kv_heads, int(rng.integers(1, 5)), int(rng.choice([8, 16])), (every, *above), page_size, policy,
        lengths, qwen3=bool(rng.integers(2)), seed=seed,
    )  # fmt: skip


@pytest.mark.parametrize("seed", [101, 102, 103])
def test_random_models_decode_as_the_oracle_does(seed: int) -> None:
    """Rows in which rounding may decide a page or a token are left out; most are none of those."""
    case = random_case(seed)
    model, weights = make_model(case)
    result = run(model, case.prompts, case.options())
    judge = oracle.Oracle(weights, case.config, case.page_size)
    compared = 0
    for row, prompt in enumerate(case.prompts):
        want = judge.generate(prompt, NEW, retrieval=case.retrieval, rule=case.rule)
        if want.lead > 1e-3 and want.margin > 5e-5:
            assert result.tokens[row] == want.tokens
            np.testing.assert_allclose(result.logprobs[row], want.logprobs, atol=2e-4)
            compared += 1
    assert 2 * compared >= len(case.prompts)
