"""Documents with hidden facts, and questions about them with their answers, in the tokens of any model.

The facts are those of `data` (passkeys, look-ups, chains of variables), the haystack is generated prose or any text;
or both come from a file of multi-hop questions. All is a function of the random generator that comes in.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from lychee_jax.config import ModelConfig
from lychee_jax.data import facts as data
from lychee_jax.data import language
from lychee_jax.data.facts import Tokens
from lychee_jax.errors import UserError
from lychee_jax.files import parse_json, parse_json_lines, read_text
from lychee_jax.text.tokenizer import Tokenizer

KINDS = ("passkeys", "mixed", "multi-hop")
_DEPTHS = (0.05, 0.95)  # where facts may stand, as in the recipe of arXiv 2602.04541
_LONGEST = 64  # tokens of a sentence of any text; what is longer is cut, so that facts find places between
_SAMPLE = "The amber falcon slept at 07:45.\n"


@dataclasses.dataclass(frozen=True)
class Asked:
    """A text `tokens` of which the answers are marked: `answers[t]` is i at the tokens of the i-th answer, else 0."""

    tokens: Tokens
    answers: list[int]

    @property
    def start(self) -> int:
        """Where the first answer begins: what is before it is a prompt."""
        return next(t for t, mark in enumerate(self.answers) if mark)


class Writer:
    """Text and the facts of `data` in a model's own tokens, without special tokens; `bos` and `eos` are those.

    Raises UserError for a model without a tokenizer, unless it has the bundled model's vocabulary.
    """

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._own = config.vocab_size == language.VOCAB_SIZE and (
            tokenizer is None or tokenizer.encode_plain(_SAMPLE) == language.tokens_of(_SAMPLE)
        )
        if tokenizer is None and not self._own:
            raise UserError("the model has no tokenizer, and questions are text; put its tokenizer into the folder")
        # SentencePiece puts a space before every text; parts of a text bring their own.
        self._prepends = not self._own and tokenizer is not None and self._with_space(tokenizer)
        self.eos: Tokens = [language.EOS] if self._own else list(config.eos_token_ids[:1])
        self.bos: Tokens = [language.BOS]
        if tokenizer is not None and not self._own:
            self.bos = tokenizer.prefix_ids

    def text(self, text: str) -> Tokens:
        """Tokens of a text."""
        if self._tokenizer is None:
            return language.tokens_of(text.encode("ascii", "replace").decode())
        return self._tokenizer.encode_plain(text.removeprefix(" ") if self._prepends else text)

    @staticmethod
    def _with_space(tokenizer: Tokenizer) -> bool:
        return " " in tokenizer.decode(2 * tokenizer.encode_plain("a")).strip()

    def tokens(self, tokens: Tokens) -> Tokens:
        """Tokens of the bundled model's language, in this model's tokens."""
        return tokens if self._own else self.text(language.text_of(tokens))


@runtime_checkable
class QuestionSource(Protocol):
    """Where documents and their questions come from."""

    def __call__(self, rng: np.random.Generator, length: int, room: int) -> Asked:
        """A document of at most `length` tokens, its first question included, and at most `room` tokens after that."""
        ...


@dataclasses.dataclass(frozen=True)
class Hidden:
    """Facts hidden at random depths in a haystack, and questions about them in another order.

    `haystack(rng, total)` gives sentences, as tokens, of about that many tokens.
    """

    writer: Writer
    haystack: Callable[[np.random.Generator, int], list[Tokens]]
    facts: Callable[[np.random.Generator, int], list[data.Fact]]
    count: int
    questions: int

    def __call__(self, rng: np.random.Generator, length: int, room: int) -> Asked:
        """See `QuestionSource`. Fewer facts are hidden where they would fill more than half of the document."""
        write = self.writer
        facts = self.facts(rng, self.count)
        statements = [write.tokens(fact.statement) for fact in facts]
        while len(facts) > 1 and sum(map(len, statements)) > length // 2:
            facts, statements = facts[:-1], statements[:-1]
        order = rng.permutation(len(facts))[: self.questions]
        asked = [(write.tokens(data.ask(rng, facts[i])), write.tokens(facts[i].answer) + write.eos) for i in order]
        used = len(write.bos) + sum(map(len, statements)) + len(asked[0][0])
        prose = self.haystack(rng, length - used)
        places = np.sort(rng.uniform(*_DEPTHS, size=len(facts)) * len(prose)).astype(int)
        document = list(write.bos)
        for place, sentence in enumerate([*prose, []]):
            for i in np.flatnonzero(places == place):
                document += statements[i]
            document += sentence
        return _ask(document, asked, length, room)


@dataclasses.dataclass(frozen=True)
class Generated:
    """Generated prose as a haystack."""

    writer: Writer

    def __call__(self, rng: np.random.Generator, total: int) -> list[Tokens]:
        """Sentences of at most `total` tokens."""
        # In the bundled language's tokens first; others need about as many, or fewer.
        prose, left = [], total
        for row in data.prose(rng, max(total, 64)):
            sentence = self.writer.tokens(row)
            if len(sentence) > left:
                break
            prose.append(sentence)
            left -= len(sentence)
        return prose


class Text:
    """Any text as a haystack: its sentences in order, from a random one on, and from the start again at its end."""

    def __init__(self, writer: Writer, file: Path) -> None:
        """Read a UTF-8 file; raises UserError if it cannot be read or holds no text."""
        try:
            text = read_text(file).replace("\r\n", "\n")
        except UserError as error:
            raise UserError(f"--text {error}") from error
        if not re.search(r"\w", text):
            raise UserError(f"--text {file}: holds no text")
        sentences = map(writer.text, re.findall(r"\s*[^.!?\n]+[.!?\n]*|\s*[.!?\n]+", text))
        self.sentences = [
            sentence[at : at + _LONGEST] for sentence in sentences for at in range(0, len(sentence), _LONGEST)
        ]

    def __call__(self, rng: np.random.Generator, total: int) -> list[Tokens]:
        """Sentences of `total` tokens; the last one is cut."""
        at, left = int(rng.integers(len(self.sentences))), total
        prose: list[Tokens] = []
        while left > 0:
            sentence = self.sentences[at % len(self.sentences)][:left]
            prose.append(sentence)
            left -= len(sentence)
            at += 1
        return prose


class MultiHop:
    """Questions whose answers need several paragraphs, from a file: HotpotQA's JSON, or one object a line.

    Every entry has `question`, `answer` and `context`, a list of `[title, [sentences]]`. A document is made of the
    paragraphs of some questions, shuffled, and of other questions' as far as there is room.
    """

    def __init__(self, writer: Writer, file: Path, questions: int) -> None:
        """Read the file; raises UserError if it is something else."""
        self._write, self._questions = writer, questions
        try:
            text = read_text(file)
        except UserError as error:
            raise UserError(f"--questions-file {error}") from error
        try:
            raw = parse_json(text, file) if text.lstrip().startswith("[") else parse_json_lines(text, file)
            self.entries = [self._entry(entry) for entry in raw]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"--questions-file {file}: not a list of questions, each with question, answer and context "
                "([[title, [sentences]], …]), such as HotpotQA's files"
            ) from error
        if not self.entries:
            raise UserError(f"--questions-file {file}: holds no questions")

    def _entry(self, entry: Any) -> tuple[list[Tokens], Tokens, Tokens]:
        write = self._write
        paragraphs = [write.text(f"\n\n{title}\n{''.join(sentences)}") for title, sentences in entry["context"]]
        question = write.text(f"\n\nQuestion: {entry['question'].strip()}\nAnswer:")
        return paragraphs, question, write.text(" " + entry["answer"].strip()) + write.eos

    def __call__(self, rng: np.random.Generator, length: int, room: int) -> Asked:
        """See `QuestionSource`. Questions whose paragraphs do not fit are not asked."""
        paragraphs: list[Tokens] = []
        asked: list[tuple[Tokens, Tokens]] = []
        left = length - len(self._write.bos)
        for i in rng.permutation(len(self.entries)):
            own, question, answer = self.entries[int(i)]
            size = sum(map(len, own)) + (0 if asked else len(question))
            if size > left:
                if asked:
                    break
                continue
            if len(asked) < self._questions:
                asked.append((question, answer))
            paragraphs += own
            left -= size
        if not asked:
            raise UserError(f"no question fits into {length} tokens with its paragraphs; raise --min-length")
        shuffled = [paragraphs[int(i)] for i in rng.permutation(len(paragraphs))]
        return _ask([*self._write.bos, *(token for part in shuffled for token in part)], asked, length, room)


def _ask(document: Tokens, asked: Sequence[tuple[Tokens, Tokens]], length: int, room: int) -> Asked:
    """The document with its questions and answers, as many as there is room for; if not even one fits, it is cut."""
    start = len(document) + len(asked[0][0])
    if start > length:
        raise UserError(f"a document of {length} tokens has no room for its facts; raise --min-length")
    tokens, marks = list(document), [0] * len(document)
    for i, (question, answer) in enumerate(asked, 1):
        if i > 1 and len(tokens) + len(question) + len(answer) > start + room:
            break
        tokens += question + answer
        marks += [0] * len(question) + [i] * len(answer)
    return Asked(tokens[: start + room], marks[: start + room])


def make_source(
    writer: Writer, kind: str, *, facts: int, questions: int, text: Path | None, file: Path | None
) -> QuestionSource:
    """The source that the options name: a kind of hidden facts in prose or in a text, or the questions of a file.

    "passkeys" are the recipe of arXiv 2602.04541 (32 words each), "mixed" what the bundled model was trained on, and
    "multi-hop" chains of variables.

    Raises:
        UserError: an unknown kind, or a file that cannot be used.
    """
    if kind not in KINDS:
        raise UserError(f"--data {kind} is unknown; use one of {', '.join(KINDS)}")
    if file is not None:
        if kind != "multi-hop" or text is not None:
            raise UserError("--questions-file brings its own text: it goes with --data multi-hop and without --text")
        return MultiHop(writer, file, questions)
    make = {"passkeys": data.long_passkeys, "mixed": data.mixed, "multi-hop": data.variables}[kind]
    return Hidden(writer, Text(writer, text) if text else Generated(writer), make, facts, questions)
