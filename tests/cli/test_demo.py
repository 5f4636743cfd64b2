"""The demo on a short document: what is hidden, what is asked, and that the bundled model finds it."""

import numpy as np
import pytest

from lychee_jax.cli import demo
from lychee_jax.data import language
from lychee_jax.errors import UserError
from lychee_jax.loading import BUNDLED, load
from tests.support import tiny_checkpoints

LENGTH = 1024


def exam(seed, length=LENGTH):
    return demo._exam(np.random.default_rng(seed), length)


@pytest.mark.parametrize("seed", range(5))
def test_document_holds_every_fact_that_is_asked_for_where_it_says(seed):
    document, asked = exam(seed)
    tokens = [language.BOS, *language.tokens_of(document)]
    assert len(tokens) == LENGTH
    assert len({question for question, _, _ in asked}) == len(asked) == 6
    for question, fact, position in asked:
        assert tokens[position : position + len(fact.statement)] == fact.statement
        assert language.text_of(fact.key).strip() in question
        assert len(fact.answer) < demo._NEW_TOKENS


@pytest.mark.parametrize("seed", range(5))
def test_variables_stand_after_what_they_refer_to(seed):
    document, asked = exam(seed)
    chain = next(language.text_of(fact.answer).split(" = ") for _, fact, _ in asked if fact.kind == "variable")
    names, number = [part.strip() for part in chain[:-1]], chain[-1]
    assert f"{names[-1]} = {number}." in document
    places = [document.index(f"{name} = ") for name in names]
    assert places == sorted(places, reverse=True)


def test_seed_decides_the_document():
    assert exam(3) == exam(3)
    assert exam(3)[0] != exam(4)[0]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return demo.run(load(), tmp_path_factory.mktemp("demo") / "new", seed=1, length=LENGTH)


@pytest.mark.slow
def test_bundled_model_answers_in_both_ways(report):
    assert [len(each.answers) for each in report.questions] == [2] * 6
    for mode in ("dense", "hybrid"):
        right = [each.right[mode] for each in report.questions]
        assert right == [each.answers[mode] == each.expected for each in report.questions]
        assert sum(right) >= 5


@pytest.mark.slow
def test_share_read_is_what_the_head_map_and_the_budget_say(report):
    sparse = report.kv_heads - report.retrieval_heads
    pages, picked = 1 + LENGTH // 64, report.budget // 64  # the questions and answers fill one page more
    expected = (report.retrieval_heads * pages + sparse * picked) / (report.kv_heads * pages)
    assert report.kv_read_share["dense"] == 1.0
    assert report.kv_read_share["hybrid"] == pytest.approx(expected, rel=0.02)
    assert all(milliseconds > 0 for milliseconds in report.token_ms.values())


@pytest.mark.slow
def test_report_shows_answers_costs_and_the_picture(report):
    text = str(report)
    for each in report.questions:
        assert each.expected.split()[-1] in text
    for part in ("✓", "time per token", "share of the KV cache read", "seed 1", report.picture):
        assert part in text.replace("\n", "")
    with open(report.picture, "rb") as picture:
        assert picture.read(4) == b"\x89PNG"


def test_a_model_that_knows_nothing_is_reported_as_wrong(tmp_path):
    raw = tiny_checkpoints.TINY["llama"] | {
        "vocab_size": language.VOCAB_SIZE, "max_position_embeddings": 1024, "num_hidden_layers": 1,
    }  # fmt: skip
    tiny_checkpoints.write_checkpoint(tmp_path / "model", raw)
    with pytest.raises(UserError, match="no tokenizer"):
        demo.run(load(tmp_path / "model"), tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((BUNDLED / name).read_bytes())
    model = load(tmp_path / "model")
    with pytest.raises(UserError, match="limit of 1024"):
        demo.run(model, tmp_path / "out")
    with pytest.raises(UserError, match="too short"):
        demo.run(model, tmp_path / "out", length=200)
    assert not (tmp_path / "out").exists()
    report = demo.run(model, tmp_path / "out", length=512)
    assert not any(right for each in report.questions for right in each.right.values())
    assert report.retrieval_heads == report.kv_heads  # no head map: every head retrieves
    assert "✗" in str(report)
