"""`select_pages` against the oracle: many ragged rows at once, scores full of ties, garbage past every row's pages."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import pallas_kernels as ops
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.errors import UserError
from pallas_kernels import SelectionSpec
from tests.support import oracle
from tests.support.paged_caches import spec_of

PAGE_SIZE = 4
CAPACITY = 12


def select(scores: Any, lengths: Any, rule: oracle.Rule, page_size: int = PAGE_SIZE) -> tuple[np.ndarray, np.ndarray]:
    call = functools.partial(ops.select_pages, spec=spec_of(rule), page_size=page_size, implementation="xla")
    with ops.recorded() as used:
        pages, counts = jax.jit(call)(jnp.asarray(scores, jnp.float32), jnp.asarray(lengths, jnp.int32))
    assert used == [("select_pages", "xla")]
    return np.asarray(pages), np.asarray(counts)


def check(scores: np.ndarray, lengths: np.ndarray, rule: oracle.Rule, margin: float = -1.0) -> None:
    """Every row of `scores [B, R, P]` must hold the oracle's pages, in order, padded with −1 and counted."""
    pages, counts = select(scores, lengths, rule)
    assert pages.shape == (*scores.shape[:2], rule.budget)
    for b, r in np.ndindex(*scores.shape[:2]):
        P = oracle.page_count(int(lengths[b]), PAGE_SIZE)
        picked = oracle.pick(scores[b, r, :P].astype(np.float64), rule)
        assert picked.margin > margin, "another seed: this one decides by rounding"
        want = [*picked.pages, *[-1] * (rule.budget - len(picked.pages))]
        assert pages[b, r].tolist() == want, (b, r, P, scores[b, r, :P])
        assert counts[b, r] == len(picked.pages)


def ragged(rng: np.random.Generator, draw: Any, rows: int = 40, heads: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Scores drawn by `draw(shape)` for rows of every length from 0 up to the capacity; past a row's pages anything."""
    lengths = rng.permutation(np.linspace(0, CAPACITY * PAGE_SIZE, rows).round().astype(np.int32))
    scores = draw((rows, heads, CAPACITY)).astype(np.float32)
    for b, length in enumerate(lengths):
        P = oracle.page_count(int(length), PAGE_SIZE)
        scores[b, :, P:] = rng.choice([np.nan, np.inf, -np.inf, 1e30, 0.0], (heads, CAPACITY - P))
    return scores, lengths


@pytest.mark.parametrize(
    ("budget", "sink", "recent"),
    [
        (1, 0, 0),
        (1, 1, 0),
        (1, 0, 1),
        (4, 0, 0),
        (4, 1, 2),
        (5, 2, 3),  # the forced pages fill the budget
        (8, 3, 0),
        (CAPACITY, 1, 1),
        (CAPACITY + 3, 2, 2),  # wider than any row
    ],
)
def test_budget_rule_with_ties(budget: int, sink: int, recent: int) -> None:
    """Few distinct scores, so that most choices are ties: −0.0 and 0.0 tie too, and the lower page wins."""
    rng = np.random.default_rng(budget)
    values = np.array([-1e20, -2.5, -0.0, 0.0, 0.0, 7.0, 1e20])
    check(*ragged(rng, lambda shape: rng.choice(values, shape)), oracle.Rule(budget, sink, recent))


def test_distinct_scores() -> None:
    rng = np.random.default_rng(3)
    check(*ragged(rng, lambda shape: 50 * rng.standard_normal(shape)), oracle.Rule(5, 1, 1), margin=0.0)


def test_equal_scores_take_the_lowest_pages() -> None:
    scores = np.zeros((1, 2, CAPACITY), np.float32)
    scores[0, 1, ::2] = -0.0
    pages, counts = select(scores, [CAPACITY * PAGE_SIZE], oracle.Rule(4, 0, 1))
    assert pages[0].tolist() == [[0, 1, 2, CAPACITY - 1]] * 2
    assert counts[0].tolist() == [4, 4]


@pytest.mark.parametrize("amount", [0.07, 0.3333, 1.0])
def test_ratio_rule(amount: float) -> None:
    rng = np.random.default_rng(0)
    check(*ragged(rng, rng.standard_normal), oracle.Rule(7, 1, 1, "ratio", amount), margin=0.0)


@pytest.mark.parametrize(("amount", "pages", "count"), [(0.07, 100, 7), (0.29, 100, 29), (0.12501, 40, 6)])
def test_ratio_rule_counts_in_decimals(amount: float, pages: int, count: int) -> None:
    """⌈0.07 · 100⌉ is 7, though the nearest binary numbers multiply to a little more; ⌈5.0004⌉ is 6."""
    _, counts = select(np.zeros((1, 1, pages)), [pages], oracle.Rule(pages, 0, 0, "ratio", amount), page_size=1)
    assert counts.item() == count


@pytest.mark.parametrize("name", ["top_p", "threshold"])
@pytest.mark.parametrize(
    ("budget", "sink", "recent", "amount"), [(8, 1, 1, 0.01), (3, 0, 0, 0.5), (CAPACITY, 0, 2, 0.9), (8, 1, 1, 0.99)]
)
def test_rules_of_attention_mass(name: str, budget: int, sink: int, recent: int, amount: float) -> None:
    rng = np.random.default_rng(1)
    amount = amount if name == "top_p" else amount / 3
    scores, lengths = ragged(rng, lambda shape: 2 * rng.standard_normal(shape))
    check(scores, lengths, oracle.Rule(budget, sink, recent, name, amount), margin=1e-5)


def test_mass_rules_see_large_scores_and_whole_mass() -> None:
    """Log-sum-exps in the hundreds must not overflow; all the mass means all pages that have any, under the cap."""
    rng = np.random.default_rng(2)
    scores, lengths = ragged(rng, lambda shape: 300 + rng.standard_normal(shape))
    check(scores, lengths, oracle.Rule(CAPACITY, 1, 1, "top_p", 0.7), margin=1e-5)
    _, counts = select(scores, lengths, oracle.Rule(6, 1, 1, "top_p", 1.0))
    np.testing.assert_array_equal(counts, np.broadcast_to(np.minimum(-(-lengths // PAGE_SIZE), 6)[:, None], (40, 3)))


def test_forced_rule() -> None:
    rng = np.random.default_rng(4)
    for rule in (oracle.Rule(6, 2, 3, "forced"), oracle.Rule(6, 0, 0, "forced")):
        check(*ragged(rng, rng.standard_normal), rule)


def test_tokens_become_pages_by_rounding_up() -> None:
    policy = SelectionPolicy(budget=64, sink=17, recent=1)
    policy.validate(16)
    assert policy.spec(16) == SelectionSpec(4, 2, 1)
    assert SelectionPolicy(budget=64, sink=0, recent=0).spec(64) == SelectionSpec(1, 0, 0)
    assert SelectionPolicy(64, 0, 0, "top_p", top_p=0.5).spec(16) == SelectionSpec(4, 0, 0, "top_p", 0.5, "lse")


@pytest.mark.parametrize(("name", "score"), [("max", "max"), ("lse", "lse"), ("mass", "lse")])
def test_page_scores_and_their_other_name(name: Any, score: str) -> None:
    assert SelectionPolicy(page_score=name).spec(64).page_score == score


@pytest.mark.parametrize(
    ("numbers", "page_size"),
    [
        ({"budget": 0}, 4),
        ({"budget": -4}, 4),
        ({"budget": 6}, 4),
        ({"sink": -1}, 4),
        ({"recent": -1}, 4),
        ({"budget": 8, "sink": 5, "recent": 1}, 4),  # two pages and one
        ({"budget": 8}, 0),
        ({"rule": "best"}, 4),
        ({"page_score": "mean"}, 4),
        ({"rule": "ratio", "ratio": 0.0}, 4),
        ({"rule": "ratio", "ratio": 1.5}, 4),
        ({"rule": "top_p", "top_p": -0.1}, 4),
        ({"rule": "threshold", "threshold": math.nan}, 4),
    ],
    ids=str,
)
def test_policies_that_break_the_rule_are_refused(
    numbers: dict[str, Any], page_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a user has it: without the tests' import hook, only the policy's own checks stand.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    policy: dict[str, Any] = {"budget": 16, "sink": 0, "recent": 0}
    with pytest.raises(UserError):
        SelectionPolicy(**policy | numbers).validate(page_size)


def test_forced_pages_may_fill_the_budget() -> None:
    SelectionPolicy(budget=12, sink=5, recent=4).validate(4)
