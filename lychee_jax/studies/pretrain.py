"""Train the bundled model from nothing: `python -m lychee_jax.studies.pretrain --output DIR`.

Copying comes first: a model that cannot copy never learns to match keys. Then come documents with hidden facts and
questions, the context grown in stages. The run checkpoints, and the same command resumes it; `DIR/model` is the result.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lychee_jax.config import ModelConfig, RopeConfig
from lychee_jax.data import facts as data
from lychee_jax.data import language
from lychee_jax.errors import UserError
from lychee_jax.files import json_text
from lychee_jax.models.rope import rotary_tables
from lychee_jax.models.spec import Functional, Params
from lychee_jax.run_folder import MetricsFile, claim
from lychee_jax.studies.bundled_tokenizer import save_tokenizer
from lychee_jax.training.loop import Checkpoints, answer_losses, mean_metrics, prefetch

CONFIG = ModelConfig(
    family="llama",
    vocab_size=language.VOCAB_SIZE,
    hidden_size=256,
    intermediate_size=768,
    num_layers=8,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    max_position_embeddings=65536,
    rope=RopeConfig(theta=1e6),
    tie_word_embeddings=True,
    dtype="bfloat16",
    bos_token_id=language.BOS,
    eos_token_ids=(language.EOS,),
)


@dataclasses.dataclass(frozen=True)
class Stage:
    """Some steps on sequences of one length: `facts` (fewest, most) hidden in each document, or (0, 0) for copying."""

    name: str
    length: int
    batch: int
    steps: int
    facts: tuple[int, int] = (0, 0)
    questions: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of the whole stage."""
        return self.length * self.batch * self.steps


# Lengths are multiples of 64 (cuDNN's backward pass asks for it); the last is a little longer than what is tested.
# Long documents have more questions, for a step is to learn from as many answers as it can.
RECIPE = (
    Stage("copying", 256, 256, 700),
    Stage("documents-512", 512, 128, 1500, (1, 8), 8),
    Stage("documents-2k", 2048, 32, 800, (1, 32), 32),
    Stage("documents-8k", 8192, 16, 500, (1, 96), 64),
    Stage("documents-16k", 16384, 8, 500, (1, 128), 96),
    Stage("documents-33k", 33792, 4, 800, (1, 160), 128),
)


@dataclasses.dataclass(frozen=True)
class PretrainingPlan:
    """Everything that decides the result of a run."""

    config: ModelConfig = CONFIG
    stages: tuple[Stage, ...] = RECIPE
    seed: int = 0
    learning_rate: float = 1.5e-3
    warmup: int = 100
    weight_decay: float = 0.01
    prose_weight: float = 0.1
    dtype: str = "bfloat16"

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> Stage:
        """The stage that the step of this index (from 0) belongs to."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise IndexError("past the last step")


def make_batch(plan: PretrainingPlan, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and answer marks `[B, T]` of a step: a function of the plan and the step alone."""
    stage = plan.stage_at(step)
    rng = np.random.default_rng([plan.seed, step])
    if stage.questions and stage.facts[1]:
        rows = [data.documents(rng, stage.length, stage.facts, stage.questions) for _ in range(stage.batch)]
    else:
        rows = [data.copying(rng, stage.length) for _ in range(stage.batch)]
    return (
        np.stack([row.tokens for row in rows]).astype(np.int32),
        np.stack([row.answers for row in rows]).astype(np.int32),
    )


def optimizer(plan: PretrainingPlan) -> optax.GradientTransformation:
    """AdamW; the rate falls linearly with the share of all *tokens* seen, for late steps are long ones."""
    ends = np.cumsum([0, *(stage.steps for stage in plan.stages)])
    share = np.cumsum([0, *(stage.tokens for stage in plan.stages)]) / sum(stage.tokens for stage in plan.stages)

    def rate(count: jax.Array) -> jax.Array:
        step = count.astype(jnp.float32)
        progress = jnp.interp(step, jnp.asarray(ends, jnp.float32), jnp.asarray(share, jnp.float32))
        return plan.learning_rate * jnp.minimum((step + 1.0) / plan.warmup, 1.0 - 0.99 * progress)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b1=0.9, b2=0.98, weight_decay=plan.weight_decay),  # pyright: ignore[reportArgumentType]
    )


def _loss(
    params: Params,
    tokens: jax.Array,
    answers: jax.Array,
    angles: tuple[jax.Array, jax.Array],
    *,
    model: Functional,
    plan: PretrainingPlan,
    stage: Stage,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    decoder = model.bind(params, jnp.dtype(plan.dtype))
    metrics = answer_losses(decoder.logits(decoder.hidden(tokens, *angles)), tokens, answers, stage.questions)
    prose = plan.prose_weight if stage.facts[1] else 0.0  # random tokens have no grammar to learn
    return metrics["answer_loss"] + prose * metrics["prose_loss"], metrics


def _train_step(
    state: dict[str, Any],
    tokens: jax.Array,
    answers: jax.Array,
    angles: tuple[jax.Array, jax.Array],
    *,
    model: Functional,
    plan: PretrainingPlan,
    stage: Stage,
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    loss = functools.partial(_loss, model=model, plan=plan, stage=stage)
    gradient, metrics = jax.grad(loss, has_aux=True)(state["params"], tokens, answers, angles)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of its integer step count
        updates, optimizer_state = optimizer(plan).update(gradient, state["optimizer"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "optimizer": optimizer_state}, metrics


class _Steps:
    """The compiled step of every stage; all are compiled from the start, behind the training of the first ones."""

    def __init__(self, plan: PretrainingPlan, model: Functional, state: Any, stages: list[Stage]) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)

        def build(stage: Stage) -> Any:
            step = functools.partial(_train_step, model=model, plan=plan, stage=stage)
            rows = jax.ShapeDtypeStruct((stage.batch, stage.length), jnp.int32)
            angle = jax.ShapeDtypeStruct((1, stage.length, plan.config.head_dim // 2), jnp.float32)
            return jax.jit(step, donate_argnums=0).lower(shapes, rows, rows, (angle, angle)).compile()

        self._built = {stage.name: self._pool.submit(build, stage) for stage in stages}

    def __getitem__(self, stage: Stage) -> Any:
        return self._built[stage.name].result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def angles(config: ModelConfig, length: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines `[1, T, H/2]` of the positions from 0."""
    positions, lengths = np.arange(length)[None], np.array([length])
    cos, sin = rotary_tables(config.rope, config.head_dim, config.max_position_embeddings, positions, lengths)
    return jnp.asarray(cos), jnp.asarray(sin)


def pretrain(
    output: Path, plan: PretrainingPlan, *, workers: int = 0, minutes: float | None = None, log_every: int = 20
) -> Params | None:
    """Train, or resume, in the folder `output`; returns the parameters, or None if the time was up before the end.

    Raises UserError if the folder holds a run with another plan.
    """
    started = time.monotonic()
    claim(output, dataclasses.asdict(plan))
    model = Functional(plan.config)
    params = model.initial(plan.seed, (2 * plan.config.num_layers) ** -0.5)
    state: dict[str, Any] = {"params": params, "optimizer": optimizer(plan).init(params)}
    checkpoints = Checkpoints(output / "checkpoints")
    done, state = checkpoints.restore(state) or (0, state)
    metrics_file = MetricsFile(output / "metrics.jsonl", done)
    ends = itertools.accumulate(stage.steps for stage in plan.stages)
    left = [(stage, end) for stage, end in zip(plan.stages, ends, strict=True) if end > done]
    steps = _Steps(plan, model, state, [stage for stage, _ in left])
    batches = prefetch(functools.partial(make_batch, plan), range(done, plan.steps), workers)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    late = False
    try:
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
            bar = progress.add_task("compiling", total=plan.steps, completed=done)
            for stage, end in left:
                step, tables = steps[stage], angles(plan.config, stage.length)
                window: list[dict[str, jax.Array]] = []
                since = time.monotonic()
                while done < end and not late:
                    state, metrics = step(state, *next(batches), tables)
                    done += 1
                    window.append(metrics)
                    if done % log_every and done < end:
                        continue
                    means, now = mean_metrics(window), time.monotonic()
                    rate = len(window) * stage.batch * stage.length / (now - since)
                    metrics_file.write(step=done, stage=stage.name, **means, tokens_per_s=rate, seconds=now - started)
                    shown = f"{stage.name}: loss {means['answer_loss']:.3f}, exact {means['exact']:.3f}"
                    progress.update(bar, description=shown, completed=done)
                    window, since = [], now
                    late = minutes is not None and now - started > 60 * minutes
                if late or done == end:
                    checkpoints.save(done, state)
                if late:
                    break
    finally:
        batches.close()
        steps.close()
        checkpoints.close()
    return state["params"] if done == plan.steps else None


def exact_match(
    plan: PretrainingPlan, params: Params, *, length: int, samples: int, facts: int, batch: int = 8
) -> dict[str, float]:
    """For every kind of fact, the share of fresh prompts of `length` tokens answered exactly, EOS included.

    Teacher-forced: an answer counts if each of its tokens is the argmax, as greedy decoding would then give it.
    """
    model = Functional(plan.config)
    padded = -(-(length + 64) // 64) * 64
    stage = Stage("scores", padded, batch, 1)

    @jax.jit
    def score(params: Params, tokens: jax.Array, answers: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _loss(params, tokens, answers, tables, model=model, plan=plan, stage=stage)[1]["exact"]

    tables = angles(plan.config, padded)
    scores: dict[str, list[jax.Array]] = {kind: [] for kind in data.KINDS}
    for kind, found in scores.items():
        rng = np.random.default_rng([plan.seed, length, 0xFEED])
        for _ in range(0, samples, batch):
            tokens = np.full((batch, padded), language.PAD, np.int32)
            answers = np.zeros((batch, padded), np.int32)
            for row in range(batch):
                prompt = data.prompt(rng, kind, length, facts)
                answer = [*language.tokens_of(" " + prompt.answer), language.EOS]
                tokens[row, : length + len(answer)] = [*prompt.tokens, *answer]
                answers[row, length : length + len(answer)] = 1
            found.append(score(params, tokens, answers, tables))
    return {kind: float(np.mean(jax.device_get(found))) for kind, found in scores.items()}


def main(
    output: Annotated[Path, typer.Option(help="Folder of the run: resumed if it holds one, created if missing.")],
    seed: Annotated[int, typer.Option(help="Decides the initial weights and all data.")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Processes that make batches ahead (0: none).")] = 12,
    minutes: Annotated[float | None, typer.Option(help="Stop after about so many minutes; run again to go on.")] = None,
) -> None:
    """Train the bundled model on an accelerator (about ten minutes on an H200) and write it to OUTPUT/model."""
    # `loading` may import the converter; everything above trains without it.
    from lychee_jax.loading import save

    plan = PretrainingPlan(seed=seed)
    params = pretrain(output, plan, workers=workers, minutes=minutes)
    if params is None:
        typer.echo(f"not finished: the same command goes on from {output}", err=True)
        return
    save(output / "model", plan.config, params)
    save_tokenizer(output / "model", plan.config.max_position_embeddings)
    for length in (2048, 16384, 32768):
        scores = exact_match(plan, params, length=length, samples=200, facts=16)
        typer.echo(f"exact match at {length} tokens: {json_text(scores)}")


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None
