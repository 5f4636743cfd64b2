"""Learning which KV heads retrieve: gates trained against the model's own dense attention (arXiv 2602.04541).

Only the gates change. A run is a folder: it checkpoints there, and the same call goes on where it stopped, bit for bit,
for batches and draws are functions of the seed and the step alone.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Float32

from lychee_jax.attention.head_map import HeadMap, even_roles
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.cache.allocator import pages_for
from lychee_jax.config import ModelConfig
from lychee_jax.data.questions import QuestionSource, Writer, make_source
from lychee_jax.errors import UserError
from lychee_jax.files import check_tensor_path, digest_of, json_text, read_text, write_text
from lychee_jax.llm import LLM
from lychee_jax.models.rope import rotary_tables
from lychee_jax.parallel.mesh import EVERYWHERE, ROWS, data_mesh
from lychee_jax.plotting.attention import plot_heads
from lychee_jax.plotting.training import plot_training
from lychee_jax.run_folder import MetricsFile, claim
from lychee_jax.training import gates
from lychee_jax.training.distill import Loss, departures
from lychee_jax.training.lagrangian import Lagrangian
from lychee_jax.training.loop import Checkpoints, Patience

type State = dict[str, Any]
type OnStep = Callable[[int, dict[str, float]], None]

METRICS, HEADS, GATES, CHECKPOINTS = "metrics.jsonl", "heads.json", "gates.json", "checkpoints"
ROLES, TRAINING = "heads.png", "training.png"
FILES = (HEADS, ROLES, GATES, METRICS, TRAINING, CHECKPOINTS)
"""What a finished run leaves in its folder, its plan aside."""
_RAMP, _FLOOR = 0.2, 0.1  # of the learning rate's schedule: share of the steps, share of the rate
_BUCKETS = 4
_TRIALS = 32
_POLICY = SelectionPolicy(budget=1 << 20, rule="ratio", ratio=0.3)
_compilers = concurrent.futures.ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="compile")


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """Everything that decides the result of a run, the model aside. The defaults are the paper's recipe.

    `retrieval_heads` counts layer 0. `policy` is what sparse heads read while training; its budget is only a cap.
    `room`: tokens of a row after its prompt: answers, and the questions between them.
    """

    retrieval_heads: int
    steps: int = 3000
    batch: int = 1
    seed: int = 0
    family: str = "hardkuma"
    loss: Loss = "hidden"
    data: str = "passkeys"
    facts: int = 10
    questions: int = 10
    text: str | None = None
    file: str | None = None
    min_length: int = 1024
    max_length: int = 10240
    room: int = 768
    learning_rate: float = 0.01
    multiplier: float = 2.0
    multiplier_rate: float = 0.001
    policy: SelectionPolicy = _POLICY
    page_size: int = 64

    def __post_init__(self):
        for name in ("steps", "batch", "facts", "questions", "room", "min_length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.min_length > self.max_length:
            raise UserError(f"min-length is {self.min_length}, more than max-length, {self.max_length}")
        if self.family not in gates.FAMILIES:
            raise UserError(f"gates {self.family!r} are unknown; use one of {', '.join(gates.FAMILIES)}")
        if self.loss not in ("hidden", "logits"):
            raise UserError(f"loss {self.loss!r} is unknown; use hidden or logits")
        if not 0 <= self.seed < 1 << 31:
            raise UserError(f"seed is {self.seed}; it must be at least 0 and below 2³¹")
        for name in ("learning_rate", "multiplier"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise UserError(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be above 0")
        if not 0.0 <= self.multiplier_rate < math.inf:
            raise UserError(f"multiplier-rate is {self.multiplier_rate}; it must not be negative")
        self.policy.validate(self.page_size)

    def check(self, config: ModelConfig) -> None:
        """Raise UserError if the plan does not fit a model of this config, or the devices."""
        total = config.num_layers * config.num_kv_heads
        if not config.num_kv_heads <= self.retrieval_heads <= total:
            raise UserError(
                f"retrieval-heads is {self.retrieval_heads}; layer 0 alone has {config.num_kv_heads}, "
                f"and the model has {total} KV heads"
            )
        if config.num_layers < 2:
            raise UserError("the model has one layer, all of whose heads retrieve: there is nothing to learn")
        # A dynamic base grows with the sequence past the original positions: no table would fit all rows of a batch.
        end = config.max_position_embeddings if config.rope.kind == "dynamic" else config.max_tokens
        if self.max_length + self.room > end:
            raise UserError(
                f"max-length {self.max_length} and the answers' room of {self.room} make "
                f"{self.max_length + self.room} tokens, but the model has positions for {end}"
            )
        data_mesh(self.batch)

    def draw(self, step: int) -> tuple[np.random.Generator, int]:
        """What the prompts of a step are drawn with, and about how many tokens they have."""
        rng = np.random.default_rng([self.seed, step])
        return rng, int(rng.integers(self.min_length, self.max_length + 1))

    def capacity(self, length: int) -> int:
        """Tokens of the compiled row that a prompt of `length` goes into, one of a few, so that few are compiled."""
        step = -(-self.max_length // _BUCKETS)
        # Whole 64s: cuDNN's attention asks for them.
        return -(-(-(-length // step) * step + self.room) // 64) * 64


Plan = TrainingPlan
"""The former name, for one release."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """`tokens [B, S]`, `starts [B]` of the first answers, `answers [B, room]` as `distill.departures` reads them."""

    tokens: np.ndarray
    starts: np.ndarray
    answers: np.ndarray


@dataclasses.dataclass(frozen=True)
class Learned:
    """The head map, E[z] of every KV head `[L, K]` (layer 0: 1), and how many are above 1/2, layer 0 included.

    `lost`: by how much E[z] of the heads of the map is less, all together, than that of the highest.
    """

    head_map: HeadMap
    expected: Float32[np.ndarray, "L K"]
    above_half: int
    lost: float = 0.0


def make_batch(plan: TrainingPlan, source: QuestionSource, step: int) -> Batch:
    """The rows of a step: a function of the plan and the step alone. All have about the same random length."""
    rng, length = plan.draw(step)
    tokens = np.zeros((plan.batch, plan.capacity(length)), np.int32)
    starts = np.zeros(plan.batch, np.int32)
    answers = np.zeros((plan.batch, plan.room), np.int32)
    for row in range(plan.batch):
        asked = source(rng, length, plan.room)
        tokens[row, : len(asked.tokens)] = asked.tokens
        starts[row] = asked.start
        marks = asked.answers[asked.start :]
        answers[row, : len(marks)] = marks
    return Batch(tokens, starts, answers)


def schedule(plan: TrainingPlan) -> optax.Schedule:
    """The learning rate: linear up over the first fifth of the steps, and down over the last, from a tenth of it."""
    ramp = max(1, int(_RAMP * plan.steps))
    low = _FLOOR * plan.learning_rate
    return optax.join_schedules(
        [
            optax.linear_schedule(low, plan.learning_rate, ramp),
            optax.constant_schedule(plan.learning_rate),
            optax.linear_schedule(plan.learning_rate, low, ramp),
        ],
        [ramp, plan.steps - ramp],
    )


class Learner:
    """A frozen model and a plan: the compiled training step, and the state that it changes.

    `source` is what the plan names, unless one is given. Raises UserError where the plan does not fit the model or the
    devices.
    """

    def __init__(self, loaded: LLM, plan: TrainingPlan, source: QuestionSource | None = None) -> None:
        config = loaded.config
        plan.check(config)
        self.plan, self.config, self.family = plan, config, gates.FAMILIES[plan.family]
        share = plan.retrieval_heads / (config.num_layers * config.num_kv_heads)
        self.lagrangian = Lagrangian(share, plan.multiplier, plan.multiplier_rate)
        self.mesh = data_mesh(plan.batch)
        if source is None:
            source = make_source(
                Writer(config, loaded.tokenizer), plan.data, facts=plan.facts, questions=plan.questions,
                text=Path(plan.text) if plan.text else None, file=Path(plan.file) if plan.file else None,
            )  # fmt: skip
        self.source = source
        for draw in range(_TRIALS):  # what does not even fit into the shortest prompts is to be refused at once
            self.source(np.random.default_rng(draw), plan.min_length, plan.room)
        if loaded.spec.layout is not None:
            raise UserError(
                "heads are learned with whole weights on every device; load the model without tensor_parallel"
            )
        self._graph, weights = nnx.split(loaded.model)
        everywhere = jax.sharding.NamedSharding(self.mesh, EVERYWHERE)
        self._place = functools.partial(jax.device_put, device=everywhere)
        self._weights = self._place(weights)
        # As in the recipe: AdamW, but no weight decay.
        self.optimizer = optax.adamw(schedule(plan), weight_decay=0.0)
        # The state is some numbers a head: not worth donating, and so it outlives a step that is interrupted.
        self._step = jax.jit(self._advance, out_shardings=everywhere)
        self._tables: dict[int, tuple[jax.Array, jax.Array]] = {}
        self._programs: dict[int, concurrent.futures.Future[Any]] = {}

    @property
    def programs(self) -> tuple[int, ...]:
        """Tokens of a row in each program that was compiled, or is being compiled."""
        return tuple(sorted(self._programs))

    def prepare(self, steps: Iterable[int]) -> None:
        """Compile in the background, side by side, all that these steps need, in the order of their need."""
        for step in steps:
            self._program(self.plan.capacity(self.plan.draw(step)[1]))

    def initial(self) -> State:
        """The state before the first step."""
        params = self.family.initial((self.config.num_layers - 1, self.config.num_kv_heads))
        optimizer = self.optimizer.init(params)
        # On all devices, so that a state from a checkpoint, which comes back as this one lies, goes with the weights.
        return self._place({"gates": params, "optimizer": optimizer, "lagrangian": self.lagrangian.initial()})

    def step(self, state: State, step: int, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        """One step, of index `step` from 0. Returns before the device is done."""
        length = batch.tokens.shape[1]
        tables = self._rotary(length)
        program = self._program(length).result()
        return program(state, self._weights, self._key(step), batch.tokens, batch.starts, batch.answers, *tables)

    def expected(self, state: State) -> Float32[np.ndarray, "L K"]:
        """E[z] of every KV head, 1 for those of layer 0."""
        return np.asarray(gates.with_first_layer(self.family.expected(state["gates"])))

    def _key(self, step: int) -> jax.Array:
        # An argument, not a constant of the program: all seeds share one, and the compilation cache keeps one.
        return self._place(jax.random.fold_in(jax.random.key(self.plan.seed), step))

    def _program(self, length: int) -> concurrent.futures.Future[Any]:
        if length not in self._programs:
            self._programs[length] = _compilers.submit(self._compile, length)
        return self._programs[length]

    def _compile(self, length: int) -> Any:
        plan, numbers = self.plan, functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        rows = (numbers((plan.batch, length)), numbers((plan.batch,)), numbers((plan.batch, plan.room)))
        # Float32 models multiply in full float32, as they do in decoding.
        with jax.default_matmul_precision("highest") if self.config.dtype == "float32" else contextlib.nullcontext():
            args = (self.initial(), self._weights, self._key(0), *rows, *self._rotary(length))
            return self._step.lower(*args).compile()

    def _rotary(self, length: int) -> tuple[jax.Array, jax.Array]:
        if length not in self._tables:
            config, at = self.config, np.arange(length)[None]
            # Rows are padded to `length`, which may lie past the end; a dynamic base must not grow for that.
            needed = np.array([min(length, config.max_position_embeddings)])
            tables = rotary_tables(config.rope, config.head_dim, config.max_position_embeddings, at, needed)
            self._tables[length] = self._place(tables)
        return self._tables[length]

    def _advance(self, state: State, weights: Any, key: jax.Array, tokens, starts, answers, cos, sin):
        plan, (above, kv_heads) = self.plan, next(iter(state["gates"].values())).shape
        uniform = jax.random.uniform(key, (plan.batch, above, kv_heads), jnp.float32)

        # The cap of a rule is static and costs memory: never more than the row has pages.
        size = plan.page_size
        pages = max(pages_for(tokens.shape[1], size), plan.policy.forced_pages(size))
        policy = dataclasses.replace(plan.policy, budget=size * min(plan.policy.budget // size, pages))

        def rows(weights, z, tokens, starts, answers, cos, sin):
            model = nnx.merge(self._graph, weights)
            return departures(
                model, tokens, starts, answers, z, (cos, sin), policy=policy, page_size=size, loss=plan.loss
            )

        divided = jax.shard_map(
            rows, mesh=self.mesh, check_vma=False,
            in_specs=(EVERYWHERE, ROWS, ROWS, ROWS, ROWS, EVERYWHERE, EVERYWHERE), out_specs=(ROWS, ROWS),
        )  # fmt: skip

        def objective(params: gates.GateParams):
            z = gates.with_first_layer(self.family.sample(params, uniform))
            losses, kept = divided(weights, z, tokens, starts, answers, cos, sin)
            # Layer 0 has no gates and counts in the density, as its heads read the whole cache too.
            density = jnp.mean(gates.with_first_layer(self.family.nonzero(params)))
            penalty, lagrangian = self.lagrangian.penalty(state["lagrangian"], density)
            loss = jnp.mean(losses)
            metrics = {"loss": loss, "kept": jnp.mean(kept), "density": density, **lagrangian}
            return loss + penalty, (lagrangian, metrics)

        gradient, (lagrangian, metrics) = jax.grad(objective, has_aux=True)(state["gates"])
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of its integer step count
            updates, optimizer = self.optimizer.update(gradient, state["optimizer"], state["gates"])
        params = self.family.project(jax.tree.map(jnp.add, state["gates"], updates))
        # A gradient can be NaN while the loss is not.
        metrics["finite"] = functools.reduce(
            jnp.logical_and, [jnp.all(jnp.isfinite(x)) for x in (*params.values(), *metrics.values())]
        )
        metrics["expected"] = self.family.expected(params)
        return {"gates": params, "optimizer": optimizer, "lagrangian": lagrangian}, metrics


def learn(
    loaded: LLM, plan: TrainingPlan, output: str | Path, *, checkpoint_every: int = 100, keep: int = 3,
    log_every: int = 10, on_step: OnStep | None = None, balance: int = 1,
) -> Learned:  # fmt: skip
    """Train the gates, or go on, in the folder `output`; leaves the head map, E[z] and pictures there.

    `on_step(done, metrics)` is called after every step was sent off, with the numbers of the last one that is known
    (loss, kept, density, multiplier, excess); empty before there are any. Ctrl-C ends the run after the step in hand,
    a second one at once; a checkpoint is saved. Every `log_every`-th step has a line in the metrics file. The map is
    one whose layers `balance` devices share evenly; training knows nothing of it.

    Raises:
        UserError: a plan that does not fit, a folder with another run, or a loss that is not a number any more.
    """
    numbers = {"checkpoint-every": checkpoint_every, "keep": keep, "log-every": log_every, "balance": balance}
    for name, value in numbers.items():
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    output, learner = Path(output), Learner(loaded, plan)
    check_tensor_path(output)
    claim(output, _described(loaded, plan))
    checkpoints = Checkpoints(output / CHECKPOINTS, keep)
    learner.prepare(range(checkpoints.latest() or 0, plan.steps))
    try:
        with Patience() as patience:
            run = _Run(learner, output, checkpoints, log_every)
            try:
                while run.sent < plan.steps:
                    patience.heed()
                    run.send()
                    if run.sent % checkpoint_every == 0 or run.sent == plan.steps:
                        run.look()
                        checkpoints.save(run.done, run.state)
                    else:
                        run.look(but=1)  # one step behind, so that the device never waits for the host
                    if on_step is not None:
                        on_step(run.sent, run.latest)
            except KeyboardInterrupt:
                run.look()
                checkpoints.save(run.done, run.state)
                raise
    finally:
        checkpoints.close()
    return _conclude(loaded, plan, output, learner.expected(run.state), balance)


class _Run:
    """Where a run is. A Ctrl-C may fall between any two instructions, so numbers and states change hands in one.

    `done` steps were looked at and led to `state`; more may be sent off.
    """

    def __init__(self, learner: Learner, output: Path, checkpoints: Checkpoints, log_every: int) -> None:
        self._learner, self._checkpoints, self._folder = learner, checkpoints, output / CHECKPOINTS
        first = learner.initial()
        self._known: tuple[int, State] = checkpoints.restore(first) or (0, first)
        self._on_the_way: list[tuple[int, State, dict[str, jax.Array]]] = []
        self._metrics_file = MetricsFile(output / METRICS, self.done)
        self._log_every = log_every
        self.latest: dict[str, float] = {}

    @property
    def done(self) -> int:
        return self._known[0]

    @property
    def state(self) -> State:
        return self._known[1]

    @property
    def sent(self) -> int:
        return self._on_the_way[-1][0] if self._on_the_way else self.done

    def send(self) -> None:
        """Send off the next step."""
        step, state = self.sent, self._on_the_way[-1][1] if self._on_the_way else self.state
        batch = make_batch(self._learner.plan, self._learner.source, step)
        self._on_the_way.append((step + 1, *self._learner.step(state, step, batch)))

    def look(self, *, but: int = 0) -> None:
        """Wait for all steps but the last few: numbers go to the file, and none of them may be NaN."""
        while len(self._on_the_way) > but:
            step, state, metrics = self._on_the_way[0]
            values = jax.device_get(metrics)
            expected = values.pop("expected")
            if not values.pop("finite"):
                good = self._checkpoints.latest()
                where = f"step {good} in {self._folder}" if good else "none yet"
                raise UserError(
                    f"step {step}: the loss or a gate is not finite any more; the last good checkpoint: {where}"
                )
            latest = {name: float(value) for name, value in values.items()}
            if step % self._log_every == 0 or step in (1, self._learner.plan.steps):
                above = [[round(float(z), 4) for z in layer] for layer in expected]
                self._metrics_file.write(step=step, **latest, expected=above)
            self._known, self.latest = (step, state), latest
            del self._on_the_way[0]


def _described(loaded: LLM, plan: TrainingPlan) -> dict[str, Any]:
    """What a run must agree with to go on in a folder: weights, tokenizer and files by their contents, and the plan."""
    tokenizer = loaded.tokenizer
    described = {
        "model": loaded.config.fingerprint(),
        "weights": loaded.weights_digest(),
        "tokenizer": tokenizer.digest() if tokenizer is not None else None,
        "dtype": loaded.config.dtype,
        **dataclasses.asdict(plan),
    }
    for name in ("text", "file"):
        if described[name]:  # wherever it lies, and whatever it is called
            described[name] = f"digest {digest_of(read_text(described[name]))}"
    return described


def _conclude(
    loaded: LLM, plan: TrainingPlan, output: Path, expected: Float32[np.ndarray, "L K"], balance: int
) -> Learned:
    roles = gates.harden(expected, plan.retrieval_heads)
    lost = float(expected[roles].sum())
    if balance > 1:
        roles = even_roles(expected, plan.retrieval_heads, balance)
    lost -= float(expected[roles].sum())
    above_half = int(gates.harden(expected).sum())
    meta = {
        "fingerprint": loaded.config.fingerprint(), "method": plan.family, "seed": plan.seed, "steps": plan.steps,
        "above_half": above_half, **({"balance": balance} if balance > 1 else {}),
    }  # fmt: skip
    head_map = HeadMap.from_roles(roles, model=loaded.name, meta=meta)
    head_map.save(output / HEADS)
    described = {
        "method": plan.family, "retrieval_heads": head_map.num_retrieval, "above_half": above_half,
        "expected": [[round(float(z), 6) for z in layer] for layer in expected],
    }  # fmt: skip
    write_text(output / GATES, json_text(described) + "\n")
    plot_heads(head_map, output / ROLES)
    plot_training(output / METRICS, head_map, output / TRAINING)
    return Learned(head_map, expected, above_half, lost)
