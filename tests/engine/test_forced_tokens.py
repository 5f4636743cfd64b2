"""Forced tokens go through the decode path: the same as generating them, and as reading them densely."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.config import ModelConfig
from lychee_jax.engine.options import GenerateOptions
from lychee_jax.engine.sampling_params import SamplingParams
from lychee_jax.errors import UserError
from lychee_jax.llm import LLM
from lychee_jax.models.decoder import Decoder
from tests.support.hybrid_models import small_chunks

CONFIG = ModelConfig("llama", 64, 32, 48, 3, 4, 2, 16, 4096)
HEADS = HeadMap(3, 2, ((0, 1), (1,), ()))
HYBRID = GenerateOptions(
    "hybrid", HEADS, SelectionPolicy(budget=32, sink=8, recent=8), page_size=8, max_new_tokens=20, ignore_eos=True
)
DENSE = dataclasses.replace(HYBRID, attention="dense")


@pytest.fixture(scope="module")
def model():
    config = small_chunks(64, dense_below=200)
    return LLM(Path("tiny"), CONFIG, Decoder(CONFIG, rngs=nnx.Rngs(0)), None, (), engine_config=config)


@pytest.fixture
def prompts():
    rng = np.random.default_rng()
    return [rng.integers(64, size=length).tolist() for length in (77, 40, 129)]


@pytest.mark.parametrize("correct_every", [0, 5])
@pytest.mark.parametrize("options", [HYBRID, DENSE], ids=["hybrid", "dense"])
def test_forcing_what_was_generated_gives_what_generating_gave(model, prompts, options, correct_every):
    options = dataclasses.replace(options, correct_every=correct_every)
    made = model.generate_tokens(prompts, options)
    fed = model.generate_tokens(prompts, options, forced=made.tokens)
    assert (fed.tokens, fed.logprobs) == (made.tokens, made.logprobs)
    assert (fed.pages_read, fed.pages_held) == (made.pages_read, made.pages_held)
    assert [len(row) for row in fed.greedy] == [20, 20, 20]
    assert all(all(row) for row in fed.greedy)
    for read, held in zip(fed.pages_read, fed.pages_held, strict=True):
        assert (read == held) == (options.attention == "dense")


def test_decoding_goes_on_where_forced_tokens_end_in_every_row(model, prompts):
    lasts = [13, 0, 8]
    begun = [row[: len(row) - last] for row, last in zip(prompts, lasts, strict=True)]
    rest = [row[len(row) - last :] for row, last in zip(prompts, lasts, strict=True)]
    expected = model.generate_tokens(prompts, DENSE)
    found = model.generate_tokens(begun, DENSE, forced=rest, limits=[last + 20 for last in lasts])
    for row, last in enumerate(lasts):
        assert found.tokens[row] == [*rest[row], *expected.tokens[row]]
        np.testing.assert_allclose(found.logprobs[row][last:], expected.logprobs[row], rtol=1e-4, atol=1e-5)


def test_what_is_sampled_after_forced_tokens_is_what_it_would_have_been(model, prompts):
    options = dataclasses.replace(HYBRID, sampling=SamplingParams(1.5, repetition_penalty=1.3, seed=4))
    made = model.generate_tokens(prompts, options)
    fed = model.generate_tokens(prompts, options, forced=[row[:7] for row in made.tokens])
    assert (fed.tokens, fed.logprobs) == (made.tokens, made.logprobs)


def test_a_token_that_greedy_decoding_would_not_choose_is_told(model, prompts):
    changed = [list(row) for row in model.generate_tokens(prompts, HYBRID).tokens]
    for row, place in enumerate((0, 7, 19)):
        changed[row][place] = (changed[row][place] + 1) % 64
    fed = model.generate_tokens(prompts, HYBRID, forced=changed)
    for row, place in enumerate((0, 7, 19)):
        assert fed.greedy[row][: place + 1] == [True] * place + [False]


def test_a_row_comes_out_the_same_alone_and_in_company(model, prompts):
    rng = np.random.default_rng()
    rows = [rng.integers(64, size=length).tolist() for length in (17, 3, 9)]
    limits = [len(row) for row in rows]
    together = model.generate_tokens(prompts, HYBRID, forced=rows, limits=limits)
    for index, row in enumerate(rows):
        alone = model.generate_tokens([prompts[index]], HYBRID, forced=[row], limits=[len(row)])
        np.testing.assert_allclose(alone.logprobs[0], together.logprobs[index], rtol=1e-6, atol=1e-6)
        assert alone.pages_read[0] == together.pages_read[index]


def test_auto_takes_each_row_its_own_way(model):
    """One row is short enough for dense steps all along, the other is hybrid all along."""
    rng = np.random.default_rng()
    prompts = [rng.integers(64, size=length).tolist() for length in (100, 220)]
    rows = [rng.integers(64, size=16).tolist() for _ in prompts]
    auto, hybrid, dense = (
        model.generate_tokens(prompts, dataclasses.replace(HYBRID, attention=mode), forced=rows, limits=[16, 16])
        for mode in ("auto", "hybrid", "dense")
    )
    np.testing.assert_allclose(auto.logprobs[0], dense.logprobs[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(auto.logprobs[1], hybrid.logprobs[1], rtol=1e-6, atol=1e-6)
    assert auto.pages_read == [dense.pages_read[0], hybrid.pages_read[1]]
    assert sum(hybrid.pages_read) < sum(auto.pages_read) < sum(dense.pages_read)


def test_an_eos_ends_a_row_only_after_the_forced_tokens(model, prompts):
    options = dataclasses.replace(DENSE, ignore_eos=False, eos_ids=(5,))
    tokens = model.generate_tokens(prompts[:1], DENSE, forced=[[1, 5, 2]]).tokens[0]
    found = model.generate_tokens(prompts[:1], options, forced=[[1, 5, 2]])
    assert tokens[:3] == [1, 5, 2]
    assert found.tokens[0] == (tokens[: tokens.index(5, 3) + 1] if 5 in tokens[3:] else tokens)
    ended = dataclasses.replace(options, eos_ids=(tokens[3],))
    found = model.generate_tokens(prompts[:1], ended, forced=[[1, 5, 2]])
    assert (found.tokens[0], found.finish_reason) == (tokens[:4], ["stop"])


def test_bad_rows_are_refused(model, prompts):
    with pytest.raises(UserError, match="3 prompts, but 1 rows"):
        model.generate_tokens(prompts, HYBRID, forced=[[1]])
    with pytest.raises(UserError, match="3 prompts, but 2 limits"):
        model.generate_tokens(prompts, HYBRID, limits=[1, 2])
    with pytest.raises(UserError, match="5 tokens are forced, more than the 4 new ones"):
        model.generate_tokens(prompts, HYBRID, forced=[[1] * 5, [], []], limits=[4, 4, 4])
    with pytest.raises(UserError, match="vocabulary has ids 0 to 63"):
        model.generate_tokens(prompts, HYBRID, forced=[[64], [], []])
