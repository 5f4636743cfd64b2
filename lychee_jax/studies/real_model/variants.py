"""What is compared: head maps of several kinds and sizes, budgets and page scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.errors import UserError

PAGE = 64
SINK, RECENT = 64, 128
"""Tokens that are always read: one page, and the last two."""

PageScore = Literal["max", "lse"]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A head map by its name, and what its sparse heads read; "dense" has no other number.

    In "none" only layer 0 retrieves.
    "window-N-S" has the retrieval heads of "learned-N-S", but sparse heads read the first and the last tokens only,
    the whole budget of them.
    """

    head_map: str
    budget: int = 0
    page_score: PageScore = "max"

    @property
    def label(self) -> str:
        """As in "learned-16-0@512 lse"."""
        if self.head_map == "dense":
            return "dense"
        return f"{self.head_map}@{self.budget}{'' if self.page_score == 'max' else ' lse'}"

    @property
    def policy(self) -> SelectionPolicy:
        """What sparse heads read."""
        if self.head_map == "dense":
            return SelectionPolicy(SINK + RECENT, SINK, RECENT)
        if self.head_map.startswith("window"):
            return SelectionPolicy(self.budget, SINK, self.budget - SINK, "forced")
        return SelectionPolicy(self.budget, SINK, RECENT, page_score=self.page_score)


@dataclasses.dataclass(frozen=True)
class Grid:
    """Which maps and budgets there are.

    The first number of retrieval heads and the first seed are the main map: it is asked at every budget, by both page
    scores; its other seeds at every budget; everything else at `compared`.
    """

    retrieval_heads: Sequence[int] = (16, 12, 24)
    seeds: Sequence[int] = (0, 1, 2)
    budgets: Sequence[int] = (256, 512, 1024, 2048)
    compared: int = 512

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for name in ("retrieval_heads", "seeds", "budgets"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise UserError(f"{name.replace('_', '-')}: {'given twice' if given else 'nothing is given'}")
        for budget in (*self.budgets, self.compared):
            SelectionPolicy(budget, SINK, RECENT).validate(PAGE)

    @property
    def main(self) -> Variant:
        """The variant that targets are about."""
        return Variant(f"learned-{self.retrieval_heads[0]}-{self.seeds[0]}", self.compared)

    def learned(self) -> Iterator[tuple[int, int]]:
        """Number of retrieval heads and seed of every training, the main one first."""
        for count in self.retrieval_heads:
            for seed in self.seeds:
                yield count, seed

    def layers(self, kv_heads: int) -> dict[int, int]:
        """For each number of heads, how many heads of whole layers are compared with them: as many, or a few more."""
        return {count: -(-count // kv_heads) * kv_heads for count in self.retrieval_heads}

    def variants(self, kv_heads: int) -> list[Variant]:
        """All of them, each once, dense first."""
        main = self.retrieval_heads[0]
        found = {Variant("dense"): None}
        for budget in self.budgets:
            for seed in self.seeds:
                found[Variant(f"learned-{main}-{seed}", budget)] = None
            found[Variant(f"learned-{main}-{self.seeds[0]}", budget, "lse")] = None
        for count, seed in self.learned():
            found[Variant(f"learned-{count}-{seed}", self.compared)] = None
            found[Variant(f"random-{count}-{seed}", self.compared)] = None
        for count in dict.fromkeys(self.layers(kv_heads).values()):
            found[Variant(f"layers-{count}", self.compared)] = None
        found[Variant("none", self.compared)] = None
        found[Variant(f"window-{main}-{self.seeds[0]}", self.compared)] = None
        return list(found)
