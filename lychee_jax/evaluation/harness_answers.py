"""What lm-evaluation-harness asks of the engine, and the answers that are there: a run goes on where it was stopped.

A question is its tokens and numbers, not its place in a task: tasks, limits and variants may change from run to run.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lychee_jax.engine.sampling_params import SamplingParams
from lychee_jax.files import json_text
from lychee_jax.run_folder import append_lines, claim, read_lines

SETTINGS, ANSWERS = "settings.json", "answers.jsonl"


@dataclasses.dataclass(frozen=True)
class Question:
    """What the engine is asked: the log-probabilities of `forced`, or where there is none, a text.

    `limit`: new tokens at most. `stops` end a text.
    """

    prompt: tuple[int, ...]
    forced: tuple[int, ...] = ()
    limit: int = 0
    stops: tuple[str, ...] = ()
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)

    @functools.cached_property
    def key(self) -> str:
        """What tells it from other questions."""
        return hashlib.sha256(json_text(dataclasses.asdict(self)).encode()).hexdigest()[:32]


@dataclasses.dataclass(frozen=True)
class Answer:
    """A text, or the log-probability of the forced tokens and whether each was the likeliest; and what was read."""

    text: str
    logprob: float
    greedy: bool
    pages_read: int
    pages_held: int


class Answers:
    """The answers that are there already, by variant and question; with a folder, those of an interrupted run too."""

    def __init__(self, folder: Path | None = None, settings: Mapping[str, Any] | None = None) -> None:
        """Begin with none, or with those of a folder, which is made if it is missing.

        Raises:
            UserError: the folder is a file, or holds a run with other settings.
        """
        self._file = None if folder is None else folder / ANSWERS
        self._known: dict[tuple[str, str], Answer] = {}
        if folder is not None and self._file is not None:
            claim(folder, settings or {}, SETTINGS)
            for record in read_lines(self._file):
                variant, question = record.pop("variant"), record.pop("question")
                self._known[variant, question] = Answer(**record)

    def has(self, variant: str, question: Question) -> bool:
        """Whether this answer is there."""
        return (variant, question.key) in self._known

    def get(self, variant: str, question: Question) -> Answer:
        """The answer, which must be there."""
        return self._known[variant, question.key]

    def add(self, variant: str, answers: Iterable[tuple[Question, Answer]]) -> None:
        """Keep answers, on the disk when this returns if there is a folder."""
        found = {(variant, question.key): answer for question, answer in answers}
        self._known |= found
        if self._file is not None:
            append_lines(
                self._file,
                [{"variant": variant, "question": key, **dataclasses.asdict(found[name, key])} for name, key in found],
            )
