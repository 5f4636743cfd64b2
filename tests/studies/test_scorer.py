"""Answers that are scored all at once get the verdict of the engine that writes them token by token."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.config import ModelConfig
from lychee_jax.data import language
from lychee_jax.engine.options import GenerateOptions
from lychee_jax.errors import UserError
from lychee_jax.llm import LLM
from lychee_jax.loading import load
from lychee_jax.models.decoder import Decoder
from lychee_jax.studies.head_maps.maps import roles_of
from lychee_jax.studies.head_maps.prompts import HELD_OUT, prompts
from lychee_jax.studies.scorer import Memory, ProgramKey, Scorer

CONFIG = ModelConfig("llama", 64, 32, 48, 3, 4, 2, 16, 512)
HEADS = HeadMap(3, 2, ((0, 1), (1,), ()))
ROWS, LENGTH, ANSWER = 6, 90, 7
PROMPTS = np.random.default_rng(3).integers(64, size=(ROWS, LENGTH))
POLICIES = [
    (SelectionPolicy(16, 4, 4), 4),
    (SelectionPolicy(96, 0, 8, rule="ratio", ratio=0.3, page_score="mass"), 8),
    (SelectionPolicy(96, 2, 3, rule="top_p", top_p=0.7), 1),
]


@pytest.fixture(scope="module")
def model() -> Decoder:
    decoder = Decoder(CONFIG, rngs=nnx.Rngs(0))
    # Larger weights than a fresh model's: attention must be peaked, or no page would matter.
    graph, state = nnx.split(decoder)
    return nnx.merge(graph, jax.tree.map(lambda x: 8.0 * x if x.ndim > 1 else x, state))


@pytest.fixture(scope="module")
def llm(model: Decoder) -> LLM:
    return LLM(Path("tiny"), CONFIG, model, None, ())


@pytest.fixture(scope="module")
def scorer(model: Decoder):
    scorer = Scorer(CONFIG, model)
    yield scorer
    scorer.close()


@pytest.fixture(scope="module")
def memory(scorer: Scorer) -> Memory:
    return scorer.read(PROMPTS, ANSWER)


def written(llm: LLM, policy: SelectionPolicy, page_size: int, heads: HeadMap = HEADS) -> tuple[np.ndarray, float]:
    """What the engine answers, and the share of the cache that it reads."""
    options = GenerateOptions("hybrid", heads, policy, page_size, ANSWER, ignore_eos=True)
    result = llm.generate_tokens(PROMPTS.tolist(), options)
    return np.asarray(result.tokens, np.int32), result.attention["kv_read_share"]


@pytest.mark.parametrize(("policy", "page_size"), POLICIES, ids=lambda value: getattr(value, "rule", str(value)))
def test_what_the_engine_writes_is_right_and_nothing_else(llm: LLM, scorer: Scorer, memory, policy, page_size):
    answers, share = written(llm, policy, page_size)
    roles = roles_of(HEADS)
    verdict = scorer.score(memory, answers, roles, policy, page_size)
    assert verdict.right.all()
    read = verdict.sparse_read + roles.sum() * verdict.held
    assert read / (roles.size * verdict.held) == pytest.approx(share)
    assert 0 < verdict.sparse_read < (~roles).sum() * verdict.held

    dense, _ = written(llm, policy, page_size, HeadMap.all(CONFIG))
    same = (dense == answers).all(axis=1)
    assert not same.all(), "the policy changes no answer, so that this test would see nothing"
    assert scorer.score(memory, dense, roles, policy, page_size).right.tolist() == same.tolist()
    every = np.ones_like(roles)
    assert scorer.score(memory, dense, every, policy, page_size).right.all()
    assert scorer.score(memory, answers, every, policy, page_size).right.tolist() == same.tolist()


def test_every_token_counts_the_first_and_the_last_too(llm: LLM, scorer: Scorer, memory: Memory):
    answers, _ = written(llm, *POLICIES[0])
    for place in range(ANSWER):
        changed = answers.copy()
        changed[2, place] = (changed[2, place] + 1) % 64
        verdict = scorer.score(memory, changed, roles_of(HEADS), *POLICIES[0])
        assert verdict.right.tolist() == [row != 2 for row in range(ROWS)]


def test_padding_neither_counts_nor_is_read(llm: LLM, scorer: Scorer, memory: Memory):
    answers, _ = written(llm, *POLICIES[0])
    short = answers.copy()
    short[1, 3:], short[2:] = -1, -1
    whole, verdict = (scorer.score(memory, each, roles_of(HEADS), *POLICIES[0]) for each in (answers, short))
    assert verdict.right[:2].all()
    np.testing.assert_allclose(verdict.losses[0], whole.losses[0], rtol=1e-6)
    # Row 0 feeds all of its tokens but the last, row 1 two, the others none; 91 and 92 tokens fill 23 pages of 4.
    assert verdict.held == (2 * 23 + 4 * 24) + 2 * 23
    assert verdict.held < whole.held
    assert verdict.sparse_read == 3 * 4 * (6 + 2), "three sparse heads read four pages a step"


def test_masses_are_those_by_which_pages_are_picked(scorer: Scorer, memory: Memory):
    """What is picked in layer 0, by the rule that looks at shares of mass, follows from the masses that are told."""
    roles = roles_of(HeadMap.none(CONFIG))
    answers = np.random.default_rng(7).integers(64, size=(ROWS, ANSWER)).astype(np.int32)
    policy = SelectionPolicy(104, 0, 0, rule="threshold", threshold=0.05)
    first = next(iter(scorer.masses(memory, answers, roles, policy, 8)))
    assert first.shape == (ROWS, 2, ANSWER - 1, 12)
    shares = np.exp(first) / np.exp(first).sum(axis=-1, keepdims=True)
    picked = int((shares >= 0.05).sum())
    assert 0 < picked < shares.size
    # Every sparse head of the two layers above reads them.
    assert scorer.score(memory, answers, roles, policy, 8).sparse_read == 2 * picked


def test_programs_are_compiled_ahead_and_once(scorer: Scorer, memory: Memory, monkeypatch):
    policy = SelectionPolicy(20, 4, 4)
    compiled = []
    compile_one = scorer._compile
    monkeypatch.setattr(scorer, "_compile", lambda kind: compiled.append(kind) or compile_one(kind))
    scorer.prepare([ProgramKey(ROWS, LENGTH, ANSWER, policy, 4)] * 2)
    for _ in range(2):
        scorer.score(memory, np.zeros((ROWS, ANSWER), np.int32), roles_of(HEADS), policy, 4)
    assert compiled == [ProgramKey(ROWS, LENGTH, ANSWER, policy, 4)]


def test_bad_shapes_are_refused(scorer: Scorer, memory: Memory):
    with pytest.raises(ValueError, match=r"answers \(6, 5\) for 6 prompts with room for 6 tokens"):
        scorer.score(memory, np.zeros((ROWS, 5), np.int32), roles_of(HEADS), *POLICIES[0])
    with pytest.raises(UserError, match="exceed the model's limit, 512"):
        scorer.read(np.zeros((1, 506), np.int32), ANSWER)


@pytest.fixture(scope="module")
def bundled() -> LLM:
    return load(dtype="float32")


@pytest.mark.slow
def test_the_bundled_model_is_judged_as_it_answers(bundled: LLM):
    """A map like a learned one and few pages: some answers are right, some are not, and both ways agree on each."""
    heads = dataclasses.replace(HeadMap.none(bundled.config), retrieval=((0, 1, 2, 3), (), (1, 2, 3), *[()] * 4, (1,)))
    policy, rows = SelectionPolicy(256, 64, 64), 8
    tokens, answers = prompts(HELD_OUT, "passkey", 704, range(rows))
    scorer = Scorer(bundled.config, bundled.model)
    verdict = scorer.score(scorer.read(tokens, answers.shape[1]), answers, roles_of(heads), policy, 64)
    scorer.close()
    options = GenerateOptions("hybrid", heads, policy, 64, 9, eos_ids=bundled.eos_ids)
    made = bundled.generate_tokens(tokens.tolist(), options).tokens
    right = [row == answer[answer >= 0].tolist() for row, answer in zip(made, answers, strict=True)]
    assert all(answer[answer >= 0][-1] == language.EOS for answer in answers)
    assert verdict.right.tolist() == right
    assert 0 < sum(right) < rows
