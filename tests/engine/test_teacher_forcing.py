"""Given tokens through the decode path: the same as generating them, and as reading them densely."""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from lychee_jax.engine.teacher_forcing import feed

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.config import ModelConfig
from lychee_jax.engine.engine import Engine
from lychee_jax.engine.options import GenerateOptions
from lychee_jax.engine.outputs import Prefilled, Result
from lychee_jax.errors import UserError
from lychee_jax.models.decoder import Decoder

CONFIG = ModelConfig("llama", 64, 32, 48, 3, 4, 2, 16, 4096)
HEADS = HeadMap(3, 2, ((0, 1), (1,), ()))
HYBRID = GenerateOptions(
    "hybrid", HEADS, SelectionPolicy(budget=32, sink=8, recent=8), page_size=8, max_new_tokens=20, ignore_eos=True
)
DENSE = dataclasses.replace(HYBRID, attention="dense")


@pytest.fixture(scope="module")
def engine():
    return Engine(Decoder(CONFIG, rngs=nnx.Rngs(0)))


@pytest.fixture
def prompts():
    rng = np.random.default_rng()
    return [rng.integers(64, size=length).tolist() for length in (77, 40, 129)]


def follow(engine: Engine, filled: Prefilled, options: GenerateOptions, *, keep: bool = False) -> Result:
    stream = engine.decode(filled, options, keep=keep)
    for _ in stream:
        pass
    return stream.result()


@pytest.mark.parametrize("correct_every", [0, 5])
@pytest.mark.parametrize("options", [HYBRID, DENSE], ids=["hybrid", "dense"])
def test_feeding_what_was_generated_gives_what_generating_gave(engine, prompts, options, correct_every):
    options = dataclasses.replace(options, correct_every=correct_every)
    filled = engine.prefill(prompts, max_new_tokens=20, page_size=8)
    made = follow(engine, filled, options, keep=True)
    fed = feed(engine, filled, made.tokens, options)
    np.testing.assert_allclose(fed.logprobs, made.logprobs, rtol=1e-5, atol=1e-5)
    assert all(all(row) for row in fed.greedy)
    # Generating never feeds its last token, and feeding does; all others read the same pages.
    assert fed.pages_held >= fed.pages_read > 0
    if options is DENSE:
        assert fed.pages_read == fed.pages_held
    else:
        assert fed.pages_read / fed.pages_held == pytest.approx(made.attention["kv_read_share"], rel=0.02)


def test_decoding_goes_on_where_feeding_ended_in_every_row(engine, prompts):
    lasts = [13, 0, 8]
    begun = [row[: len(row) - last] for row, last in zip(prompts, lasts, strict=True)]
    rest = [row[len(row) - last :] for row, last in zip(prompts, lasts, strict=True)]
    expected = follow(engine, engine.prefill(prompts, max_new_tokens=20, page_size=8), DENSE)
    filled = engine.prefill(begun, max_new_tokens=40, page_size=8)
    fed = feed(engine, filled, rest, DENSE, keep=True)
    assert [len(row) for row in fed.logprobs] == lasts
    found = follow(engine, fed.filled, DENSE)
    assert fed.filled.prompts == prompts
    assert found.tokens == expected.tokens
    np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=1e-4, atol=1e-5)
    again = follow(engine, feed(engine, filled, rest, DENSE).filled, DENSE)
    assert again.tokens == expected.tokens


def test_a_token_that_greedy_decoding_would_not_choose_is_told(engine, prompts):
    filled = engine.prefill(prompts, max_new_tokens=20, page_size=8)
    made = follow(engine, filled, HYBRID, keep=True)
    changed = [list(row) for row in made.tokens]
    for row, place in enumerate((0, 7, 19)):
        changed[row][place] = (changed[row][place] + 1) % 64
    fed = feed(engine, filled, changed, HYBRID)
    for row, place in enumerate((0, 7, 19)):
        assert fed.greedy[row][: place + 1] == [True] * place + [False]


def test_a_row_comes_out_the_same_alone_and_in_company(engine, prompts):
    rng = np.random.default_rng()
    rows = [rng.integers(64, size=length).tolist() for length in (17, 3, 9)]
    together = feed(engine, engine.prefill(prompts, max_new_tokens=17, page_size=8), rows, HYBRID)
    for index, row in enumerate(rows):
        alone = feed(engine, engine.prefill([prompts[index]], max_new_tokens=17, page_size=8), [row], HYBRID)
        np.testing.assert_allclose(alone.logprobs[0], together.logprobs[index], rtol=1e-6, atol=1e-6)


def test_auto_takes_each_row_its_own_way(engine):
    """One row is short enough for dense steps all along, the other is hybrid all along."""
    rng = np.random.default_rng()
    prompts = [rng.integers(64, size=length).tolist() for length in (100, 1500)]
    rows = [rng.integers(64, size=16).tolist() for _ in prompts]
    filled = engine.prefill(prompts, max_new_tokens=16, page_size=8)
    auto, hybrid, dense = (
        feed(engine, filled, rows, dataclasses.replace(HYBRID, attention=mode), keep=True)
        for mode in ("auto", "hybrid", "dense")
    )
    np.testing.assert_allclose(auto.logprobs[0], dense.logprobs[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(auto.logprobs[1], hybrid.logprobs[1], rtol=1e-6, atol=1e-6)
    assert hybrid.pages_read < auto.pages_read < dense.pages_read


def test_feeding_nothing_changes_nothing(engine, prompts):
    filled = engine.prefill(prompts, max_new_tokens=4, page_size=8)
    assert feed(engine, filled, [[], [], []], HYBRID).filled is filled


def test_bad_rows_are_refused(engine, prompts):
    filled = engine.prefill(prompts, max_new_tokens=4, page_size=8)
    with pytest.raises(UserError, match="3 prompts, but 1 rows"):
        feed(engine, filled, [[1]], HYBRID)
    with pytest.raises(UserError, match="room for 4 new tokens; 5"):
        feed(engine, filled, [[1] * 5, [], []], HYBRID)
    with pytest.raises(UserError, match="vocabulary has ids 0 to 63"):
        feed(engine, filled, [[64], [], []], HYBRID)
    feed(engine, filled, [[1], [], []], HYBRID)
    with pytest.raises(UserError, match="prefill again"):
        feed(engine, filled, [[1], [], []], HYBRID)
