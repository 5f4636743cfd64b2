"""The selection policy: how many pages a head may read, and by which rule they are picked."""

import dataclasses
from typing import Literal, get_args

from lychee_jax.arguments import check_int32, settle_numbers
from lychee_jax.errors import UserError
from pallas_kernels.types import Rule, Selection, SelectionSpec

__all__ = ["Selection", "SelectionPolicy"]


@dataclasses.dataclass(frozen=True)
class SelectionPolicy:
    """Token counts of the selection rule (LycheeDecode, arXiv 2602.04541), and its variants.

    `budget`: what a sparse head reads at most; `sink` first and `recent` last tokens are always read. `rule`: "budget"
    fills the budget; "ratio" takes ⌈ratio · P⌉ pages; "top_p" the fewest pages that hold `top_p` of the attention mass;
    "threshold" every page with at least `threshold` of the mass; "forced" only sink and recent pages. All stay under
    the budget. `page_score`: a page counts by its best token ("max") or by the log-sum-exp of its scores, that is
    its attention mass ("lse"; "mass" is another name for it); "top_p" and "threshold" always go by mass.
    """

    budget: int = 4096
    sink: int = 128
    recent: int = 256
    rule: Rule = "budget"
    ratio: float = 0.125
    top_p: float = 0.95
    threshold: float = 0.001
    page_score: Literal["max", "lse", "mass"] = "max"

    def __post_init__(self):
        settle_numbers(self)
        check_int32(self, "budget", "sink", "recent")
        if self.sink < 0 or self.recent < 0:
            raise UserError(f"sink is {self.sink} and recent is {self.recent}; neither may be negative")
        if self.budget < 1:
            raise UserError(f"budget is {self.budget}; it must be a positive multiple of the page size")
        if self.rule not in get_args(Rule):
            raise UserError(f"selection rule {self.rule!r} is unknown; use one of {', '.join(get_args(Rule))}")
        if self.page_score not in ("max", "lse", "mass"):
            raise UserError(f"page score {self.page_score!r} is unknown; use max or lse")
        for name in ("ratio", "top_p"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be above 0 and at most 1")
        if not 0.0 < self.threshold < 1.0:
            raise UserError(f"threshold is {self.threshold}; it must be above 0 and below 1")

    def validate(self, page_size: int) -> None:
        """Raise UserError unless the numbers fit pages of `page_size` tokens."""
        if page_size < 1:
            raise UserError(f"page size is {page_size}; it must be at least 1")
        if self.budget % page_size:
            raise UserError(f"budget is {self.budget}; it must be a multiple of the page size, {page_size}")
        forced = self.forced_pages(page_size)
        if forced > self.budget // page_size:
            raise UserError(
                f"sink {self.sink} and recent {self.recent} force {forced} pages of {page_size} tokens, "
                f"more than the budget of {self.budget} holds ({self.budget // page_size})"
            )

    def forced_pages(self, page_size: int) -> int:
        """The pages that sink and recent tokens take."""
        return -(-self.sink // page_size) - (-self.recent // page_size)

    def spec(self, page_size: int) -> SelectionSpec:
        """The policy in pages, as the ops take it."""
        by_mass = self.page_score != "max" or self.rule in ("top_p", "threshold")
        amounts = {"ratio": self.ratio, "top_p": self.top_p, "threshold": self.threshold}
        return SelectionSpec(
            budget_pages=self.budget // page_size,
            sink_pages=-(-self.sink // page_size),
            recent_pages=-(-self.recent // page_size),
            rule=self.rule,
            amount=amounts.get(self.rule, 0.0),
            page_score="lse" if by_mass else "max",
        )
