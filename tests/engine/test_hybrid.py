"""Hybrid decoding of whole models against the float64 oracle, and the invariants that hold exactly.

Every cache holds NaN before a prompt is read: in the pages that no row owns, in those that only new tokens fill, and in
the scratch pages. Prompts go in page by page, so that those of any length share one program.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.config import RopeConfig
from lychee_jax.engine.options import AttentionMode
from lychee_jax.engine.outputs import Result
from lychee_jax.llm import engine_options
from tests.support import oracle
from tests.support.hybrid_models import BUDGET, NEW, VOCAB, Case, make_model, run, small_chunks

CASES = [
    BUDGET,
    Case(
        name="ratio of mass",
        kv_heads=2,
        group=4,
        head_dim=8,
        retrieval=((0, 1), (1,), ()),
        page_size=8,
        policy=SelectionPolicy(32, 0, 8, rule="ratio", ratio=0.4, page_score="mass"),
        lengths=(1, 15, 16, 17, 40),
        rope=RopeConfig("llama3", factor=8.0, original_max_position_embeddings=64),
    ),
    Case(
        name="top_p",
        kv_heads=4,
        group=1,
        head_dim=16,
        retrieval=((0, 1, 2, 3), (0, 2), (), (1,)),
        page_size=4,
        policy=SelectionPolicy(20, 4, 4, rule="top_p", top_p=0.8),
        lengths=(7, 19, 20, 31),
        seed=1,
    ),
    Case(
        name="threshold",
        kv_heads=2,
        group=7,
        head_dim=8,
        retrieval=((0, 1), (0,), (1,)),
        page_size=4,
        policy=SelectionPolicy(16, 0, 1, rule="threshold", threshold=0.07),
        lengths=(7, 16, 33),
        qwen3=True,
    ),
    Case(  # Two prompts are longer than the trained length, so that rows rotate by different bases.
        name="forced",
        kv_heads=3,
        group=2,
        head_dim=16,
        retrieval=((0, 1, 2), (2,), ()),
        page_size=16,
        policy=SelectionPolicy(48, 16, 1, rule="forced"),
        lengths=(15, 16, 47, 49),
        rope=RopeConfig("dynamic", factor=4.0, original_max_position_embeddings=24),
    ),
]
by_name = functools.partial(pytest.mark.parametrize, "case", ids=lambda case: case.name)


@pytest.fixture(autouse=True, scope="module")
def _compile_fast() -> Iterator[None]:
    """These programs are large and run for milliseconds; the ops alone are tested as they are compiled for users."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def assert_same(got: Result, want: Result, atol: float = 1e-5) -> None:
    """The same tokens, and logprobs that differ by rounding at most."""
    assert got.tokens == want.tokens
    for mine, other in zip(got.logprobs, want.logprobs, strict=True):
        np.testing.assert_allclose(mine, other, atol=atol)


@functools.cache
def expected(case: Case, hybrid: bool, correct_every: int = 0) -> list[oracle.Output]:
    """What the oracle says, row by row, about a case that rounding cannot decide."""
    judge = oracle.Oracle(make_model(case)[1], case.config, case.page_size)
    roles: dict[str, Any] = {"retrieval": case.retrieval, "rule": case.rule} if hybrid else {}
    outputs = [judge.generate(prompt, NEW, correct_every=correct_every, **roles) for prompt in case.prompts]
    assert min(output.lead for output in outputs) > 1e-3, "another seed: rounding may decide a token"
    assert min(output.margin for output in outputs) > 5e-5, "another seed: rounding may decide a page"
    return outputs


def assert_is(result: Result, outputs: list[oracle.Output]) -> None:
    """The oracle's tokens, its logprobs, and just as many pages read."""
    for row, output in enumerate(outputs):
        assert result.tokens[row] == output.tokens, row
        np.testing.assert_allclose(result.logprobs[row], output.logprobs, atol=2e-4)
    steps = [step for output in outputs for step in output.steps]
    share = sum(step.pages_read for step in steps) / sum(step.pages_dense for step in steps)
    assert result.attention["kv_read_share"] == pytest.approx(share, abs=1e-12)


@by_name(argvalues=CASES)
def test_hybrid_decoding_is_the_oracles(case: Case) -> None:
    result = run(make_model(case)[0], case.prompts, case.options())
    assert_is(result, expected(case, hybrid=True))


@by_name(argvalues=CASES)
def test_the_selection_matters_in_these_cases(case: Case) -> None:
    """Else the test above would pass for any selection."""
    hybrid, dense = expected(case, hybrid=True), expected(case, hybrid=False)
    assert any(a.tokens != b.tokens for a, b in zip(hybrid, dense, strict=True))
    assert max(abs(a.logprobs[1] - b.logprobs[1]) for a, b in zip(hybrid, dense, strict=True)) > 0.01
    assert all(a.tokens[0] == b.tokens[0] for a, b in zip(hybrid, dense, strict=True)), "the first comes from prefill"


def test_cache_correction_is_the_oracles() -> None:
    want = expected(BUDGET, hybrid=True, correct_every=5)
    plain = expected(BUDGET, hybrid=True)
    moved = [np.abs(np.subtract(a.logprobs, b.logprobs)) for a, b in zip(want, plain, strict=True)]
    assert np.max(moved) > 0.05, "another seed: the correction must matter"
    assert_is(run(make_model(BUDGET)[0], BUDGET.prompts, BUDGET.options(correct_every=5)), want)


def test_all_heads_retrieving_is_dense() -> None:
    model, _ = make_model(BUDGET)
    dense = run(model, BUDGET.prompts, BUDGET.options("dense"))
    every = run(model, BUDGET.prompts, BUDGET.options(heads=HeadMap.all(BUDGET.config)))
    assert_same(every, dense)
    assert dense.attention["kv_read_share"] == every.attention["kv_read_share"] == 1.0
    assert_is(dense, expected(BUDGET, hybrid=False))


def test_a_budget_that_holds_everything_is_dense() -> None:
    """16 pages, and no row grows beyond 11."""
    model, _ = make_model(BUDGET)
    wide = run(model, BUDGET.prompts, BUDGET.options(policy=SelectionPolicy(64, 4, 4)))
    assert_same(wide, run(model, BUDGET.prompts, BUDGET.options("dense")))
    assert wide.attention["kv_read_share"] == 1.0


def test_bfloat16_follows_the_oracle() -> None:
    """Weights, activations and cache of one dtype; the oracle goes along the engine's own tokens."""
    model, weights = make_model(BUDGET, "bfloat16")
    result = run(model, BUDGET.prompts, BUDGET.options())
    runner = model.engine(engine_options(model.engine_options, BUDGET.options())).runner
    assert runner is not None
    assert {pool.data.dtype for pool in runner.pools} == {model.dtype} == {jnp.dtype("bfloat16")}
    judge = oracle.Oracle(weights, BUDGET.config, BUDGET.page_size)

    def typical_error(**roles: Any) -> float:
        errors = []
        for row, prompt in enumerate(BUDGET.prompts):
            output = judge.generate(prompt, NEW, feed=result.tokens[row], **roles)
            errors.extend(np.abs(np.subtract(result.logprobs[row], output.logprobs)))
        # No maximum: a page that rounding picks differently may move a few tokens by any amount.
        return float(np.quantile(errors, 0.8))

    assert typical_error(retrieval=BUDGET.retrieval, rule=BUDGET.rule) < 0.1
    assert typical_error() > 0.3, "dense attention is something else here"


def together() -> list[list[int]]:
    """Rows around the border of a page that begin with the same page and a half."""
    rng = np.random.default_rng(5)
    common = rng.integers(0, VOCAB, 6).tolist()
    return [common + rng.integers(0, VOCAB, length - 6).tolist() for length in (27, 28, 29, 32)]


@pytest.mark.parametrize("attention", ["hybrid", "dense", "auto"])
def test_rows_end_by_eos_and_leave_the_others_alone(attention: AttentionMode) -> None:
    """Also where `auto` has some rows dense and others not."""
    model, _ = make_model(BUDGET, engine_config=small_chunks(4, dense_below=30))
    options = BUDGET.options(attention)
    batch = run(model, together(), options)
    eos = (batch.tokens[0][3], batch.tokens[2][9])
    ended = run(model, together(), dataclasses.replace(options, eos_ids=eos))
    for row, tokens in enumerate(batch.tokens):
        stop = next((i for i, token in enumerate(tokens) if token in eos), None)
        assert ended.finish_reason[row] == ("length" if stop is None else "stop")
        stop = NEW - 1 if stop is None else stop
        assert ended.tokens[row] == tokens[: stop + 1]
        np.testing.assert_allclose(ended.logprobs[row], batch.logprobs[row][: stop + 1], atol=1e-6)
    assert {len(tokens) for tokens in ended.tokens} != {NEW}
    ignored = run(model, together(), dataclasses.replace(options, eos_ids=eos, ignore_eos=True))
    assert ignored.tokens == batch.tokens
    assert set(ignored.finish_reason) == {"length"}


def test_a_prompt_that_is_the_beginning_of_another_is_read_to_its_end() -> None:
    """Whole chunks are shared, but never all of a row: each needs the hidden state of its own last token."""
    model, _ = make_model(BUDGET)
    prompt = together()[-1]
    options = BUDGET.options()
    alone = [run(model, [prompt[:length]], options) for length in (28, 32)]
    batch = run(model, [prompt[:28], prompt], options)
    assert batch.tokens == [alone[0].tokens[0], alone[1].tokens[0]]
    assert batch.logprobs == [alone[0].logprobs[0], alone[1].logprobs[0]]
    assert batch.cached_tokens == [0, 28]


def test_auto_goes_from_dense_to_hybrid() -> None:
    """Below the measured length it is dense, from there on hybrid: its ends are the two other modes."""
    results = {}
    for below in (0, 30, 10**6):
        model, _ = make_model(BUDGET, engine_config=small_chunks(4, dense_below=below))
        results[below] = run(model, together(), BUDGET.options("auto"))
    model, _ = make_model(BUDGET)
    assert_same(results[10**6], run(model, together(), BUDGET.options("dense")))
    assert_same(results[0], run(model, together(), BUDGET.options("auto")))
    shares = [result.attention["kv_read_share"] for result in results.values()]
    assert shares[0] < shares[1] < shares[2] == 1.0
