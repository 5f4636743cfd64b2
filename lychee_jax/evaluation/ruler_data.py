"""The texts that RULER's tasks are made of: files that the user has, and word lists that a package brings."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lychee_jax.errors import UserError
from lychee_jax.files import digest_of, parse_json, read_text

_SCRIPTS = "https://github.com/NVIDIA/RULER/tree/main/scripts/data/synthetic/json"
ESSAYS = ("PaulGrahamEssays.json", f"download_paulgraham_essay.py in {_SCRIPTS} makes it")
SQUAD = ("squad.json", "it is https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json under this name")
HOTPOTQA = ("hotpotqa.json", "it is http://curtis.ml.cmu.edu/datasets/hotpot/hotpot_dev_distractor_v1.json, renamed")
ENGLISH = ("english_words.json", f"it lies in {_SCRIPTS}")


@dataclass(frozen=True)
class Question:
    """A question, all of its right answers, the documents that it is about, and others on the same subject (ids)."""

    text: str
    answers: list[str]
    documents: list[int]
    related: list[int]


@dataclass(frozen=True)
class Questionnaire:
    """Questions and the documents that they are about."""

    questions: list[Question]
    documents: list[str]


@dataclass(frozen=True)
class Files:
    """The user's folder of data files, each read at first use.

    Every method raises UserError for a file that is missing, with where to get it, or that is something else.
    `digests`: of the files that were read so far, by name.
    """

    folder: Path | None
    digests: dict[str, str] = field(default_factory=dict, compare=False)

    @functools.cached_property
    def essays(self) -> list[str]:
        """The words of the essays."""
        return self._read(ESSAYS, "niah tasks with essays", lambda raw: re.sub(r"\s+", " ", raw["text"]).split(" "))

    @functools.cached_property
    def squad(self) -> Questionnaire:
        """SQuAD 2.0: the answerable questions; related documents are the other paragraphs of the same article."""
        return self._read(SQUAD, "qa_1", _squad)

    @functools.cached_property
    def hotpotqa(self) -> Questionnaire:
        """HotpotQA, distractor setting."""
        return self._read(HOTPOTQA, "qa_2", _hotpotqa)

    @functools.cached_property
    def english(self) -> list[str]:
        """A long list of English words."""
        return self._read(ENGLISH, "cwe at this length", lambda raw: list(raw.values()))

    def _read(self, file: tuple[str, str], reader: str, parse: Callable[[Any], Any]) -> Any:
        name, source = file
        if self.folder is None or not (self.folder / name).is_file():
            where = f"{self.folder} has none" if self.folder else "give its folder with --data DIR"
            raise UserError(f"{reader} reads {name}: {where}; {source}")
        path = self.folder / name
        try:
            text = read_text(path)
            parsed = parse(parse_json(text, path))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not the file that {reader} reads; {source}") from error
        if not (parsed.questions if isinstance(parsed, Questionnaire) else parsed):
            raise UserError(f"{path} is empty; {source}")
        self.digests[name] = digest_of(text)
        return parsed


def _squad(raw: Any) -> Questionnaire:
    documents = sorted({paragraph["context"] for article in raw["data"] for paragraph in article["paragraphs"]})
    ids = {document: index for index, document in enumerate(documents)}
    questions = []
    for article in raw["data"]:
        all_ids = [ids[paragraph["context"]] for paragraph in article["paragraphs"]]
        for own, paragraph in zip(all_ids, article["paragraphs"], strict=True):
            related = [index for index in all_ids if index != own]
            for entry in paragraph["qas"]:
                if not entry["is_impossible"]:
                    answers = [answer["text"] for answer in entry["answers"]]
                    questions.append(Question(entry["question"], answers, [own], related))
    return Questionnaire(questions, documents)


def _hotpotqa(raw: Any) -> Questionnaire:
    def document(title: str, sentences: Sequence[str]) -> str:
        return f"{title}\n{''.join(sentences)}"

    documents = sorted({document(*each) for entry in raw for each in entry["context"]})
    ids = {text: index for index, text in enumerate(documents)}
    questions = [
        Question(entry["question"], [entry["answer"]], [ids[document(*each)] for each in entry["context"]], [])
        for entry in raw
    ]
    return Questionnaire(questions, documents)


@functools.cache
def _kind(name: str) -> list[str]:
    from wonderwords import RandomWord  # its lists are read when it is made

    return sorted(RandomWord().filter(include_categories=[name]))


@functools.cache
def adjectives() -> list[str]:
    """Adjectives, in alphabetical order."""
    return _kind("adjective")


@functools.cache
def nouns() -> list[str]:
    """Nouns, in alphabetical order."""
    return _kind("noun")


@functools.cache
def words() -> list[str]:
    """Nouns, adjectives and verbs without repetition, in alphabetical order."""
    return sorted({*nouns(), *adjectives(), *_kind("verb")})
