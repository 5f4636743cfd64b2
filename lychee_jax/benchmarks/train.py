"""Time and memory of a step that learns head roles, for a model of random weights."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lychee_jax.benchmarks.step import peak_bytes, random_model
from lychee_jax.config import ModelConfig
from lychee_jax.data.questions import Asked
from lychee_jax.errors import UserError
from lychee_jax.llm import LLM
from lychee_jax.training.learn_heads import Learner, TrainingPlan, make_batch

_QUESTION, _ANSWER = 16, 48


@dataclasses.dataclass(frozen=True)
class TrainRow:
    """One plan. `seconds` is the median of `samples_s`, each a step from batch to new gates."""

    name: str
    model: str
    dtype: str
    batch: int
    context: int
    answer_tokens: int
    loss: str
    seconds: float
    samples_s: list[float]
    weight_bytes: int
    peak_bytes: int | None


@dataclasses.dataclass(frozen=True)
class RandomTokens:
    """Documents of random tokens with random questions and answers: a model of random weights learns nothing anyway."""

    vocab_size: int

    def __call__(self, rng: np.random.Generator, length: int, room: int) -> Asked:
        """As many questions and answers as there is room for; see `questions.QuestionSource`."""
        answers = [0] * length
        while len(answers) + _QUESTION + _ANSWER <= length + room:
            answers += [len(answers)] * _ANSWER + [0] * _QUESTION
        if len(answers) == length:
            answers += [1] * room
        return Asked(rng.integers(0, self.vocab_size, len(answers)).tolist(), answers)


def measure(
    model: str,
    config: ModelConfig,
    plan: TrainingPlan,
    *,
    dtype: Any = jnp.bfloat16,
    repeats: int = 5,
    report: Callable[[str], None] = lambda line: None,
) -> TrainRow:
    """Take `repeats` steps of a plan whose prompts all have `max_length` tokens, after one that compiles.

    Raises UserError for a plan that does not fit the model or the devices, and for a loss that is no number.
    """
    plan = dataclasses.replace(plan, min_length=plan.max_length)
    plan.check(config)  # before there are weights: they take long
    spec, weights = random_model(config, dtype)
    loaded = LLM(Path(model), dataclasses.replace(config, dtype=str(jnp.dtype(dtype))), spec.merge(weights), None, ())
    learner = Learner(loaded, plan, RandomTokens(config.vocab_size))
    state, samples = learner.initial(), []
    for step in range(repeats + 1):
        report(f"{model}, {plan.max_length} tokens, step {step} of {repeats}")
        batch = make_batch(plan, learner.source, step)
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(learner.step(state, step, batch))
        samples.append(time.perf_counter() - start)
        if not bool(metrics["finite"]):
            raise UserError(f"random weights gave a loss that is not a number in {dtype}; try another --dtype")
    return TrainRow(
        "train_step", model, str(jnp.dtype(dtype)), plan.batch, plan.max_length, plan.room, plan.loss,
        float(np.median(samples[1:])), samples[1:], sum(leaf.nbytes for leaf in weights), peak_bytes(None),
    )  # fmt: skip


def table(rows: list[TrainRow]) -> str:
    """The rows as text."""
    lines = [f"{'model':<12} {'loss':<7} {'batch':>5} {'tokens':>7} {'seconds':>8} {'peak GB':>8}  a step"]
    for row in rows:
        peak = "–" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.1f}"
        lines.append(f"{row.model:<12} {row.loss:<7} {row.batch:>5} {row.context:>7} {row.seconds:>8.3f} {peak:>8}")
    return "\n".join(lines)
