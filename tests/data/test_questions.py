"""Documents with questions: answers are marked, nothing is too long, any text and any tokenizer will do."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lychee_jax.data import facts as data
from lychee_jax.data import language
from lychee_jax.data.facts import Fact
from lychee_jax.data.questions import KINDS, Asked, Generated, Hidden, MultiHop, Text, Writer, make_source
from lychee_jax.errors import UserError
from lychee_jax.loading import load
from lychee_jax.text.tokenizer import Tokenizer
from tests.support import tiny_tokenizers
from tests.support.tiny_models import CONFIG

OWN = Writer(CONFIG, None)
FOREIGN = dataclasses.replace(CONFIG, vocab_size=400, eos_token_ids=(2,))
TOKENIZERS = {"byte-level": tiny_tokenizers.byte_level, "llama2": tiny_tokenizers.llama2,
              "metaspace": tiny_tokenizers.metaspace}  # fmt: skip
SPOKEN = "The old fox ran to the river! Nobody saw it. On Monday it rained?\n\nThen the fox slept. "


def foreign(folder: Path, name: str) -> tuple[Writer, Tokenizer]:
    tokenizer = Tokenizer.from_folder(tiny_tokenizers.write_tokenizer(folder, TOKENIZERS[name]()))
    assert tokenizer is not None
    return Writer(FOREIGN, tokenizer), tokenizer


def source(kind: str, *, text: Path | None = None, file: Path | None = None, **numbers: int) -> Any:
    return make_source(OWN, kind, **{"facts": 6, "questions": 4} | numbers, text=text, file=file)


def answers(asked: Asked) -> list[list[int]]:
    """The tokens of every answer."""
    marks = np.asarray(asked.answers)
    return [np.asarray(asked.tokens)[marks == i].tolist() for i in range(1, max(marks) + 1)]


def questions(asked: Asked) -> list[list[int]]:
    """The tokens between the end of a document, or of an answer, and the next answer."""
    marks, found = asked.answers, []
    for i in range(1, max(marks) + 1):
        end = marks.index(i)
        begin = end
        while begin > 0 and marks[begin - 1] == 0:
            begin -= 1
        found.append(asked.tokens[begin:end])
    return found


class Recorded:
    """A maker of facts that remembers what it made."""

    def __init__(self, make: Any = data.mixed) -> None:
        self.make, self.made = make, list[Fact]()

    def __call__(self, rng: np.random.Generator, count: int) -> list[Fact]:
        self.made = self.make(rng, count)
        return self.made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_rows_are_well_formed(kind, seed):
    """Marks 1, 2, … in runs, each run an answer that ends with EOS; nothing is longer than was asked for."""
    rng = np.random.default_rng(seed)
    length, room = int(rng.integers(400, 900)), int(rng.integers(20, 250))
    asked = source(kind)(rng, length, room)
    marks = np.asarray(asked.answers)
    assert len(asked.tokens) == len(marks) <= asked.start + room
    assert asked.start == length  # generated prose fills every gap
    assert asked.tokens[0] == language.BOS
    runs = marks[np.flatnonzero(np.diff(marks, prepend=0))]
    assert runs[runs > 0].tolist() == list(range(1, marks.max() + 1))
    assert marks[asked.start] == 1
    for i, answer in enumerate(answers(asked), 1):
        cut = i == marks.max() == 1 and len(asked.tokens) == asked.start + room
        assert answer.count(language.EOS) == (0 if cut else 1)
        assert answer[-1] == language.EOS or cut
    assert asked.tokens.count(language.BOS) == 1


@pytest.mark.parametrize("make", [data.long_passkeys, data.mixed, data.variables])
@pytest.mark.parametrize("seed", range(4))
def test_marked_tokens_are_the_facts_answers(make, seed):
    recorded = Recorded(make)
    asked = Hidden(OWN, Generated(OWN), recorded, 8, 5)(np.random.default_rng(seed), 1500, 1000)
    document = language.text_of(asked.tokens[1 : asked.start])
    assert len(answers(asked)) == 5
    for question, answer in zip(questions(asked)[1:], answers(asked)[1:], strict=True):
        fact = next(fact for fact in recorded.made if fact.answer == answer[:-1] and _within(fact.key, question))
        assert language.text_of(fact.statement) in document
    assert len({tuple(answer) for answer in answers(asked)}) == 5 or make is data.mixed


def _within(part: list[int], whole: list[int]) -> bool:
    return any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1))


@pytest.mark.parametrize("haystack", ["generated", "text"])
def test_facts_stand_where_the_recipe_puts_them(tmp_path, haystack):
    """Between 5 % and 95 % of the prose, all over it, in their order."""
    (tmp_path / "book.txt").write_text(SPOKEN * 20)
    recorded, depths = Recorded(data.variables), []
    prose = Generated(OWN) if haystack == "generated" else Text(OWN, tmp_path / "book.txt")
    hidden = Hidden(OWN, prose, recorded, 5, 1)
    for seed in range(12):
        asked = hidden(np.random.default_rng(seed), 3000, 100)
        tokens, before, last = asked.tokens[: asked.start], 0, -1
        total = asked.start - sum(len(fact.statement) for fact in recorded.made) - 20  # less the question, about
        for fact in recorded.made:
            at = next(i for i in range(len(tokens)) if tokens[i : i + len(fact.statement)] == fact.statement)
            assert at > last
            depths.append((at - 1 - before) / total)
            before, last = before + len(fact.statement), at
    assert 0.03 < min(depths) < 0.2
    assert 0.8 < max(depths) < 0.97


def test_facts_give_way_where_they_do_not_fit():
    """Of ten passkeys of 32 words, a short prompt holds some, and it is not longer than asked for."""
    short, long = (make_source(OWN, "passkeys", facts=10, questions=10, text=None, file=None) for _ in range(2))
    few = short(np.random.default_rng(0), 300, 600)
    many = long(np.random.default_rng(0), 3000, 600)
    assert few.start == 300
    assert 1 <= len(answers(few)) < len(answers(many)) == 10
    with pytest.raises(UserError, match="no room for its facts"):
        short(np.random.default_rng(0), 40, 600)


def test_room_is_kept():
    """As many answers as fit after the prompt; a first one that does not fit is cut."""
    counts = []
    for room in (5, 40, 100, 1000):
        asked = source("passkeys")(np.random.default_rng(3), 1000, room)
        assert len(asked.tokens) <= 1000 + room
        counts.append(len(answers(asked)))
    assert counts[0] == 1
    assert counts == sorted(counts)
    assert counts[-1] == 4
    assert len(answers(source("passkeys")(np.random.default_rng(3), 1000, 5))[0]) == 5


# Any text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        SPOKEN * 9,
        "one line without an end " * 400,
        "".join(f"{i} Füchse – 狐狸 🦊. " for i in range(60)),
        "x",
        "  a\n\n\n\tb!?!\n",
    ],
    ids=["prose", "no sentence", "unicode", "a letter", "blanks"],
)
def test_any_text_is_a_haystack(tmp_path, text):
    """It fills a prompt exactly, from anywhere on and over its end, and facts find places all over it."""
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    one = Text(OWN, tmp_path / "book.txt")
    whole = [token for sentence in one.sentences for token in sentence]
    assert whole == OWN.text(text)
    assert max(map(len, one.sentences)) <= 64
    begins = set()
    for seed in range(5):
        sentences = one(np.random.default_rng(seed), 500)
        tokens = [token for sentence in sentences for token in sentence]
        assert len(tokens) == 500
        assert len(sentences) >= 500 // 64
        begins.add(tuple(tokens[:20]))
        assert _within(tokens[:20], (whole * 600)[: len(whole) + 600])
    assert len(begins) > 1 or len(one.sentences) < 5
    asked = source("passkeys", text=tmp_path / "book.txt")(np.random.default_rng(0), 700, 300)
    assert asked.start == 700


# Other tokenizers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKENIZERS)
def test_another_models_tokens(tmp_path, name):
    write, tokenizer = foreign(tmp_path, name)
    recorded = Recorded(data.lookups)
    hidden = Hidden(write, Generated(write), recorded, 4, 3)
    asked = hidden(np.random.default_rng(1), 2000, 600)
    assert 1800 < asked.start <= 2000
    assert asked.tokens[: len(write.bos)] == write.bos == [token for token in tokenizer.encode("") if token != 2]
    assert len(write.bos) == 1
    texts = [tokenizer.decode(answer[:-1]).strip() for answer in answers(asked)]
    assert [answer[-1] for answer in answers(asked)] == [2, 2, 2]
    known = {language.text_of(fact.answer).strip() for fact in recorded.made}
    assert len(set(texts)) == 3
    assert set(texts) <= known
    text = tokenizer.decode(asked.tokens)
    assert "  " not in text  # no tokenizer writes its space beside a sentence's own
    for fact in recorded.made:
        assert language.text_of(fact.statement).strip() in text


def test_as_many_tokens_are_not_the_same_tokens(tmp_path):
    """A vocabulary of 1,024 with a tokenizer of its own is spoken by that tokenizer; the bundled one needs none."""
    _, tokenizer = foreign(tmp_path, "byte-level")
    write = Writer(CONFIG, tokenizer)
    assert write.text("the dog") == tokenizer.encode_plain("the dog")
    bundled = load()
    with_it, without = Writer(bundled.config, bundled.tokenizer), Writer(bundled.config, None)
    assert with_it.text(SPOKEN) == without.text(SPOKEN) == language.tokens_of(SPOKEN)
    assert with_it.eos == without.eos == [language.EOS]


def test_a_model_without_tokenizer_is_refused():
    with pytest.raises(UserError, match="no tokenizer"):
        Writer(FOREIGN, None)


# Multi-hop files ------------------------------------------------------------------------------------------------------


def entry(i: int) -> dict[str, Any]:
    context = [[f"Title {i}", [f"Fact {i} is here. ", "It is long."]], [f"Other {i}", [f"Nothing {i}."]]]
    return {"question": f" Which is {i}? ", "answer": f"number {i}", "context": context, "type": "bridge"}


@pytest.fixture
def hotpot(tmp_path) -> Path:
    file = tmp_path / "hotpot.json"
    file.write_text(json.dumps([entry(i) for i in range(10, 40)]))
    return file


@pytest.mark.parametrize("seed", range(4))
def test_questions_of_a_file(hotpot, seed):
    """Each question's paragraphs are in the document, with those of others; answers are the file's."""
    asked = source("multi-hop", file=hotpot, questions=3)(np.random.default_rng(seed), 800, 300)
    document = language.text_of(asked.tokens[1 : asked.start])
    assert asked.start <= 800
    assert document.count("Title") > 6
    assert len(answers(asked)) == 3
    for question, answer in zip(questions(asked), answers(asked), strict=True):
        text = language.text_of(answer[:-1])
        number = text.removeprefix(" number ")
        assert f"Which is {number}?" in language.text_of(question)
        assert language.text_of(question).endswith("\nAnswer:")
        assert f"\n\nTitle {number}\nFact {number} is here. It is long." in document


def test_one_object_a_line_is_the_same(hotpot, tmp_path):
    lines = tmp_path / "hotpot.jsonl"
    lines.write_text("\n".join(json.dumps(each) for each in json.loads(hotpot.read_text())) + "\n")
    assert MultiHop(OWN, lines, 3).entries == MultiHop(OWN, hotpot, 3).entries


def test_multi_hop_without_a_file_are_chains():
    asked = source("multi-hop")(np.random.default_rng(0), 900, 400)
    assert all(" VAR " in language.text_of(answer) for answer in answers(asked))


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{]", "not a list of questions"),
        ("[]", "holds no questions"),
        ("", "holds no questions"),
        ('[{"question": "Who?"}]', "not a list of questions"),
        ('[{"question": "Who?", "answer": 3, "context": []}]', "not a list of questions"),
        ("[1, 2]", "not a list of questions"),
        (b"\xff\xfe", "not UTF-8 text"),
    ],
    ids=str,
)
def test_bad_question_files(tmp_path, content, message):
    file = tmp_path / "questions.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        source("multi-hop", file=file)
    assert "\n" not in str(caught.value)
    assert f"--questions-file {file}" in str(caught.value)


def test_questions_that_do_not_fit(tmp_path):
    (tmp_path / "long.json").write_text(json.dumps([entry(1) | {"context": [["A", ["word " * 500]]]}]))
    with pytest.raises(UserError, match="no question fits into 300 tokens"):
        source("multi-hop", file=tmp_path / "long.json")(np.random.default_rng(0), 300, 50)


@pytest.mark.parametrize("content", [None, b"", b" \n\n", b"...", b"\xff\xfea"], ids=str)
def test_bad_texts(tmp_path, content):
    file = tmp_path / "book.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=f"--text {file}") as caught:
        source("passkeys", text=file)
    assert "\n" not in str(caught.value)


def test_sources_that_do_not_exist(tmp_path, hotpot):
    (tmp_path / "book.txt").write_text(SPOKEN)
    with pytest.raises(UserError, match="--data riddles is unknown; use one of passkeys, mixed, multi-hop"):
        source("riddles")
    with pytest.raises(UserError, match="--questions-file"):
        source("passkeys", file=hotpot)
    with pytest.raises(UserError, match="--questions-file"):
        source("multi-hop", file=hotpot, text=tmp_path / "book.txt")
