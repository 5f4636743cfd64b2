"""The whole study in a folder: gates are trained, maps chosen, rules calibrated, rows filled in, results written."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import jax

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.data import language
from lychee_jax.errors import UserError
from lychee_jax.llm import LLM
from lychee_jax.plotting.training import History
from lychee_jax.run_folder import Record, claim, read_json, write_json
from lychee_jax.studies.head_maps import calibration, maps
from lychee_jax.studies.head_maps.prompts import TASKS
from lychee_jax.studies.head_maps.rows import POINTS, Grid, Row
from lychee_jax.studies.head_maps.scoring import Job, is_dialogue, jobs, programs, score_answers, score_dialogues
from lychee_jax.studies.head_maps.tally import Tally
from lychee_jax.studies.scorer import Scorer
from lychee_jax.training import learn_heads

type OnProgress = Callable[[str, int, int], None]

RESULTS, MAPS, CALIBRATION = "results.json", "maps.json", "calibration.json"
_NUMBERED = ("ratio", "top_p", "threshold")  # rules with a number of their own


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is asked, and of whom is learned: together with the model, what the folder of a study is about.

    `lengths`: of the training prompts. From three quarters of the longest on, one compiled step serves them all.
    `validation`, `calibration`: prompts of each task for the choice of layers, and for the rules' numbers.
    """

    samples: int = 100
    retrieval_heads: int = 8
    steps: int = 400
    batch: int = 1
    learning_rate: float = 0.01
    loss: str = "hidden"
    ratio: float = 0.3
    lengths: tuple[int, int] = (6145, 8192)
    dialogues: int = 16
    dialogue_tokens: int = 2000
    validation: int = 8
    calibration: int = 16

    def plan(self, family: str, seed: int) -> learn_heads.TrainingPlan:
        """How this family of gates is trained."""
        policy = SelectionPolicy(budget=1 << 20, rule="ratio", ratio=self.ratio)
        return learn_heads.TrainingPlan(
            retrieval_heads=self.retrieval_heads, steps=self.steps, batch=self.batch, seed=seed, family=family,
            loss="logits" if self.loss == "logits" else "hidden", data="mixed", min_length=self.lengths[0],
            max_length=self.lengths[1], learning_rate=self.learning_rate, policy=policy,
        )  # fmt: skip


class Study:
    """One model's study in one folder. `run` does what is missing and returns the results.

    `chunk_tokens`: prompt tokens that are read at once, which memory limits; by default 16 Ki on a CPU, else 256 Ki.

    Raises UserError for a model or sizes that do not fit, or a folder with another study.
    """

    def __init__(
        self, model: LLM, grid: Grid, sizes: Sizes, output: Path, report: OnProgress, *, chunk_tokens: int | None = None
    ) -> None:
        self.model, self.grid, self.sizes, self.output = model, grid, sizes, output
        self._report = report
        config = model.config
        if config.vocab_size != language.VOCAB_SIZE:
            raise UserError("the study asks in the bundled model's tokens; this model has another vocabulary")
        _check(grid, sizes, config.num_layers * config.num_kv_heads)
        self.chunk_tokens = chunk_tokens or (1 << 14 if jax.default_backend() == "cpu" else 1 << 18)
        content = {"model": config.fingerprint(), "weights": model.weights_digest()}
        claim(output, {**content, "chunk_tokens": self.chunk_tokens, **dataclasses.asdict(sizes)})
        self.tally = Tally(output)

    def run(self, command: str) -> Record:
        """Everything, from where it stopped; `command` is what the results say they come from."""
        scorer = Scorer(self.model.config, self.model.model, workers=min(8, os.cpu_count() or 1))
        try:
            # What needs no number found first is compiled while gates are trained.
            scorer.prepare(
                programs(self._jobs([row for row in self._answered() if row.rule not in _NUMBERED]), _policy)
            )
            chosen = self._maps(scorer)
            amounts = self._amounts(scorer, chosen)
            self._score(scorer, chosen, amounts)
        finally:
            scorer.close()
        results = {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "command": command,
            "sizes": dataclasses.asdict(self.sizes),
            "rows": [self._result(row, amounts) for row in self.grid.rows()],
            "between": self._between() if 4 in self.grid.points else [],
            "maps": {name: {**record, **head_map.to_json()} for name, (head_map, record) in chosen.items()},
        }
        write_json(self.output / RESULTS, results)
        return results

    def _maps(self, scorer: Scorer) -> dict[str, tuple[HeadMap, Record]]:
        """Every map by its name, and how it was found."""
        config, sizes, label = self.model.config, self.sizes, self.model.name
        found: dict[str, tuple[HeadMap, Record]] = {}
        for family in self.grid.families:
            for seed in self.grid.seeds:
                name = f"{family}-{seed}"
                learned = learn_heads.learn(
                    self.model, sizes.plan(family, seed), self.output / "runs" / name,
                    on_step=lambda done, _, name=name: self._report(f"learning {name}", done, sizes.steps),
                )  # fmt: skip
                expected = [[round(float(z), 4) for z in layer] for layer in learned.expected]
                found[name] = learned.head_map, {"expected": expected, "above_half": learned.above_half}
        if 2 not in self.grid.points:
            return found
        kept = read_json(self.output / MAPS)
        for i, seed in enumerate(self.grid.seeds):
            name = f"layer-{seed}"
            if name not in kept:
                loss = maps.validation_loss(scorer, sizes.lengths[1], sizes.validation, seed)
                roles, tried = maps.layer_roles(config, sizes.retrieval_heads, loss)
                head_map = maps.map_of(roles, config, label, method="layer", seed=seed)
                kept[name] = {"map": head_map.to_json(), "tried": tried}
                write_json(self.output / MAPS, kept)
            found[name] = HeadMap.from_json(kept[name]["map"]), {"tried": kept[name]["tried"]}
            self._report("choosing layers", i + 1, len(self.grid.seeds))
            roles = maps.random_roles(config, sizes.retrieval_heads, seed)
            found[f"random-{seed}"] = maps.map_of(roles, config, label, method="random", seed=seed), {}
        return found

    def _amounts(self, scorer: Scorer, chosen: Mapping[str, tuple[HeadMap, Record]]) -> dict[str, float]:
        """The numbers of the rules that have one, by `_amount_name`."""
        amounts: dict[str, float] = read_json(self.output / CALIBRATION)
        # One number for all tasks: a user does not know which task it is.
        wanted = {_amount_name(row): row for row in self.grid.rows() if row.rule in _NUMBERED}
        missing = {(row.context, row.budget): row for name, row in wanted.items() if name not in amounts}
        for row in missing.values():
            scorer.prepare(calibration.programs(row, self.sizes.calibration))
        for i, row in enumerate(missing.values()):
            roles = maps.roles_of(chosen[row.map_name][0])
            numbers = calibration.calibrate(scorer, roles, row, samples=self.sizes.calibration)
            for rule, amount in numbers.items():
                amounts[_amount_name(dataclasses.replace(row, rule=rule))] = amount
            write_json(self.output / CALIBRATION, amounts)
            self._report("calibrating rules", i + 1, len(missing))
        return amounts

    def _score(
        self, scorer: Scorer, chosen: Mapping[str, tuple[HeadMap, Record]], amounts: Mapping[str, float]
    ) -> None:  # fmt: skip
        every = HeadMap.all(self.model.config)

        def map_of(row: Row) -> HeadMap:
            return every if row.method == "dense" else chosen[row.map_name][0]

        def policy_of(row: Row) -> SelectionPolicy:
            return _policy(row, amounts)

        todo = self._jobs(self._answered())
        self._counted("scoring answers", sum(len(job.rows) for job in todo), lambda report: score_answers(
            scorer, todo, map_of, policy_of, self.tally, report
        ))  # fmt: skip
        sizes, rows = self.sizes, [row for row in self.grid.rows() if is_dialogue(row)]
        talks = jobs(rows, sizes.dialogues, self.chunk_tokens, self.tally)
        steps = sum(len(job.rows) for job in talks) * sizes.dialogue_tokens
        self._counted("generating dialogues", steps, lambda report: score_dialogues(
            self.model, talks, map_of, policy_of, self.tally, report, tokens=sizes.dialogue_tokens
        ))  # fmt: skip

    def _answered(self) -> list[Row]:
        """The rows of single answers."""
        return [row for row in self.grid.rows() if not is_dialogue(row)]

    def _jobs(self, rows: list[Row]) -> list[Job]:
        """What single answers they still lack."""
        return jobs(rows, self.sizes.samples, self.chunk_tokens, self.tally)

    def _counted(self, stage: str, total: int, work: Callable[[Callable[[int], None]], None]) -> None:
        """Do the work, reporting a stage's progress from its increments."""
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self._report(stage, done, total)

        if total:
            work(advance)
            self._report(stage, total, total)

    def _result(self, row: Row, amounts: Mapping[str, float]) -> Record:
        """The row with what was counted; scores and shares from 0 to 100."""
        count, dense = self.tally.total(row), self.tally.total(row.dense)
        config = self.model.config
        share = row.retrieval_heads / (config.num_layers * config.num_kv_heads)
        read = count.read / count.held
        return {
            "model": self.model.name,
            **dataclasses.asdict(row),
            "amount": amounts.get(_amount_name(row)),
            "budget_tokens": row.budget_tokens,
            "samples": count.total,
            "score": 100 * count.right / count.total,
            "dense_score": 100 * dense.right / dense.total,
            "cache_read": 100 * read,
            "sparse_read": 100 * (read - share) / (1 - share),
        }

    def _between(self) -> list[Record]:
        """For every run, the share of gates (layer 0 has none) whose E[z] is undecided, over the steps."""
        found = []
        for family in self.grid.families:
            for seed in self.grid.seeds:
                file = self.output / "runs" / f"{family}-{seed}" / learn_heads.METRICS
                history = History.read(file)
                found.append({"method": family, "seed": seed, "steps": history.steps.astype(int).tolist(),
                              "share": history.undecided.tolist()})  # fmt: skip
        return found


def _amount_name(row: Row) -> str:
    return f"{row.rule} {row.context} {row.budget}"


def _policy(row: Row, amounts: Mapping[str, float] = MappingProxyType({})) -> SelectionPolicy:
    return row.policy(amounts.get(_amount_name(row)))


def _check(grid: Grid, sizes: Sizes, heads: int) -> None:
    for name in ("points", "tasks", "contexts", "seeds"):
        given = getattr(grid, name)
        if not given or len(set(given)) < len(given):
            raise UserError(f"{name}: {'something is given twice' if given else 'nothing is given'}")
    if unknown := [task for task in grid.tasks if task not in TASKS]:
        raise UserError(f"task {unknown[0]!r} is unknown; use some of {', '.join(TASKS)}")
    if unknown := [point for point in grid.points if point not in POINTS]:
        raise UserError(f"point {unknown[0]} is unknown; use some of {', '.join(map(str, POINTS))}")
    for name in ("samples", "dialogues", "dialogue_tokens", "validation", "calibration"):
        if getattr(sizes, name) < 1:
            raise UserError(f"{name.replace('_', '-')} is {getattr(sizes, name)}; it must be at least 1")
    if not sizes.retrieval_heads < heads:
        raise UserError(f"retrieval-heads is {sizes.retrieval_heads}, but the model has {heads}: none would be sparse")
