"""Fills in the rows: every chunk of prompts is read once, for all rows that still lack it."""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.engine.options import GenerateOptions
from lychee_jax.engine.outputs import Result
from lychee_jax.llm import LLM
from lychee_jax.studies.head_maps.maps import roles_of
from lychee_jax.studies.head_maps.prompts import ANSWER_TOKENS, DIALOGUE, HELD_OUT, dialogue, prompts
from lychee_jax.studies.head_maps.rows import CORRECT_EVERY, Row
from lychee_jax.studies.head_maps.tally import Count, Tally
from lychee_jax.studies.scorer import ProgramKey, Scorer

type OnCount = Callable[[int], None]


type MapOf = Callable[[Row], HeadMap]
type PolicyOf = Callable[[Row], SelectionPolicy]


@dataclasses.dataclass(frozen=True)
class Job:
    """A chunk of one cell's prompts, and the rows that lack it. All chunks of a cell are `width` prompts wide; the last
    one may have fewer.
    """

    task: str
    context: int
    indices: range
    width: int
    rows: tuple[Row, ...]


def jobs(rows: Sequence[Row], samples: int, chunk_tokens: int, tally: Tally) -> list[Job]:
    """What is still to be done, chunk by chunk; each row comes with its dense one."""
    cells: dict[tuple[str, int], dict[Row, None]] = {}
    for row in rows:
        cells.setdefault((row.task, row.context), {}).update({row.dense: None, row: None})
    found = []
    for (task, context), wanted in cells.items():
        # What is read at once bounds the memory.
        size = max(1, min(samples, chunk_tokens // context))
        for first in range(0, samples, size):
            missing = tuple(row for row in wanted if not tally.has(row, first))
            if missing:
                found.append(Job(task, context, range(first, min(first + size, samples)), size, missing))
    return found


def programs(todo: Sequence[Job], policy_of: PolicyOf) -> Iterator[ProgramKey]:
    """What `score_answers` runs, in its order."""
    for job in todo:
        for row in job.rows:
            yield ProgramKey(job.width, job.context, ANSWER_TOKENS[job.task], policy_of(row), row.page_size)


def score_answers(
    scorer: Scorer, todo: Sequence[Job], map_of: MapOf, policy_of: PolicyOf, tally: Tally, report: OnCount
) -> None:
    """Score all jobs on single answers; `report(rows)` after every row of a chunk."""

    def make(job: Job) -> tuple[np.ndarray, np.ndarray]:
        return prompts(HELD_OUT, job.task, job.context, job.indices, rows=job.width)

    scorer.prepare(programs(todo, policy_of))
    host = concurrent.futures.ThreadPoolExecutor(1)
    try:
        for job, (tokens, answers) in zip(todo, host.map(make, todo), strict=True):
            memory = scorer.read(tokens, ANSWER_TOKENS[job.task])
            for row in job.rows:
                roles = roles_of(map_of(row))
                verdict = scorer.score(memory, answers, roles, policy_of(row), row.page_size)
                count = len(job.indices)
                right = int(verdict.right[:count].sum())
                read = verdict.sparse_read + int(roles.sum()) * verdict.held
                tally.add(row, job.indices.start, Count(right, count, read, roles.size * verdict.held))
                report(1)
    finally:
        host.shutdown(cancel_futures=True)


def score_dialogues(
    model: LLM, todo: Sequence[Job], map_of: MapOf, policy_of: PolicyOf, tally: Tally, report: OnCount, *,
    tokens: int,
) -> None:  # fmt: skip
    """Score long generations: their tokens are fed one by one through the decode path, the questions' too.

    `report(steps)` after every few tokens.
    """
    for job in todo:
        made = [dialogue(job.context, tokens, index) for index in job.indices]
        page_size = job.rows[0].page_size
        for row in job.rows:
            options = GenerateOptions(
                "dense" if row.method == "dense" else "hybrid", map_of(row), policy_of(row), page_size,
                correct_every=CORRECT_EVERY if row.correction else 0,
            )  # fmt: skip
            forced = [each.tokens for each in made]
            fed = _feed(model, [each.document for each in made], forced, options, report)
            right = total = 0
            for each, greedy in zip(made, fed.greedy, strict=True):
                answers = exact(np.asarray(each.answers), np.asarray(greedy))
                right, total = right + int(answers.sum()), total + len(answers)
            tally.add(row, job.indices.start, Count(right, total, sum(fed.pages_read), sum(fed.pages_held)))


def _feed(
    model: LLM, prompts: Sequence[list[int]], forced: Sequence[list[int]], options: GenerateOptions, report: OnCount
) -> Result:
    """Take each row's tokens instead of sampled ones; `report(steps)` as every row has taken them."""
    stream = model.stream_tokens(prompts, options, forced=forced, limits=[len(row) for row in forced])
    came, told = [0] * len(prompts), 0
    for row, output in stream:
        came[row] += len(output.tokens)
        if (done := min(came)) > told:
            report(done - told)
            told = done
    return stream.result()


def exact(answers: np.ndarray, greedy: Bool[np.ndarray, " T"]) -> Bool[np.ndarray, " n"]:
    """Of every marked answer, whether all of its tokens are greedy decoding's."""
    wrong = np.bincount(answers[~greedy], minlength=int(answers.max()) + 1)
    return wrong[1:] == 0


def is_dialogue(row: Row) -> bool:
    """Whether the row is about a long generation."""
    return row.task == DIALOGUE
