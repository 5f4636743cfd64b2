"""The bundled model: its size, its tokenizer, its head map, and that it answers fresh questions; how it is trained."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.config import ModelConfig
from lychee_jax.data import facts as data
from lychee_jax.data import language
from lychee_jax.engine.options import GenerateOptions
from lychee_jax.errors import UserError
from lychee_jax.evaluation.cases import Cell
from lychee_jax.evaluation.passkey import STYLE, Passkey, is_right
from lychee_jax.evaluation.runner import EvaluationPlan
from lychee_jax.evaluation.session import evaluate
from lychee_jax.evaluation.variants import variants_of
from lychee_jax.llm import LLM
from lychee_jax.loading import BUNDLED, load, save
from lychee_jax.models.spec import Functional
from lychee_jax.studies import pretrain, profile_heads
from lychee_jax.studies.bundled_tokenizer import save_tokenizer
from lychee_jax.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = Tokenizer.from_folder(BUNDLED)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def bundled() -> LLM:
    return load(dtype="float32")


def test_the_weights_are_small_and_of_the_shape_that_is_asked_for():
    config = ModelConfig.from_folder(BUNDLED)
    assert (BUNDLED / "model.safetensors").stat().st_size <= 16 * 2**20
    assert config == pretrain.CONFIG
    assert config.max_tokens >= 32768 + 64


def test_the_head_map_belongs_to_the_model():
    head_map = HeadMap.load(BUNDLED / "heads.json", ModelConfig.from_folder(BUNDLED))
    assert not head_map.is_dense
    assert json.loads(head_map.meta)["fingerprint"] == pretrain.CONFIG.fingerprint()


def test_the_shipped_tokenizer_is_the_one_that_is_made(tmp_path: Path):
    save_tokenizer(tmp_path, pretrain.CONFIG.max_position_embeddings)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((BUNDLED / name).read_text())


@given(st.text())
@settings(deadline=None, max_examples=100)
def test_any_text_comes_back(text: str):
    tokens = _shipped().encode(text)
    assert tokens[0] == language.BOS
    assert max(tokens) < language.VOCAB_SIZE
    assert _shipped().decode(tokens) == text


def _shipped() -> Tokenizer:
    """Hypothesis calls a test many times and takes no module fixtures."""
    if not _SHIPPED:
        found = Tokenizer.from_folder(BUNDLED)
        assert found is not None
        _SHIPPED.append(found)
    return _SHIPPED[0]


_SHIPPED: list[Tokenizer] = []


@pytest.mark.parametrize("kind", data.KINDS)
def test_generated_tokens_are_the_tokenizers(tokenizer: Tokenizer, kind: str):
    for seed in range(20):
        prompt = data.prompt(np.random.default_rng(seed), kind, 900, 8)
        assert len(prompt.tokens) == 900
        assert tokenizer.encode(prompt.text) == prompt.tokens
        assert tokenizer.encode(f"{prompt.text} {prompt.answer}") == [
            *prompt.tokens,
            *language.tokens_of(f" {prompt.answer}"),
        ]


def test_training_text_is_the_tokenizers(tokenizer: Tokenizer):
    for seed in range(20):
        tokens = data.documents(np.random.default_rng(seed), 1024, (1, 16), 16).tokens
        assert tokenizer.encode(language.text_of(tokens[1:])) == tokens.tolist()


def test_a_chat_is_the_trained_form(tokenizer: Tokenizer):
    text = "The passkey of amber falcon is 48213.\nQuestion: What is the passkey of amber falcon?"
    assert tokenizer.encode_messages(text) == tokenizer.encode(text + "\nAnswer:")


def test_it_answers_fresh_questions_in_text_and_hybrid_decoding_does_too(bundled: LLM, tmp_path: Path):
    assert bundled.tokenizer is not None
    task = Passkey(bundled.tokenizer, facts=10, seed=1, max_new_tokens=12)
    options = GenerateOptions(heads=bundled.heads, eos_ids=bundled.eos_ids)
    plan = EvaluationPlan([Cell(task, 1024, 4)], variants_of(["dense", "hybrid"], ["512"]), options, batch=4)
    report = evaluate(bundled, STYLE, plan, tmp_path, {})
    assert [result.variant for result in report.results] == ["dense", "hybrid@512"]
    assert all(result.score >= 0.75 for result in report.results), report.markdown()
    assert report.results[1].kv_read_share < 0.8


def test_an_answer_ends_by_itself(bundled: LLM):
    prompt = data.prompt(np.random.default_rng(2), "variable", 1024, 6)
    found = bundled.generate(prompt.text, max_new_tokens=48)
    assert found.tokens[0][-1] == language.EOS
    assert found.text == [f" {prompt.answer}"]


def test_what_counts_as_right():
    assert is_right(" 48213.\nQuestion: and", "48213")
    assert is_right("48213", "48213")
    assert not is_right(" 482134", "48213")
    assert not is_right("The passkey is 48213", "48213")


def test_bad_tasks_are_refused(tokenizer: Tokenizer):
    with pytest.raises(UserError, match="use some of passkey"):
        Passkey(tokenizer, "passkeys")
    with pytest.raises(UserError, match="at least 1 must be hidden"):
        Passkey(tokenizer, facts=0)
    with pytest.raises(UserError, match="do not fit into 300 tokens"):
        Passkey(tokenizer, facts=40).case(300, None, 0)
    with pytest.raises(UserError, match="none of them can be put at a depth"):
        Passkey(tokenizer, "variable").case(2048, 0.5, 0)


TINY = pretrain.PretrainingPlan(
    config=dataclasses.replace(
        pretrain.CONFIG, num_layers=2, hidden_size=32, intermediate_size=48, num_heads=2, num_kv_heads=1, head_dim=16
    ),
    stages=(pretrain.Stage("copying", 128, 2, 3), pretrain.Stage("documents", 384, 2, 3, (1, 3), 3)),
    dtype="float32",
    warmup=2,
)


def test_a_resumed_training_gives_the_same_weights_to_the_bit(tmp_path: Path):
    whole = pretrain.pretrain(tmp_path / "whole", TINY, log_every=2)
    assert whole is not None
    assert pretrain.pretrain(tmp_path / "parts", TINY, log_every=2, minutes=0.0) is None
    resumed = pretrain.pretrain(tmp_path / "parts", TINY, log_every=2)
    assert resumed is not None
    for name, value in whole.items():
        assert np.array_equal(value, resumed[name]), name
    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 6]
    with pytest.raises(UserError, match="a run with other settings"):
        pretrain.pretrain(tmp_path / "parts", dataclasses.replace(TINY, seed=1))


def test_a_trained_model_is_saved_as_hugging_face_would_have_it(tmp_path: Path):
    params = Functional(TINY.config).initial(0, 0.5)
    save(tmp_path, TINY.config, params)
    save_tokenizer(tmp_path, TINY.config.max_position_embeddings)
    loaded = load(tmp_path)
    assert loaded.config == TINY.config
    assert loaded.tokenizer is not None


def test_elimination_keeps_the_heads_that_are_missed():
    config = dataclasses.replace(TINY.config, num_layers=3, num_kv_heads=2, num_heads=2)
    missed = {(1, 0): 0.5, (2, 1): 0.2, (1, 1): 0.001}

    def judge(roles: np.ndarray) -> tuple[float, float]:
        loss = 0.1 + sum(cost for place, cost in missed.items() if not roles[place])
        return loss, 1.0 - loss

    head_map, way = profile_heads.eliminate(judge, config, 0.01)
    assert head_map.retrieval == ((0, 1), (0,), (1,))
    assert [step["dropped"] for step in way] == [None, [2, 0], [1, 1], [2, 1], [1, 0]]
    head_map.check(config)


def test_roles_are_judged_as_hybrid_decoding_would_answer(bundled: LLM):
    """All heads retrieving gives the dense losses, whatever the budget; a few pages for all heads spoil them."""
    policy = SelectionPolicy(budget=512)
    judge = profile_heads.Judge(bundled.config, bundled.model, policy, length=640, samples=2, facts=2, seed=3)
    every = np.ones((bundled.config.num_layers, bundled.config.num_kv_heads), bool)
    dense, exact = judge(every)
    assert exact == 1.0
    assert dense < 0.01
    nobody = every.copy()
    nobody[1:] = False
    assert judge(nobody)[0] > 10 * dense
