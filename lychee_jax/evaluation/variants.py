"""The variants of attention that one evaluation compares: dense, and hybrid at several budgets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import get_args

from lychee_jax.engine.options import AttentionMode, GenerateOptions
from lychee_jax.errors import UserError

_PAGES_TO_PICK = 2  # a budget that is a share of the length leaves at least so many pages to the choice


@dataclasses.dataclass(frozen=True)
class Budget:
    """Tokens that a sparse head may read: a number, or a share of the length, such as 1/8 (`divisor` 8)."""

    tokens: int = 0
    divisor: int = 0

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read "4096" or "1/8".

        Raises:
            UserError: anything else.
        """
        one, slash, divisor = text.strip().partition("/")
        if slash and one.strip() == "1" and divisor.strip().isdecimal() and int(divisor) > 0:
            return cls(divisor=int(divisor))
        if not slash and one.isdecimal() and int(one) > 0:
            return cls(tokens=int(one))
        raise UserError(f"budget {text!r} is neither a number of tokens nor a share of the length, such as 1/8")

    def at(self, length: int, options: GenerateOptions) -> int:
        """In tokens, for prompts of this length; a share is cut to whole pages, but holds what is always read."""
        if not self.divisor:
            return self.tokens
        size = options.page_size
        least = (options.policy.forced_pages(size) + _PAGES_TO_PICK) * size
        return max(least, length // self.divisor // size * size)

    def __str__(self) -> str:
        return f"1/{self.divisor}" if self.divisor else str(self.tokens)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One attention mode, with the budget where there is one; its label is a row of the table."""

    attention: AttentionMode
    budget: Budget | None = None

    @property
    def label(self) -> str:
        """As in "hybrid@1024"."""
        return self.attention if self.budget is None else f"{self.attention}@{self.budget}"

    def options(self, base: GenerateOptions, length: int, max_new_tokens: int) -> GenerateOptions:
        """The base with this attention and budget.

        Raises:
            UserError: a budget that does not fit the page size or what is always read.
        """
        policy = base.policy
        if self.budget is not None:
            policy = dataclasses.replace(policy, budget=self.budget.at(length, base))
        return dataclasses.replace(base, attention=self.attention, policy=policy, max_new_tokens=max(1, max_new_tokens))


def variants_of(attentions: Sequence[str], budgets: Sequence[str]) -> list[Variant]:
    """Every attention with every budget, dense once: it has none.

    Raises:
        UserError: an unknown attention, a bad budget, or one that is given twice.
    """
    found: list[Variant] = []
    known: dict[str, AttentionMode] = {mode: mode for mode in get_args(AttentionMode)}
    for name in attentions:
        attention = known.get(name)
        if attention is None:
            raise UserError(f"attention {name!r} is unknown; use some of {', '.join(known)}")
        each = [None] if attention == "dense" else [Budget.parse(budget) for budget in budgets]
        found += [Variant(attention, budget) for budget in each]
    if len({variant.label for variant in found}) < len(found):
        raise UserError(f"an attention or a budget is given twice: {', '.join(variant.label for variant in found)}")
    if not found:
        raise UserError("there is no attention to evaluate")
    return found
