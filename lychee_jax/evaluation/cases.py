"""What an evaluation asks: tasks make cases, cells say how many of which length."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from lychee_jax.files import digest_of, json_text


@dataclasses.dataclass(frozen=True)
class Case:
    """One prompt as the model gets it, and what would be right.

    Attributes:
        prompt: its text, kept for inspection.
        tokens: read densely, in one go.
        references: answers that would be right; the task says whether one or all of them are wanted.
        max_new_tokens: the longest answer; 0: the case is about `forced` alone.
        forced: tokens that follow, fed one by one through the decode path before the answer begins.
    """

    prompt: str
    tokens: list[int]
    references: list[str]
    max_new_tokens: int
    forced: list[int] = dataclasses.field(default_factory=list)

    @property
    def digest(self) -> str:
        """What tells it from other cases, whichever of its tokens are forced."""
        return digest_of(json_text([[*self.tokens, *self.forced], self.references, self.max_new_tokens]))


@runtime_checkable
class Task(Protocol):
    """Makes cases, always the same for the same length, depth and index, and scores answers."""

    @property
    def name(self) -> str:
        """The column of the table."""
        ...

    def case(self, length: int, depth: float | None, index: int) -> Case:
        """The case of this index; UserError if the length has no room for it."""
        ...

    def score(self, case: Case, answer: str, logprobs: list[float]) -> float:
        """How good an answer is (`logprobs` are those of the forced tokens), in the benchmark's unit."""
        ...


@runtime_checkable
class ReadsFiles(Protocol):
    """A task whose cases come from files."""

    @property
    def inputs(self) -> Mapping[str, str]:
        """Digests of what was read for the cases so far, by name."""
        ...


@dataclasses.dataclass(frozen=True)
class Cell:
    """A task at one length and, where it can place what it asks for, at one depth (0: start, 1: end of the text)."""

    task: Task
    length: int
    samples: int
    depth: float | None = None

    @property
    def key(self) -> tuple[str, int, float | None]:
        """What tells it from other cells of a run."""
        return self.task.name, self.length, self.depth
