"""The study in a folder: gates are trained, maps chosen, answers scored and generated, results written."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.engine.options import GenerateOptions
from lychee_jax.errors import UserError
from lychee_jax.files import digest_of, read_text
from lychee_jax.llm import LLM
from lychee_jax.run_folder import Record, append_lines, claim, read_json, read_lines, write_json
from lychee_jax.studies.head_maps.maps import map_of, random_roles, roles_of
from lychee_jax.studies.real_model.prompts import (
    ANSWER_TOKENS,
    HELD_OUT,
    PERPLEXITY,
    TASKS,
    VALIDATION,
    Asked,
    Prompts,
)
from lychee_jax.studies.real_model.report import marks
from lychee_jax.studies.real_model.variants import PAGE, Grid, Variant
from lychee_jax.studies.scorer import ProgramKey, Scorer
from lychee_jax.training import learn_heads

type OnProgress = Callable[[str, int, int], None]

MAPS, SCORES, ANSWERS, PROMPTS, DEVICE = "maps.json", "scores.jsonl", "answers.jsonl", "prompts.jsonl", "device.json"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is asked and learned.

    `samples`: prompts of each task at the longest length, where targets are claimed; `others` at all other lengths;
    `windows` of text; `rows` at a time; `validation` prompts of each task, on which layers are chosen.
    """

    lengths: tuple[int, ...] = (2048, 4096, 7680)
    samples: int = 500
    others: int = 200
    windows: int = 64
    rows: int = 64
    validation: int = 16
    steps: int = 200
    train_lengths: tuple[int, int] = (5400, 7168)
    ratio: float = 0.1
    data: str = "passkeys"

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for name in ("samples", "others", "windows", "rows", "validation", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def count(self, task: str, length: int) -> int:
        """Prompts of a cell."""
        if task == PERPLEXITY:
            return self.windows
        return self.samples if length == max(self.lengths) else self.others

    def plan(self, heads: int, seed: int, text: Path) -> learn_heads.TrainingPlan:
        """How a map is learned."""
        policy = dataclasses.replace(learn_heads.TrainingPlan.policy, ratio=self.ratio)
        shortest, longest = self.train_lengths
        return learn_heads.TrainingPlan(
            retrieval_heads=heads, steps=self.steps, seed=seed, data=self.data, text=str(text), min_length=shortest,
            max_length=longest, policy=policy,
        )  # fmt: skip


class Study:
    """One model's study in one folder; every stage does what is missing.

    Raises UserError for a folder with another study.
    """

    def __init__(
        self, model: LLM, prompts: Prompts, training_text: Path, grid: Grid, sizes: Sizes, output: Path,
        report: OnProgress,
    ) -> None:  # fmt: skip
        self.model, self.prompts, self.grid, self.sizes, self.output = model, prompts, grid, sizes, output
        self._training_text, self._report = training_text, report
        content = {
            "fingerprint": model.config.fingerprint(), "weights": model.weights_digest(), "compared": grid.compared,
            **dataclasses.asdict(sizes),
        }  # fmt: skip
        training = digest_of(read_text(training_text))
        claim(output, content, inputs={"text": prompts.digest, "training text": training})
        self._scores = {
            (line["variant"], line["task"], line["length"], line["first"]): line for line in read_lines(output / SCORES)
        }

    @property
    def tasks(self) -> tuple[str, ...]:
        """All, perplexity last."""
        return (*TASKS, PERPLEXITY)

    def learn(self) -> None:
        """Train what the folder lacks; each map is a folder of `runs/`, so several processes can share the work."""
        for count, seed in self.grid.learned():
            name = f"learned-{count}-{seed}"
            if (self.output / "runs" / name / learn_heads.HEADS).exists():
                continue
            learn_heads.learn(
                self.model, self.sizes.plan(count, seed, self._training_text), self.output / "runs" / name,
                on_step=lambda done, _, name=name: self._report(name, done, self.sizes.steps),
            )  # fmt: skip

    def maps(self, scorer: Scorer) -> dict[str, HeadMap]:
        """Every map by its name; those of whole layers are chosen here."""
        config, label = self.model.config, self.model.name
        found = {"dense": HeadMap.all(config), "none": HeadMap.none(config)}
        for count, seed in self.grid.learned():
            file = self.output / "runs" / f"learned-{count}-{seed}" / learn_heads.HEADS
            if not file.exists():
                raise UserError(f"{file} is missing: the map was not learned yet")
            found[f"learned-{count}-{seed}"] = HeadMap.load(file)
            roles = random_roles(config, count, seed)
            found[f"random-{count}-{seed}"] = map_of(roles, config, label, method="random", seed=seed)
        main = self.grid.main.head_map
        found[main.replace("learned", "window")] = found[main]
        kept = read_json(self.output / MAPS)
        sizes = sorted(set(self.grid.layers(config.num_kv_heads).values()))
        if any(f"layers-{size}" not in kept for size in sizes):
            kept = {**kept, **self._layers(scorer, sizes)}
            write_json(self.output / MAPS, kept)
        return found | {f"layers-{size}": HeadMap.from_json(kept[f"layers-{size}"]) for size in sizes}

    def _layers(self, scorer: Scorer, sizes: list[int]) -> Record:
        """Whole layers, each time the one that lowers the loss of validation answers most (a greedy search)."""
        config, length, rows = self.model.config, max(self.sizes.lengths), self.sizes.validation
        policy = Variant("layers", self.grid.compared).policy
        batches = []
        for task in TASKS:
            asked = self.prompts.batch(VALIDATION, task, length, range(rows), rows=rows)
            tokens, answers = _stack(asked)
            batches.append((scorer.read(tokens, answers.shape[1]), answers))

        def loss(layers: list[int]) -> float:
            roles = np.zeros((config.num_layers, config.num_kv_heads), bool)
            roles[layers] = True
            return float(np.mean([scorer.score(memory, answers, roles, policy, PAGE).losses
                                  for memory, answers in batches]))  # fmt: skip

        chosen, found, most = [0], {}, max(sizes) // config.num_kv_heads
        while True:
            if (size := len(chosen) * config.num_kv_heads) in sizes:
                roles = np.zeros((config.num_layers, config.num_kv_heads), bool)
                roles[chosen] = True
                head_map = map_of(roles, config, self.model.name, method="layers", picked=list(chosen))
                found[f"layers-{size}"] = head_map.to_json()
            self._report("choosing layers", len(chosen), most)
            if len(chosen) == most:
                return found
            chosen.append(min(set(range(config.num_layers)) - set(chosen), key=lambda layer: loss([*chosen, layer])))

    def score(self) -> None:
        """Score every variant on every prompt, read once for all."""
        scorer = Scorer(self.model.config, self.model.model, workers=min(16, os.cpu_count() or 1))
        host = concurrent.futures.ThreadPoolExecutor(1)
        try:
            variants = self.grid.variants(self.model.config.num_kv_heads)
            todo = [
                (task, length, range(first, min(first + self.sizes.rows, count)), missing)
                for length in self.sizes.lengths[::-1]
                for task in self.tasks
                for count in (self.sizes.count(task, length),)
                for first in range(0, count, self.sizes.rows)
                if (missing := [v for v in variants if (v.label, task, length, first) not in self._scores])
            ]
            scorer.prepare(
                ProgramKey(self.sizes.rows, length, self.prompts.width(task), variant.policy, PAGE)
                for task, length, _, missing in todo
                for variant in missing
            )
            roles = {name: roles_of(head_map) for name, head_map in self.maps(scorer).items()}
            if todo:
                self._keep_device()

            def make(job: tuple[str, int, range, list[Variant]]) -> list[Asked]:
                return self.prompts.batch(HELD_OUT, job[0], job[1], job[2], rows=self.sizes.rows)

            for number, (job, asked) in enumerate(zip(todo, host.map(make, todo), strict=True)):
                task, length, indices, missing = job
                tokens, answers = _stack(asked)
                memory = scorer.read(tokens, answers.shape[1])
                for variant in missing:
                    chosen = roles[variant.head_map]
                    verdict = scorer.score(memory, answers, chosen, variant.policy, PAGE)
                    count = len(indices)
                    self._keep({
                        "variant": variant.label, "task": task, "length": length, "first": indices.start,
                        "right": verdict.right[:count].astype(int).tolist(),
                        "losses": [round(float(loss), 5) for loss in verdict.losses[:count]],
                        "read": verdict.sparse_read + int(chosen.sum()) * verdict.held,
                        "held": chosen.size * verdict.held,
                    })  # fmt: skip
                self._report("scoring", number + 1, len(todo))
        finally:
            host.shutdown(cancel_futures=True)
            scorer.close()

    def _keep_device(self) -> None:
        """Of what has scored: of several, all."""
        here = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
        known = read_json(self.output / DEVICE)
        both = {name: [*str(known[name]).split(", "), here[name]] if known else [here[name]] for name in here}
        write_json(self.output / DEVICE, {name: ", ".join(dict.fromkeys(each)) for name, each in both.items()})

    def _keep(self, line: Record) -> None:
        append_lines(self.output / SCORES, [line])
        self._scores[line["variant"], line["task"], line["length"], line["first"]] = line

    def write_prompts(self) -> None:
        """The prompts of every length, as other systems read them."""
        file = self.output / PROMPTS
        there = {(line["task"], line["length"], line["index"]) for line in read_lines(file)}
        cells = [(task, length) for length in self.sizes.lengths[::-1] for task in TASKS]
        for number, (task, length) in enumerate(cells):
            for index in range(self.sizes.count(task, length)):
                if (task, length, index) not in there:
                    asked = self.prompts.make(HELD_OUT, task, length, index)
                    append_lines(file, [{
                        "task": task, "length": length, "index": index, "tokens": asked.tokens.tolist(),
                        "references": [asked.text], "max_new_tokens": asked.answer.size,
                    }])  # fmt: skip
            self._report("writing prompts", number + 1, len(cells))

    def generate(self) -> None:
        """Let the engine answer the prompts of the longest length, dense and by the main variant, kernels included."""
        length, file = max(self.sizes.lengths), self.output / ANSWERS
        there = {(line["task"], line["index"], line["variant"]) for line in read_lines(file)}
        main = self.grid.main
        head_map = HeadMap.load(self.output / "runs" / main.head_map / learn_heads.HEADS)
        tokenizer = self.prompts.tokenizer
        for variant in (Variant("dense"), main):  # one after the other: each has an engine and programs of its own
            options = GenerateOptions(
                "dense" if variant.head_map == "dense" else "hybrid", head_map, variant.policy, PAGE,
                max_new_tokens=ANSWER_TOKENS, eos_ids=(),
            )  # fmt: skip
            for task in TASKS:
                for first in range(0, self.sizes.samples, self.sizes.rows):
                    indices = range(first, min(first + self.sizes.rows, self.sizes.samples))
                    missing = [index for index in indices if (task, index, variant.label) not in there]
                    if missing:
                        asked = [self.prompts.make(HELD_OUT, task, length, index) for index in missing]
                        result = self.model.generate_tokens([each.tokens.tolist() for each in asked], options)
                        append_lines(file, [
                            {
                                "task": task, "index": index, "variant": variant.label,
                                "answer": tokenizer.decode(result.tokens[row]),
                                "right": result.tokens[row][: len(_ids(each))] == _ids(each),
                                "kv_read_share": result.pages_read[row] / max(1, result.pages_held[row]),
                            }
                            for row, (index, each) in enumerate(zip(missing, asked, strict=True))
                        ])  # fmt: skip
                    self._report(f"generating {task}, {variant.label}", indices.stop, self.sizes.samples)

    def results(self, command: str) -> Record:
        """What was found, as the report reads it; the device is the one that scored."""
        config = self.model.config
        cells: dict[tuple[str, str, int], dict[str, Any]] = {}
        for line in sorted(self._scores.values(), key=lambda line: line["first"]):
            kept = "losses" if line["task"] == PERPLEXITY else "right"
            cell = cells.setdefault((line["variant"], line["task"], line["length"]), {kept: [], "read": 0, "held": 0})
            for name in cell:
                cell[name] = cell[name] + line[name]
        return {
            "model": self.model.name,
            **read_json(self.output / DEVICE),
            "command": command,
            "text_sha256": self.prompts.digest,
            "kv_heads": config.num_layers * config.num_kv_heads,
            "main": self.grid.main.label,
            "sizes": dataclasses.asdict(self.sizes),
            "cells": [
                {"variant": v, "task": t, "length": n, **cell}
                | ({"right": marks(dict(enumerate(cell["right"])))} if "right" in cell else {})
                for (v, t, n), cell in cells.items()
            ],
            "answers": self._answered(),
        }

    def _answered(self) -> list[Record]:
        """What the engine answered, by task and variant."""
        rows: dict[tuple[str, str], list[Record]] = {}
        for line in read_lines(self.output / ANSWERS):
            rows.setdefault((line["task"], line["variant"]), []).append(line)
        return [
            {
                "task": task, "variant": variant, "right": marks({row["index"]: int(row["right"]) for row in each}),
                "kv_read_share": float(np.mean([row["kv_read_share"] for row in each])),
            }
            for (task, variant), each in rows.items()
        ]  # fmt: skip


def _ids(asked: Asked) -> list[int]:
    return asked.answer[asked.answer >= 0].tolist()


def _stack(asked: list[Asked]) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([each.tokens for each in asked]), np.stack([each.answer for each in asked])
