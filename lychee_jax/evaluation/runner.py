"""Runs the cells of an evaluation: every variant answers the same prompts, whose pages the prefix cache keeps.

What differs between the variants is decoding alone. A row comes out the same whatever stands beside it in a batch, so
neither the batch size nor an interrupt changes a result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from lychee_jax.engine.options import GenerateOptions
from lychee_jax.errors import UserError
from lychee_jax.evaluation.cases import Case, Cell
from lychee_jax.evaluation.journal import Journal
from lychee_jax.evaluation.variants import Variant
from lychee_jax.llm import LLM
from lychee_jax.text.streaming import text_of
from lychee_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class EvaluationPlan:
    """What is run.

    Attributes:
        cells: in this order.
        variants: all of them on every prompt.
        options: heads, policy, page size, ends of text; attention, budget and lengths come from variants and cases.
        batch: prompts at a time.
        decode_last: so many last tokens of every prompt are fed one by one through the decode path, so that they too
            are decoded by the variant that is measured; 0: the whole prompt is read densely.
    """

    cells: Sequence[Cell]
    variants: Sequence[Variant]
    options: GenerateOptions
    batch: int = 16
    decode_last: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers and budgets before anything is run."""
        if self.batch < 1:
            raise UserError(f"batch is {self.batch}; it must be at least 1")
        if self.decode_last < 0:
            raise UserError(f"decode-last is {self.decode_last}; it must be 0 (off) or a number of tokens")
        for cell in self.cells:
            if cell.samples < 1:
                raise UserError(f"samples is {cell.samples}; it must be at least 1")
            for variant in self.variants:
                variant.options(self.options, cell.length, 1)

    @property
    def answers(self) -> int:
        """How many there will be."""
        return len(self.variants) * sum(cell.samples for cell in self.cells)


Plan = EvaluationPlan
"""The former name, for one release."""


def tokenizer_of(model: LLM) -> Tokenizer:
    """The model's tokenizer.

    Raises:
        UserError: it has none.
    """
    if model.tokenizer is None:
        raise UserError(f"{model.path} has no tokenizer, and evaluations are about text")
    return model.tokenizer


def run(
    model: LLM,
    plan: EvaluationPlan,
    journal: Journal,
    on_progress: Callable[[Cell, int], None],
    on_prefill: Callable[[int, int], None] | None = None,
) -> None:
    """Answer everything that the journal lacks.

    Args:
        model: that answers.
        plan: what is to be answered.
        journal: where answers go.
        on_progress: called with a cell and how many answers have come, those at hand counted first.
        on_prefill: called with the prompt tokens of a batch that were read, and how many there are.
    """
    for cell in plan.cells:
        groups: dict[tuple[Variant, ...], list[int]] = {}
        for index in range(cell.samples):
            missing = tuple(variant for variant in plan.variants if not journal.has(cell, index, variant.label))
            on_progress(cell, len(plan.variants) - len(missing))
            if missing:
                groups.setdefault(missing, []).append(index)
        for variants, indices in groups.items():
            for first in range(0, len(indices), plan.batch):
                _batch(
                    model, plan, journal, cell, variants, indices[first : first + plan.batch], on_progress, on_prefill
                )


def _batch(
    model: LLM,
    plan: EvaluationPlan,
    journal: Journal,
    cell: Cell,
    variants: Sequence[Variant],
    indices: list[int],
    on_progress: Callable[[Cell, int], None],
    on_prefill: Callable[[int, int], None] | None,
) -> None:
    cases = [_held_back(cell.task.case(cell.length, cell.depth, index), plan.decode_last) for index in indices]
    for index, case in zip(indices, cases, strict=True):
        journal.keep_prompt(cell, index, case)
    for variant in variants:
        options = variant.options(plan.options, cell.length, max(case.max_new_tokens for case in cases))
        found = _answer(model, cases, options, on_prefill)
        answers = [
            {**record, "score": cell.task.score(case, record["answer"], record["forced_logprobs"])}
            for case, record in zip(cases, found, strict=True)
        ]
        journal.add(cell, variant.label, list(zip(indices, answers, strict=True)))
        on_progress(cell, len(answers))


def _held_back(case: Case, count: int) -> Case:
    """The case with its last `count` prompt tokens to be decoded; at least one is read before."""
    cut = max(1, len(case.tokens) - count)
    return dataclasses.replace(case, tokens=case.tokens[:cut], forced=[*case.tokens[cut:], *case.forced])


def _answer(
    model: LLM, cases: list[Case], options: GenerateOptions, on_prefill: Callable[[int, int], None] | None
) -> list[dict[str, Any]]:
    """One record a case: the answer and what it cost, its forced tokens included; no case depends on the others."""
    forced = [case.forced for case in cases]
    # A case without forced tokens and without an answer still gets one token, which is not looked at.
    limits = [max(1, len(case.forced) + case.max_new_tokens) for case in cases]
    prompts = [case.tokens for case in cases]
    result = model.generate_tokens(prompts, options, forced=forced, limits=limits, on_prefill=on_prefill)
    tokenizer = tokenizer_of(model)
    records = []
    for row, case in enumerate(cases):
        count = len(case.forced)
        new = result.tokens[row][count:] if case.max_new_tokens else []
        held = result.pages_held[row]
        records.append(
            {
                "answer": text_of(tokenizer, new, eos_ids=options.eos_ids),
                "references": case.references,
                "prompt_tokens": len(case.tokens) + count,
                "new_tokens": len(new),
                "forced_logprobs": [round(value, 6) for value in result.logprobs[row][:count]],
                "kv_read_share": result.pages_read[row] / held if held else 1.0,
            }
        )
    return records
