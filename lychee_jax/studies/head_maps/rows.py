"""What is compared: a row for every method of choosing heads or pages, task, context and budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.cache.allocator import pages_for
from lychee_jax.files import json_text
from lychee_jax.studies.head_maps.prompts import ANSWER_TOKENS, DIALOGUE, TASKS
from pallas_kernels.types import Rule

FAMILIES = ("hardkuma", "hardconcrete", "plain")
METHODS = (*FAMILIES, "layer", "random", "none")
BUDGETS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
COMPARED = (1 / 32, 1 / 8)
"""Budgets at which methods and rules are compared."""
POINTS = (1, 2, 3, 4)
CORRECT_EVERY = 32
_PAGE = 64
_SINK, _RECENT = SelectionPolicy().sink, SelectionPolicy().recent

PageScore = Literal["max", "mass"]

# Pages of one token have one score; the rules by mass have no other.
_VARIED: tuple[tuple[Rule, int, PageScore], ...] = (
    ("budget", 64, "max"), ("budget", 64, "mass"), ("budget", 16, "max"), ("budget", 16, "mass"), ("budget", 1, "max"),
    ("ratio", 64, "max"), ("top_p", 64, "mass"), ("threshold", 64, "mass"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """A head map (by method and seed) that answers one task's prompts of `context` tokens under one policy.

    `budget` is a share of the context; for the rules that have a number of their own, the share which that number was
    chosen to give. `sink` and `recent` are tokens.
    """

    method: str
    seed: int
    task: str
    context: int
    budget: float
    page_size: int
    rule: Rule
    page_score: PageScore
    correction: bool
    sink: int
    recent: int
    retrieval_heads: int

    @property
    def key(self) -> str:
        """What the row is called in the journal."""
        return json_text(dataclasses.asdict(self))

    @property
    def map_name(self) -> str:
        """The head map that answers."""
        return f"{'hardkuma' if self.method == 'none' else self.method}-{self.seed}"

    @property
    def budget_tokens(self) -> int:
        """The budget in tokens, whole pages of them."""
        return tokens_of(self.budget, self.context, self.page_size)

    def policy(self, amount: float | None = None) -> SelectionPolicy:
        """The policy; `amount` is the number of the rules that have one, and their budget holds all pages."""
        if amount is None:
            return SelectionPolicy(self.budget_tokens, self.sink, self.recent, self.rule, page_score=self.page_score)
        everything = self.page_size * pages_for(self.context + max(ANSWER_TOKENS.values()), self.page_size)
        numbers: dict[str, Any] = {self.rule: amount}
        return SelectionPolicy(
            everything, self.sink, self.recent, self.rule, page_score=self.page_score, **numbers
        )  # fmt: skip

    @property
    def dense(self) -> Row:
        """The row of dense attention that this one is measured against: all heads retrieve, so no policy matters."""
        return dataclasses.replace(
            self, method="dense", seed=0, budget=1.0, page_size=_PAGE, rule="budget", page_score="max",
            correction=False, sink=_SINK, recent=_RECENT, retrieval_heads=0,
        )  # fmt: skip


def tokens_of(budget: float, context: int, page_size: int) -> int:
    """A share of the context in tokens, whole pages of them."""
    return int(budget * context) // page_size * page_size


def forced_tokens(budget: int, page_size: int) -> tuple[int, int]:
    """Sink and recent tokens under a budget: the defaults, or each at most a quarter where it cannot hold both."""
    quarter = budget // page_size // 4 * page_size
    if page_size * (pages_for(_SINK, page_size) + pages_for(_RECENT, page_size)) <= budget:
        return _SINK, _RECENT
    return min(_SINK, quarter), min(_RECENT, quarter)


@dataclasses.dataclass(frozen=True)
class Grid:
    """Which rows there are. Budgets that hold no page of a context have none."""

    points: Sequence[int] = POINTS
    tasks: Sequence[str] = TASKS
    contexts: Sequence[int] = (8192, 16384, 32768)
    seeds: Sequence[int] = (0, 1, 2)
    retrieval_heads: int = 8
    budgets: Sequence[float] = BUDGETS

    def rows(self) -> list[Row]:
        """All of them, each once: those of a prompt together."""
        found: dict[Row, None] = {}
        for context in self.contexts:
            for task in self.tasks:
                for point in self.points:
                    found.update(dict.fromkeys(self.of_point(point, task, context)))
        if 3 in self.points:
            found.update(dict.fromkeys(self.dialogues()))
        return list(found)

    @property
    def families(self) -> tuple[str, ...]:
        """The gates that must be trained."""
        return FAMILIES if {2, 4} & set(self.points) else FAMILIES[:1]

    def of_point(self, point: int, task: str, context: int) -> Iterator[Row]:
        """The rows of one point on one cell: 1 budgets, 2 methods, 3 pages and rules (the learned map of one seed)."""
        if point == 1:
            for budget in self.budgets:
                for seed in self.seeds:
                    yield from self._row("hardkuma", seed, task, context, budget)
        elif point == 2:
            for budget in COMPARED:
                for seed in self.seeds:
                    for method in (*FAMILIES, "layer", "random"):
                        yield from self._row(method, seed, task, context, budget)
                    for row in self._row("none", seed, task, context, budget, rule="forced"):
                        yield row
                        yield dataclasses.replace(row, recent=row.budget_tokens - row.sink)
        elif point == 3:
            for budget in COMPARED:
                for rule, page_size, score in _VARIED:
                    yield from self._row(
                        "hardkuma", self.seeds[0], task, context, budget, page_size=page_size, rule=rule,
                        page_score=score,
                    )  # fmt: skip

    def dialogues(self) -> Iterator[Row]:
        """Long generations about documents of the shortest context, with and without cache correction."""
        for budget in COMPARED:
            for correction in (False, True):
                yield from self._row(
                    "hardkuma", self.seeds[0], DIALOGUE, min(self.contexts), budget, correction=correction
                )

    def _row(
        self, method: str, seed: int, task: str, context: int, budget: float, *, page_size: int = _PAGE,
        rule: Rule = "budget", page_score: PageScore = "max", correction: bool = False,
    ) -> Iterator[Row]:  # fmt: skip
        """The row, if its budget holds a page."""
        tokens = tokens_of(budget, context, page_size)
        if tokens:
            yield Row(
                method, seed, task, context, budget, page_size, rule, page_score, correction,
                *forced_tokens(tokens, page_size), self.retrieval_heads,
            )  # fmt: skip
