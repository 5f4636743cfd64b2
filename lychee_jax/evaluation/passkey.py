"""How often a model finds what is hidden in a long text: `python -m lychee_jax.evaluation.passkey`.

Every prompt is fresh: prose of a given number of tokens with facts hidden in it, and one question at the end. Text goes
in, text comes out, and an answer counts if it is exactly the hidden one. The same prompts, and the same cache after the
dense prefill, serve every attention mode, so that their scores differ by the decoding alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lychee_jax.errors import UserError
from lychee_jax.generate import GenerateOptions
from lychee_jax.loaded import LoadedModel
from lychee_jax.text import Tokenizer
from lychee_jax.training import data

_TRIES = 12  # to meet a length with a tokenizer that is not the generators' own
_SHOWN_ERRORS = 10
_LEAST_BUDGET = 512  # tokens: the pages that are always read take 384 of them


@dataclasses.dataclass(frozen=True)
class Case:
    """One prompt as the model gets it, and the answer it should give."""

    tokens: list[int]
    question: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Task:
    """What is asked: prompts of `length` tokens with `facts` hidden facts of a kind (a key of `data.KINDS`)."""

    kind: str
    length: int
    facts: int
    seed: int = 0

    def case(self, tokenizer: Tokenizer, index: int) -> Case:
        """The prompt of this index: `length` tokens; with another tokenizer than the bundled one, hardly fewer.

        Raises:
            UserError: an unknown kind, no facts, or a length that has no room for them.
        """
        if self.kind not in data.KINDS:
            raise UserError(f"kind is {self.kind!r}; use one of {', '.join(data.KINDS)}")
        if self.facts < 1:
            raise UserError(f"facts is {self.facts}; at least 1 must be hidden")
        best: Case | None = None
        pieces = self.length
        for _ in range(_TRIES):
            rng = np.random.default_rng([self.seed, self.length, self.facts, index])
            try:
                prompt = data.prompt(rng, self.kind, pieces, self.facts)
            except ValueError as error:
                raise UserError(f"length {self.length}: {error}") from error
            tokens = tokenizer.encode(prompt.text)
            if len(tokens) <= self.length and (best is None or len(tokens) > len(best.tokens)):
                best = Case(tokens, prompt.text.splitlines()[-2], prompt.answer)
            if len(tokens) == self.length:
                break
            pieces += self.length - len(tokens)
        if best is None:
            raise UserError(
                f"no prompt of {self.length} tokens found; this tokenizer needs more for {self.facts} facts"
            )
        return best


def is_right(text: str, answer: str) -> bool:
    """Whether a generated text is the answer: its first line, without white space around it and a closing full stop."""
    first_line = text.strip().split("\n", 1)[0]
    return first_line.strip().removesuffix(".") == answer


def score(
    model: LoadedModel,
    task: Task,
    options: Sequence[GenerateOptions],
    *,
    samples: int,
    batch: int = 8,
    on_progress: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Exact match of `samples` prompts in each way to generate, one entry each, as plain data.

    Raises:
        UserError: bad numbers, or a model without a tokenizer.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise UserError(f"{model.path} has no tokenizer, and passkeys are text")
    if samples < 1 or batch < 1:
        raise UserError(f"samples is {samples} and batch is {batch}; both must be at least 1")
    room = max(each.max_new_tokens for each in options)
    rows: list[dict[str, Any]] = [{"right": 0, "errors": [], "attention": {}} for _ in options]
    tokens = 0
    for first in range(0, samples, batch):
        cases = [task.case(tokenizer, index) for index in range(first, min(first + batch, samples))]
        tokens += sum(len(case.tokens) for case in cases)
        prompts = [case.tokens for case in cases]
        filled = model.engine.prefill(prompts, max_new_tokens=room, page_size=options[0].page_size)
        for i, (row, each) in enumerate(zip(rows, options, strict=True)):
            stream = model.engine.decode(filled, each, keep=i + 1 < len(options))
            for _ in stream:
                pass
            result = stream.result()
            row["attention"] = result.attention
            for case, ids in zip(cases, result.tokens, strict=True):
                text = tokenizer.decode(ids)
                if is_right(text, case.answer):
                    row["right"] += 1
                else:
                    row["errors"].append({"question": case.question, "answer": case.answer, "got": text})
        if on_progress is not None:
            on_progress(len(cases))
    return [
        {
            **dataclasses.asdict(task),
            "samples": samples,
            "prompt_tokens_mean": tokens / samples,
            "exact_match": row["right"] / samples,
            "attention": row["attention"],
            "errors": row["errors"][:_SHOWN_ERRORS],
        }
        for row in rows
    ]


def run(
    model: Annotated[str | None, typer.Option(help="Folder of the model (default: the bundled one).")] = None,
    length: Annotated[list[int] | None, typer.Option(help="Prompt tokens; give it several times for several.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help=f"What is hidden: {', '.join(data.KINDS)}.")] = None,
    facts: Annotated[int, typer.Option(help="Facts hidden in each prompt.")] = 16,
    samples: Annotated[int, typer.Option(help="Prompts of each kind and length.")] = 200,
    seed: Annotated[int, typer.Option(help="Another seed gives other prompts.")] = 0,
    attention: Annotated[list[str] | None, typer.Option(help="dense, hybrid; several times for several.")] = None,
    heads: Annotated[str | None, typer.Option(help="Head map: FILE, all or none (default: the model's).")] = None,
    budget_share: Annotated[int, typer.Option(help="Hybrid budget: the length divided by this, but at least 512.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 48,
    batch: Annotated[int, typer.Option(help="Prompts at a time.")] = 8,
    dtype: Annotated[Literal["float32", "bfloat16"] | None, typer.Option(help="Of weights and cache.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the results here as JSON, too.")] = None,
) -> None:
    """Exact match on facts hidden in long text, dense and hybrid on the same prompts."""
    # The top floor may know the command line's loader; everything above works on any loaded model.
    from lychee_jax.loading import load

    loaded = load(model, dtype)
    lengths, kinds, modes = length or [16384], kind or ["passkey"], attention or ["dense", "hybrid"]
    if budget_share < 1:
        raise UserError(f"budget share is {budget_share}; it must be at least 1")
    results: list[dict[str, Any]] = []
    report = {
        "model": loaded.path.name,
        "fingerprint": loaded.config.fingerprint(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "results": results,
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=samples * len(lengths) * len(kinds))
        for task in (Task(each, tokens, facts, seed) for tokens in lengths for each in kinds):
            progress.update(bar, description=f"{task.kind} at {task.length}")
            page = GenerateOptions().page_size
            budget = max(_LEAST_BUDGET, task.length // budget_share // page * page)
            options = [
                loaded.options(attention=mode, heads=heads, budget=budget, max_new_tokens=max_new_tokens)
                for mode in modes
            ]
            found = score(
                loaded, task, options, samples=samples, batch=batch, on_progress=lambda n: progress.advance(bar, n)
            )
            for mode, entry in zip(modes, found, strict=True):
                results.append({"mode": mode, **entry})
                typer.echo(f"{task.kind}, {task.length} tokens, {mode}: exact match {entry['exact_match']:.3f}")
            if output is not None:  # after each task, for a long evaluation may be stopped
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        typer.run(run)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None
