"""Prompts that no training has seen, with their right answers, in the bundled model's language."""

from __future__ import annotations

import dataclasses

import numpy as np

from lychee_jax.data import facts as data
from lychee_jax.data import language
from lychee_jax.errors import UserError

ANSWER_TOKENS = {"only-passkey": 9, "passkey": 9, "lookup": 9, "variable": 39}
"""The longest answer of every task in tokens, its end included."""
TASKS = tuple(ANSWER_TOKENS)
DIALOGUE = "dialogue"
HELD_OUT, VALIDATION, CALIBRATION = 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35
"""First words of the seeds. Training's seeds begin with small numbers, so these streams are never theirs."""


def facts_for(context: int) -> int:
    """Facts that are hidden in a prompt: 16, or fewer where they would fill it."""
    return max(1, min(16, context // 128))


def prompt(
    stream: int, task: str, context: int, index: int, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The prompt of this index: `tokens [context]` and its answer, padded with −1.

    Raises:
        UserError: too few tokens for the facts.
    """
    rng = np.random.default_rng([stream, TASKS.index(task), context, index, seed])
    try:
        made = data.prompt(rng, task, context, facts_for(context))
    except ValueError as error:
        raise UserError(f"contexts: {error}") from error
    answer = [*language.tokens_of(" " + made.answer), language.EOS]
    padded = np.full(ANSWER_TOKENS[task], -1, np.int32)
    padded[: len(answer)] = answer
    return np.asarray(made.tokens, np.int32), padded


def prompts(
    stream: int, task: str, context: int, indices: range, *, rows: int | None = None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """`tokens [rows, context]` and `answers [rows, A]`; rows past the indices repeat a prompt, without an answer."""
    made = [prompt(stream, task, context, index, seed=seed) for index in indices]
    spare = (rows or len(made)) - len(made)
    tokens = [row for row, _ in made] + [made[0][0]] * spare
    answers = [row for _, row in made] + [np.full_like(made[0][1], -1)] * spare
    return np.stack(tokens), np.stack(answers)


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """A document, then questions and their answers: `answers[i]` is j at tokens of the j-th answer, else 0."""

    document: list[int]
    tokens: list[int]
    answers: list[int]


def dialogue(context: int, total: int, index: int) -> Dialogue:
    """A document of `context` tokens and up to `total` tokens of questions and answers, no answer cut.

    Facts are drawn with replacement, so a question may come again.

    Raises:
        UserError: too few tokens for the facts, or for one answer.
    """
    rng = np.random.default_rng([HELD_OUT, len(TASKS), context, index, total])
    hidden = data.mixed(rng, facts_for(context))
    try:
        document, _ = data.hide(rng, hidden, context)
    except ValueError as error:
        raise UserError(f"contexts: {context} tokens are too few for a document: {error}") from error
    tokens: list[int] = []
    marks: list[int] = []
    for number in range(1, total):
        fact = hidden[int(rng.integers(len(hidden)))]
        question, answer = data.ask(rng, fact), [*fact.answer, language.EOS]
        if len(tokens) + len(question) + len(answer) > total:
            break
        tokens += question + answer
        marks += [0] * len(question) + [number] * len(answer)
    if not tokens:
        raise UserError(f"dialogue-tokens: {total} tokens hold no question with its answer")
    return Dialogue(document.tolist(), tokens, marks)
