"""The generators: sizes, marks, uniqueness, determinism; and that text and tokens of their language are one."""

import operator
import re

import jax.numpy as jnp
import numpy as np
import pytest

from lychee_jax.data import facts as data
from lychee_jax.data import language
from lychee_jax.data.language import BOS, EOS
from lychee_jax.training.loop import answer_losses, prefetch


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_every_piece_is_one_token_and_the_vocabulary_is_full():
    strings = [piece for piece in language.PIECES if piece]
    assert len(language.PIECES) == language.VOCAB_SIZE
    assert len(set(strings)) == len(strings)
    for piece in language.PIECES[language.FIRST_WORD :]:
        assert language.split(piece) == [piece]
        assert language.tokens_of(piece) == [language.TOKEN_OF[piece]]


def test_no_word_is_a_variable_name():
    assert not [piece for piece in language.PIECES if re.search(r"[A-Z]{4}", piece)]


@pytest.mark.parametrize("length", [512, 1024, 4096])
def test_documents_have_exactly_their_length_and_marked_answers(length: int):
    for seed in range(20):
        example = data.documents(rng(seed), length, (1, 8), 8)
        assert example.tokens.shape == example.answers.shape == (length,)
        assert example.tokens[0] == BOS
        assert example.tokens.min() >= 0
        assert example.tokens.max() < language.VOCAB_SIZE
        marks = example.answers.max()
        assert 1 <= marks <= 8
        ends = [np.flatnonzero(example.answers == i)[-1] for i in range(1, marks + 1)]
        assert all(example.tokens[end] == EOS for end in ends)
        assert (example.tokens == EOS).sum() == marks
        assert ends[-1] == length - 1


@pytest.mark.parametrize("kind", ["passkey", "long-passkey", "lookup"])
def test_answers_stand_in_the_document_under_their_key(kind: str):
    for seed in range(20):
        prompt = data.prompt(rng(seed), kind, 1024, 8)
        statement = language.text_of(prompt.tokens[slice(*prompt.needle)])
        assert f" {prompt.answer}." in statement
        named = re.findall(r" (?:of|for|to|up) (\w+ \w+|\w+)(?:[?.]| say\?)", prompt.text[-120:])
        key = named[-1].removesuffix(" say")
        assert len(re.findall(rf" {key}\b", statement)) == 1, (statement, key)


def test_a_variable_is_answered_by_the_way_to_its_number():
    for seed in range(20):
        prompt = data.prompt(rng(seed), "variable", 1024, 8)
        *names, value = prompt.answer.split(" = ")
        assert re.fullmatch(r"[1-9]\d{4}", value)
        assert names[0] in prompt.text.splitlines()[-2] + prompt.text.splitlines()[-1]
        for name, target in zip(names, [*names[1:], value], strict=True):
            assert f"{name} = {target}." in prompt.text


def test_keys_of_a_document_are_distinct_and_numbers_do_not_begin_with_zero():
    for seed in range(10):
        facts = data.passkeys(rng(seed), 32)
        assert len({tuple(fact.key) for fact in facts}) == 32
        for fact in facts:
            assert re.fullmatch(r" [1-9]\d{4,6}", language.text_of(fact.answer))


def test_prose_is_never_the_same_and_has_paragraphs():
    texts = [data.prompt(rng(seed), "only-passkey", 1024, 1).text for seed in range(4)]
    assert len(set(texts)) == 4
    assert all("\n" in text.rsplit("\n", 3)[0] for text in texts)
    assert all(not text.startswith(" ") for text in texts)


def test_a_segment_comes_back():
    for seed in range(20):
        example = data.copying(rng(seed), 160)
        again = np.flatnonzero(example.answers)
        segment = example.tokens[again[0] - 1 : again[-1] + 1]
        first = next(i for i in range(160) if np.array_equal(example.tokens[i : i + 48], segment))
        assert first + 48 <= again[0] - 1


def test_too_little_room_is_said():
    with pytest.raises(ValueError, match="do not fit into 256 tokens"):
        data.prompt(rng(0), "passkey", 256, 16)
    with pytest.raises(ValueError, match="do not fit into 200 tokens"):
        data.documents(rng(0), 200, (16, 16), 1)


def test_prefetched_batches_are_those_made_here():
    assert list(prefetch(operator.neg, range(5), 2)) == list(prefetch(operator.neg, range(5), 0)) == [0, -1, -2, -3, -4]


def test_answer_losses_count_whole_answers():
    tokens = jnp.array([[1, 5, 6, 7, 8, 9]])
    answers = jnp.array([[0, 0, 1, 1, 0, 2]])
    logits = np.zeros((1, 6, 16), np.float32)
    for position, guess in enumerate([5, 6, 3, 8, 9]):  # the second token of the first answer is wrong
        logits[0, position, guess] = 9.0
    metrics = {name: float(value) for name, value in answer_losses(jnp.asarray(logits), tokens, answers, 4).items()}
    assert metrics["exact"] == pytest.approx(1 / 2)
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    right = np.log(np.exp(9.0) + 15) - 9.0
    assert metrics["answer_loss"] == pytest.approx((2 * right + right + 9.0) / 3, rel=1e-3)
    assert metrics["prose_loss"] == pytest.approx(right, rel=1e-3)


@pytest.mark.parametrize("kind", ["passkey", "long-passkey", "only-passkey", "lookup"])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_what_is_asked_for_stands_at_its_depth(kind: str, depth: float):
    prompt = data.prompt(rng(5), kind, 2000, 6, depth=depth)
    first, end = prompt.needle
    assert len(prompt.tokens) == 2000
    assert prompt.answer in language.text_of(prompt.tokens[first:end])
    # Other facts lie before it or behind it, and sentences end where they end.
    assert abs(first - depth * (2000 - 50)) < 6 * 50


def test_a_depth_outside_the_text_is_refused():
    with pytest.raises(ValueError, match=r"depth 1\.5 is not between 0 and 1"):
        data.prompt(rng(0), "passkey", 900, 4, depth=1.5)
