"""Hybrid decoding of whole models against the float64 oracle, and the invariants that hold exactly.

Every cache is poisoned between prefill and decoding: NaN in all slots that no prompt token fills, in the pages that no
row owns and in the scratch pages, garbage in the unused entries of the page table.
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
from lychee_jax.engine import engine as generate
from lychee_jax.engine.engine import Engine
from lychee_jax.engine.options import AttentionMode, GenerateOptions
from lychee_jax.engine.outputs import Result
from tests.support import oracle
from tests.support.hybrid_models import BUDGET, NEW, VOCAB, Case, make_model

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
    """These programs are large and run for milliseconds; the ops alone are tested as they are compiled for users.

    Prompts go in page by page, so that those of any length share one program.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(generate._CHUNK_TOKENS, jax.default_backend(), 1)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


def poison(prefilled: generate.Prefilled) -> generate.Prefilled:
    """NaN wherever no prompt token was written; garbage in the page table where no row owns a page."""
    assert prefilled.pools is not None
    table, size = np.array(prefilled.page_table), prefilled.page_size
    filled = np.zeros((prefilled.pools[0].num_pages, size), bool)
    for row, prompt in enumerate(prefilled.prompts):
        for j in range(len(prompt)):
            filled[table[row, j // size], j % size] = True
        table[row, oracle.page_count(len(prompt) + prefilled.capacity, size) :] = 2**30 + row
    keep = jnp.asarray(filled)[:, None, :, None]
    prefilled.pools = jax.tree.map(lambda data: jnp.where(keep, data, jnp.asarray(np.nan, data.dtype)), prefilled.pools)
    prefilled.page_table = jnp.asarray(table)
    return prefilled


def run(engine: Engine, prompts: list[list[int]], options: GenerateOptions) -> Result:
    prefilled = engine.prefill(prompts, max_new_tokens=options.max_new_tokens, page_size=options.page_size)
    stream = engine.decode(poison(prefilled), options)
    for _ in stream:
        pass
    return stream.result()


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
    engine, _ = make_model(BUDGET)
    dense = run(engine, BUDGET.prompts, BUDGET.options("dense"))
    every = run(engine, BUDGET.prompts, BUDGET.options(heads=HeadMap.all(BUDGET.config)))
    assert_same(every, dense)
    assert dense.attention["kv_read_share"] == every.attention["kv_read_share"] == 1.0
    assert_is(dense, expected(BUDGET, hybrid=False))


def test_a_budget_that_holds_everything_is_dense() -> None:
    """16 pages, and no row grows beyond 11."""
    engine, _ = make_model(BUDGET)
    wide = run(engine, BUDGET.prompts, BUDGET.options(policy=SelectionPolicy(64, 4, 4)))
    assert_same(wide, run(engine, BUDGET.prompts, BUDGET.options("dense")))
    assert wide.attention["kv_read_share"] == 1.0


def test_bfloat16_follows_the_oracle() -> None:
    """Weights, activations and cache of one dtype; the oracle goes along the engine's own tokens."""
    engine, weights = make_model(BUDGET, "bfloat16")
    prefilled = engine.prefill(BUDGET.prompts, max_new_tokens=NEW, page_size=BUDGET.page_size)
    assert prefilled.pools is not None
    assert {pool.data.dtype for pool in prefilled.pools} == {engine.dtype} == {jnp.dtype("bfloat16")}
    result = run(engine, BUDGET.prompts, BUDGET.options())
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


@pytest.mark.parametrize(
    ("attention", "chunk"),
    [("hybrid", 512), ("dense", 512), ("auto", 512), ("hybrid", 4)],
    ids=["hybrid", "dense", "auto", "hybrid after many chunks, the first one shared"],
)
def test_a_row_of_a_ragged_batch_equals_the_same_prompt_alone(
    attention: AttentionMode, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last token, also where `auto` has some rows dense and others not, and where rows end early by eos."""
    monkeypatch.setitem(generate._DENSE_BELOW, jax.default_backend(), 30)
    monkeypatch.setitem(generate._CHUNK_TOKENS, jax.default_backend(), chunk)
    engine, _ = make_model(BUDGET)
    options = BUDGET.options(attention)
    alone = [run(engine, [prompt], options) for prompt in together()]
    batch = run(engine, together(), options)
    for row, result in enumerate(alone):
        assert batch.tokens[row] == result.tokens[0]
        # Chunks of another shape add up in another order.
        np.testing.assert_allclose(batch.logprobs[row], result.logprobs[0], atol=1e-4)
    eos = (batch.tokens[0][3], batch.tokens[2][9])
    ended = run(engine, together(), dataclasses.replace(options, eos_ids=eos))
    for row, tokens in enumerate(batch.tokens):
        stop = next((i for i, token in enumerate(tokens) if token in eos), NEW - 1)
        assert ended.tokens[row] == tokens[: stop + 1]
        np.testing.assert_allclose(ended.logprobs[row], batch.logprobs[row][: stop + 1], atol=1e-6)
    assert {len(tokens) for tokens in ended.tokens} != {NEW}
    ignored = run(engine, together(), dataclasses.replace(options, eos_ids=eos, ignore_eos=True))
    assert ignored.tokens == batch.tokens


def test_a_prompt_that_is_the_beginning_of_another_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole chunks are shared, but never all of a row: each needs the hidden state of its own last token."""
    monkeypatch.setitem(generate._CHUNK_TOKENS, jax.default_backend(), 4)
    engine, _ = make_model(BUDGET)
    prompt = together()[-1]
    batch = engine.prefill([prompt[:28], prompt], max_new_tokens=NEW, page_size=4).last
    for row, length in enumerate((28, 32)):
        alone = engine.prefill([prompt[:length]], max_new_tokens=NEW, page_size=4).last
        np.testing.assert_allclose(batch[row], alone[0], atol=1e-4)


def test_auto_goes_from_dense_to_hybrid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the measured length it is dense, from there on hybrid: its ends are the two other modes."""
    engine, _ = make_model(BUDGET)
    results = {}
    for below in (0, 30, 10**6):
        monkeypatch.setitem(generate._DENSE_BELOW, jax.default_backend(), below)
        results[below] = run(engine, together(), BUDGET.options("auto"))
    assert_same(results[0], run(engine, together(), BUDGET.options("hybrid")))
    assert_same(results[10**6], run(engine, together(), BUDGET.options("dense")))
    shares = [result.attention["kv_read_share"] for result in results.values()]
    assert shares[0] < shares[1] < shares[2] == 1.0
