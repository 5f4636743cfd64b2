"""The project in one command: questions about a long document, answered dense and hybrid, side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.data import facts as data
from lychee_jax.data import language
from lychee_jax.engine.options import AttentionMode
from lychee_jax.engine.outputs import Result
from lychee_jax.errors import UserError
from lychee_jax.evaluation.passkey import is_right
from lychee_jax.llm import LLM
from lychee_jax.plotting.attention import plot_heads
from lychee_jax.text.streaming import text_of
from lychee_jax.text.tokenizer import Tokenizer

_MODES: tuple[AttentionMode, ...] = ("dense", "hybrid")
# How many facts of a kind are hidden, and how many of them are asked for.
_FACTS = {"passkey": (12, 3), "lookup": (8, 2), "variable": (4, 1)}
_NEW_TOKENS = 25  # the longest answer that is asked for, its end included
_PAGE_SIZE = 64
_SHARE = 8  # a sparse head may read this fraction of the document, but not less than the least budget
_LEAST_BUDGET = 512


@dataclasses.dataclass(frozen=True)
class DemoQuestion:
    """One question, where in the document its fact stands (in tokens), and what each attention mode answered."""

    question: str
    expected: str
    position: int
    answers: dict[str, str]
    right: dict[str, bool]


@dataclasses.dataclass(frozen=True)
class DemoReport:
    """What the demo shows; times in milliseconds, shares of the whole cache, both for each attention mode."""

    model: str
    seed: int
    document_tokens: int
    facts: int
    questions: list[DemoQuestion]
    prefill_s: float
    token_ms: dict[str, float | None]  # None: no token after the first
    kv_read_share: dict[str, float]
    budget: int
    retrieval_heads: int
    kv_heads: int
    picture: str

    def __str__(self) -> str:
        table = Table(
            "question", "hidden at", "expected", *_MODES,
            title=f"{self.facts} facts hidden in {self.document_tokens:,} tokens (seed {self.seed})",
            title_justify="left", show_lines=True,
        )  # fmt: skip
        for each in self.questions:
            marks = [f"{'✓' if each.right[mode] else '✗'} {each.answers[mode]}" for mode in _MODES]
            table.add_row(each.question, f"{each.position:,}", each.expected, *marks)
        sums = Table("", *_MODES)
        count = len(self.questions)
        sums.add_row("right answers", *(f"{sum(q.right[mode] for q in self.questions)} of {count}" for mode in _MODES))
        sums.add_row("time per token", *(f"{ms:.1f} ms" if (ms := self.token_ms[mode]) else "–" for mode in _MODES))
        sums.add_row("share of the KV cache read", *(f"{self.kv_read_share[mode]:.1%}" for mode in _MODES))
        for column in sums.columns[1:]:
            column.justify = "right"
        others = f", the others at most {self.budget} tokens, which these picked"
        others = others if self.retrieval_heads < self.kv_heads else " (there is no head map)"
        console = Console()
        with console.capture() as capture:
            console.print(table, sums, sep="\n", markup=False)
        return (
            f"{capture.get()}hybrid: {self.retrieval_heads} of {self.kv_heads} KV heads read the whole cache{others}\n"
            f"the document was read once, in {self.prefill_s:.0f} s; all {count} questions were answered together\n"
            f"head roles: {self.picture}"
        )


def run(model: LLM, output: Path, *, seed: int = 0, length: int = 16384) -> DemoReport:
    """Hide facts in a document of `length` tokens, ask for some of them, and draw the head roles into `output`.

    Raises:
        UserError: a model without a tokenizer or with too small a limit, or a document too short for the facts.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise UserError(f"{model.path} has no tokenizer, and the demo asks in words")
    document, asked = _exam(np.random.default_rng(seed), length)
    heads = model.choose_heads()
    budget = max(_LEAST_BUDGET, length // _SHARE // _PAGE_SIZE * _PAGE_SIZE)
    prompts = [tokenizer.encode(document + question) for question, _, _ in asked]
    model.check_prompts(prompts, _NEW_TOKENS)
    output.mkdir(parents=True, exist_ok=True)
    # The first mode reads the document, the others find it in the prefix cache.
    results = {mode: _answer(model, prompts, mode, heads, budget) for mode in _MODES}

    questions = []
    for row, (question, fact, position) in enumerate(asked):
        expected = language.text_of(fact.answer).strip()
        answers = {mode: _text(model, tokenizer, results[mode].tokens[row]) for mode in _MODES}
        right = {mode: is_right(answer, expected) for mode, answer in answers.items()}
        questions.append(DemoQuestion(_bare(question), expected, position, answers, right))
    share = {mode: result.attention.kv_read_share for mode, result in results.items()}
    total = heads.num_layers * heads.num_kv_heads
    sparse = total - heads.num_retrieval
    picture = output / "heads.png"
    plot_heads(
        heads, picture, sparse_share=(share["hybrid"] * total - heads.num_retrieval) / sparse if sparse else None
    )
    return DemoReport(
        model=model.name,
        seed=seed,
        document_tokens=len(tokenizer.encode(document)),
        facts=sum(hidden for hidden, _ in _FACTS.values()),
        questions=questions,
        prefill_s=results[_MODES[0]].timing.prefill_s,
        token_ms={
            mode: 1e3 / rate if (rate := result.timing.tokens_per_s) else None for mode, result in results.items()
        },
        kv_read_share=share,
        budget=budget,
        retrieval_heads=heads.num_retrieval,
        kv_heads=total,
        picture=str(picture),
    )


def _exam(rng: np.random.Generator, length: int) -> tuple[str, list[tuple[str, data.Fact, int]]]:
    """A document's text, and its questions: text, fact, and where the fact stands."""
    made = {kind: data.KINDS[kind](rng, hidden) for kind, (hidden, _) in _FACTS.items()}
    # All kinds mixed, each in its own order: a variable stands after the one that it refers to.
    waiting = {kind: iter(facts) for kind, facts in made.items()}
    order = rng.permutation([kind for kind, facts in made.items() for _ in facts])
    facts = [next(waiting[str(kind)]) for kind in order]
    try:
        document, starts = data.hide(rng, facts, length)
    except ValueError as error:
        raise UserError(f"a document of {length} tokens is too short for {len(facts)} facts") from error
    places: list[int] = []
    for kind, (_, asked) in _FACTS.items():
        short = [place for place, fact in enumerate(facts) if fact.kind == kind and len(fact.answer) < _NEW_TOKENS]
        places += rng.choice(short, size=asked, replace=False).tolist()
    questions = [language.text_of(data.ask(rng, facts[place])) for place in places]
    return language.text_of(document[1:]), [
        (question, facts[place], starts[place]) for question, place in zip(questions, places, strict=True)
    ]


def _answer(model: LLM, prompts: Sequence[list[int]], mode: AttentionMode, heads: HeadMap, budget: int) -> Result:
    """Answer all questions, in equally many steps each, so that times compare."""
    options = model.options(
        attention=mode, heads=heads, budget=budget, page_size=_PAGE_SIZE, max_new_tokens=_NEW_TOKENS, ignore_eos=True
    )
    columns = (TextColumn("Reading"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=None)
        return model.generate_tokens(
            prompts, options, on_prefill=lambda done, total: progress.update(bar, completed=done, total=total)
        )


def _text(model: LLM, tokenizer: Tokenizer, tokens: list[int]) -> str:
    """The first line of an answer, up to the end-of-text token."""
    return text_of(tokenizer, tokens, eos_ids=model.eos_ids).strip().split("\n", 1)[0].strip()


def _bare(question: str) -> str:
    """A question without what stands around it in the prompt."""
    return question.strip().removesuffix("Answer:").strip().removeprefix("Question:").strip()
