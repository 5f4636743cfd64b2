"""The study: which rows there are, what is shrunk, chosen and calibrated; it goes on wherever it was stopped."""

import collections
import dataclasses
import json
import math
import re
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lychee_jax.config import ModelConfig
from lychee_jax.data import language
from lychee_jax.engine.options import GenerateOptions
from lychee_jax.errors import UserError
from lychee_jax.llm import LLM
from lychee_jax.loading import load
from lychee_jax.studies.head_maps import __main__ as command
from lychee_jax.studies.head_maps import maps, report, scoring, study
from lychee_jax.studies.head_maps.calibration import calibrate, ratio_for, readers
from lychee_jax.studies.head_maps.prompts import (
    ANSWER_TOKENS,
    CALIBRATION,
    DIALOGUE,
    HELD_OUT,
    TASKS,
    Dialogue,
    dialogue,
    prompts,
)
from lychee_jax.studies.head_maps.rows import BUDGETS, Grid, Row, forced_tokens
from lychee_jax.studies.head_maps.tally import Count, Tally
from lychee_jax.studies.scorer import Scorer
from tests.support import tiny_checkpoints

CONTEXT, HEADS = 512, 4
CHUNK = 2 * CONTEXT  # two chunks of prompts a cell, the last one not full
SIZES = study.Sizes(
    samples=3, retrieval_heads=HEADS, steps=3, lengths=(512, 512), dialogues=2, dialogue_tokens=120
)  # fmt: skip
FIELDS = {
    "model", "method", "seed", "task", "context", "budget", "page_size", "rule", "page_score", "correction", "sink",
    "recent", "retrieval_heads", "score", "dense_score", "samples", "amount", "budget_tokens", "cache_read",
    "sparse_read",
}  # fmt: skip


def quiet(stage: str, done: int, total: int) -> None:
    assert 0 <= done <= total, stage


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    raw = tiny_checkpoints.TINY["llama"] | {
        "vocab_size": language.VOCAB_SIZE, "num_hidden_layers": 3, "max_position_embeddings": 4096, "eos_token_id": 2,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_checkpoints.write_checkpoint(folder, raw)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> LLM:
    return load(folder)


@pytest.fixture(scope="module")
def scorer(model: LLM):
    scorer = Scorer(model.config, model.model)
    yield scorer
    scorer.close()


# --- which rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "page_size", "expected"),
    [
        (384, 64, (128, 256)),  # just enough for both
        (320, 64, (64, 64)),
        (512, 64, (128, 256)),
        (256, 64, (64, 64)),
        (192, 64, (0, 0)),  # a quarter holds no page
        (64, 64, (0, 0)),
        (256, 16, (64, 64)),
        (368, 16, (80, 80)),  # 23 pages: a quarter holds five
        (256, 1, (64, 64)),
        (383, 1, (95, 95)),
        (16384, 64, (128, 256)),
    ],
)
def test_sink_and_recent_shrink_only_where_they_must(budget: int, page_size: int, expected: tuple[int, int]):
    assert forced_tokens(budget, page_size) == expected


def test_the_grid_has_every_row_once():
    grid = Grid()
    rows = grid.rows()
    assert len(set(rows)) == len(rows)
    for row in rows:
        row.policy(0.5 if row.rule in ("ratio", "top_p", "threshold") else None).validate(row.page_size)
    cells = len(TASKS) * 3
    learned = [row for row in rows if row.method == "hardkuma" and row.task != DIALOGUE]
    base = [row for row in learned if (row.page_size, row.page_score, row.rule) == (64, "max", "budget")]
    assert collections.Counter(row.budget for row in base) == dict.fromkeys(BUDGETS, 3 * cells)
    for method in ("hardconcrete", "plain", "layer", "random", "none"):
        mine = [row for row in rows if row.method == method]
        twice = 2 if method == "none" else 1
        assert collections.Counter(row.budget for row in mine) == {1 / 32: 3 * cells * twice, 1 / 8: 3 * cells * twice}
        assert {row.rule for row in mine} == {"forced" if method == "none" else "budget"}
    varied = {(row.rule, row.page_size, row.page_score) for row in set(learned) - set(base)}
    assert varied == {
        ("budget", 64, "mass"), ("budget", 16, "max"), ("budget", 16, "mass"), ("budget", 1, "max"),
        ("ratio", 64, "max"), ("top_p", 64, "mass"), ("threshold", 64, "mass"),
    }  # fmt: skip
    talks = [row for row in rows if row.task == DIALOGUE]
    assert {(row.budget, row.correction, row.context) for row in talks} == {
        (budget, correction, 8192) for budget in (1 / 32, 1 / 8) for correction in (False, True)
    }
    assert {row.retrieval_heads for row in rows} == {8}


def test_without_retrieval_the_recent_tokens_once_fill_the_budget():
    rows = [
        row for row in Grid(points=[2], tasks=["passkey"], contexts=[8192], seeds=[0]).rows() if row.budget == 1 / 8
    ]
    assert [(row.sink, row.recent) for row in rows if row.method == "none"] == [(128, 256), (128, 1024 - 128)]


def test_budgets_without_a_page_have_no_rows():
    rows = Grid(points=[1, 3], tasks=["passkey"], contexts=[CONTEXT], seeds=[0]).rows()
    assert {row.budget for row in rows if row.page_size == 64} == {1 / 8, 1 / 4, 1 / 2}
    assert {row.budget for row in rows if row.page_size == 16} == {1 / 32, 1 / 8}


# --- which heads ------------------------------------------------------------------------------------------------------

CONFIG = ModelConfig("llama", 1024, 32, 48, 5, 6, 3, 16, 512)


def test_the_best_layers_are_chosen_whatever_their_order():
    cost = {1: 0.5, 2: 0.1, 3: 0.4, 4: 0.2}

    def loss(roles: np.ndarray) -> float:
        assert roles[0].all()
        assert roles.sum() == 9
        chosen = [layer for layer in range(1, 5) if roles[layer].all()]
        # Layers that are good alone are not good together.
        return sum(cost[layer] for layer in chosen) + (1.0 if chosen == [2, 4] else 0.0)

    roles, tried = maps.layer_roles(CONFIG, 9, loss)
    assert [layer for layer in range(5) if roles[layer].all()] == [0, 2, 3]
    assert len(tried) == 6
    assert min(tried, key=lambda each: each["loss"]) == {"layers": [0, 2, 3], "loss": 0.5}


def test_layers_need_whole_layers():
    with pytest.raises(UserError, match="retrieval-heads is 8; whole layers have multiples of 3"):
        maps.layer_roles(CONFIG, 8, lambda roles: 0.0)


def test_random_maps_have_as_many_heads_and_differ_by_seed():
    found = [maps.random_roles(CONFIG, 8, seed) for seed in range(6)]
    for roles in found:
        assert roles[0].all()
        assert roles.sum() == 8
    assert len({roles.tobytes() for roles in found}) > 3
    assert (maps.random_roles(CONFIG, 8, 5) == found[5]).all()
    head_map = maps.map_of(found[0], CONFIG, "tiny", method="random")
    head_map.check(CONFIG)
    assert (maps.roles_of(head_map) == found[0]).all()


# --- which numbers ----------------------------------------------------------------------------------------------------


def row_of(context: int, budget: float, /, **changes: Any) -> Row:
    return dataclasses.replace(next(Grid()._row("hardkuma", 0, "passkey", context, budget)), **changes)


@pytest.mark.parametrize("context", [512, 8192, 16384, 32768])
@pytest.mark.parametrize("budget", [1 / 32, 1 / 8])
@pytest.mark.parametrize("page_size", [16, 64])
def test_the_ratio_takes_the_pages_of_the_budget(context: int, budget: float, page_size: int):
    row = row_of(8192, budget, context=context, page_size=page_size)
    if row.budget_tokens:
        pages = -(-(context + 1) // page_size)
        assert math.ceil(Fraction(str(ratio_for(row))) * pages) == row.budget_tokens // page_size


def test_readers_are_counted_up_to_the_next_pick():
    roles = np.asarray([[1, 1, 1], [0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]], bool)
    assert readers(roles).tolist() == [[2, 0, 4], [0, 3, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]]


def test_calibrated_rules_read_what_the_ratio_reads(model: LLM, scorer: Scorer):
    row = row_of(8192, 1 / 8, context=768, page_size=16, sink=16, recent=32)
    roles = maps.random_roles(model.config, HEADS, 0)
    numbers = calibrate(scorer, roles, row, samples=4, tasks=("passkey", "lookup"))
    read: dict[str, float] = {}
    for rule, amount in numbers.items():
        policy = dataclasses.replace(row, rule=rule).policy(amount)
        verdicts = []
        for task in ("passkey", "lookup"):
            tokens, answers = prompts(CALIBRATION, task, row.context, range(4))
            memory = scorer.read(tokens, ANSWER_TOKENS[task])
            verdicts.append(scorer.score(memory, answers, roles, policy, row.page_size))
        read[rule] = sum(each.sparse_read for each in verdicts) / sum(each.held for each in verdicts) / (~roles).sum()
    assert read["ratio"] == pytest.approx(6 / 49)
    assert read["top_p"] == pytest.approx(read["ratio"], rel=0.06)
    assert read["threshold"] == pytest.approx(read["ratio"], rel=0.06)


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_the_same_again_and_fit(task: str):
    tokens, answers = prompts(HELD_OUT, task, 1024, range(3, 6), rows=4)
    again, _ = prompts(HELD_OUT, task, 1024, range(4, 5))
    assert tokens.shape == (4, 1024)
    assert answers.shape == (4, ANSWER_TOKENS[task])
    assert (tokens[1] == again[0]).all()
    assert (answers[3] == -1).all()
    for row in answers[:3]:
        assert row[row >= 0][-1] == language.EOS
    for stream in (CALIBRATION, HELD_OUT):
        other, _ = prompts(stream, task, 1024, range(4, 5), seed=1)
        assert (other != again).any()


def test_the_longest_answers_fit():
    for task in TASKS:
        for index in range(150):
            prompts(HELD_OUT, task, 1024, range(index, index + 1))


def test_a_dialogue_has_whole_answers():
    made = dialogue(1024, 300, 0)
    assert len(made.document) == 1024
    assert 250 < len(made.tokens) <= 300
    assert made.tokens[-1] == language.EOS
    ends = [i for i, token in enumerate(made.tokens) if token == language.EOS]
    assert [made.answers[i] for i in ends] == list(range(1, len(ends) + 1))


def test_an_answer_is_exact_if_all_of_it_is_greedy():
    answers = np.asarray([0, 1, 1, 0, 2, 2, 3])
    greedy = np.asarray([False, True, True, False, True, False, True])
    assert scoring.exact(answers, greedy).tolist() == [True, False, True]


# --- the whole --------------------------------------------------------------------------------------------------------


def grid_of(points: tuple[int, ...] = (1, 2, 3, 4)) -> Grid:
    return Grid(points, ["passkey"], [CONTEXT], [0], HEADS)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory) -> Path:
    """What the command leaves: `study` is its folder, `docs` where it published."""
    where = tmp_path_factory.mktemp("whole")
    command.run(
        output=where / "study", chunk_tokens=CHUNK, model=str(folder),
        tasks="passkey", contexts=str(CONTEXT), samples=SIZES.samples,
        dialogues=SIZES.dialogues, dialogue_tokens=SIZES.dialogue_tokens, seeds="0", retrieval_heads=HEADS,
        steps=SIZES.steps, train_lengths="512,512", json_file=where / "copy.json", publish=where / "docs",
    )  # fmt: skip
    return where


def results(where: Path) -> dict[str, Any]:
    return json.loads((where / "study" / study.RESULTS).read_text())


@pytest.mark.slow
def test_every_row_is_there_in_its_form(whole: Path):
    found = results(whole)
    assert set(found) == {"device", "jax", "command", "sizes", "rows", "between", "maps"}
    assert len(found["rows"]) == len(grid_of().rows())
    for row in found["rows"]:
        assert set(row) == FIELDS
        # Random weights answer nothing; nor may what fills the last chunk of prompts count.
        assert row["score"] == row["dense_score"] == 0.0
        assert 0.0 < row["cache_read"] < 100.0
        assert row["retrieval_heads"] == HEADS
        assert row["model"] == "tiny"
        assert row["samples"] == (SIZES.samples if row["task"] != DIALOGUE else row["samples"]) > 0
        assert (row["amount"] is None) == (row["rule"] in ("budget", "forced"))
    for name, head_map in found["maps"].items():
        assert sum(map(len, head_map["retrieval"])) == HEADS, name
    assert set(found["maps"]) == {f"{method}-0" for method in ("hardkuma", "hardconcrete", "plain", "layer", "random")}
    assert [run["method"] for run in found["between"]] == ["hardkuma", "hardconcrete", "plain"]
    assert all(
        run["steps"] == [1, 3] and 0.0 <= min(run["share"]) <= max(run["share"]) <= 1.0 for run in found["between"]
    )


@pytest.mark.slow
def test_what_is_published_is_what_was_found(whole: Path):
    published = sorted(path.name for path in (whole / "docs" / "results").iterdir())
    assert published == ["heads.json", "heads.md", *sorted(report.PICTURES.values())]
    for copy in (whole / "copy.json", whole / "docs" / "results" / "heads.json"):
        assert json.loads(copy.read_text()) == results(whole)
    text = (whole / "docs" / "results" / "heads.md").read_text()
    assert len(re.findall("^## ", text, re.MULTILINE)) == 7
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (whole / "docs" / "results" / picture).read_bytes().startswith(b"\x89PNG")


class _Stop(Exception):
    pass


@pytest.mark.slow
def test_a_study_goes_on_where_it_was_stopped(model: LLM, whole: Path, tmp_path: Path, monkeypatch):
    shutil.copytree(whole / "study", tmp_path, dirs_exist_ok=True)
    (tmp_path / "scores.jsonl").unlink()
    (tmp_path / study.CALIBRATION).unlink()
    scored: list[tuple[str, int]] = []
    add = Tally.add

    def added(self: Tally, row: Row, first: int, count: Count) -> None:
        scored.append((row.key, first))
        add(self, row, first, count)

    monkeypatch.setattr(Tally, "add", added)
    for stage, after in (("scoring answers", 1), ("scoring answers", 17), ("generating dialogues", 150)):

        def stop(at: str, done: int, total: int, stage: str = stage, after: int = after) -> None:
            if at == stage and done >= after:
                raise _Stop

        with pytest.raises(_Stop):
            study.Study(model, grid_of(), SIZES, tmp_path, stop, chunk_tokens=CHUNK).run("again")
    with (tmp_path / "scores.jsonl").open("a") as file:
        file.write('{"row": {"meth')  # a line that was cut off
    found = study.Study(model, grid_of(), SIZES, tmp_path, quiet, chunk_tokens=CHUNK).run("again")
    # Whatever was interrupted, each row and chunk was counted once, and the result is that of one go.
    assert max(collections.Counter(scored).values()) == 1
    assert found["rows"] == results(whole)["rows"]

    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("a finished study computes nothing")

    for place, name in ((Scorer, "score"), (Scorer, "read"), (Scorer, "masses"), (LLM, "stream_tokens")):
        monkeypatch.setattr(place, name, never)
    assert study.Study(model, grid_of(), SIZES, tmp_path, quiet, chunk_tokens=CHUNK).run("again") == found


@pytest.mark.slow
def test_a_folder_with_another_study_is_refused(model: LLM, whole: Path):
    with pytest.raises(UserError, match="holds a run with other settings"):
        study.Study(model, grid_of(), dataclasses.replace(SIZES, samples=4), whole / "study", quiet, chunk_tokens=CHUNK)


def test_other_weights_do_not_go_on(model: LLM, tmp_path: Path):
    other = dataclasses.replace(model, model=model.spec.merge(tuple(array + 1 for array in model.weights)))
    study.Study(model, grid_of(), SIZES, tmp_path, quiet, chunk_tokens=CHUNK)
    with pytest.raises(UserError, match=r"other settings \(weights was"):
        study.Study(other, grid_of(), SIZES, tmp_path, quiet, chunk_tokens=CHUNK)


def test_answers_in_dialogues_are_counted_as_the_engine_writes_them(model: LLM, tmp_path: Path, monkeypatch):
    """The dialogues are what the engine itself writes with roles, in answers of five tokens; one token is changed."""
    row = next(each for each in grid_of((3,)).dialogues() if each.budget == 1 / 8 and not each.correction)
    head_map, policy = maps.map_of(maps.random_roles(model.config, HEADS, 1), model.config, "r"), row.policy()
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, 1000, CONTEXT).tolist() for _ in range(2)]
    options = GenerateOptions("hybrid", head_map, policy, max_new_tokens=40, ignore_eos=True)
    tokens = model.generate_tokens(documents, options).tokens
    tokens[1][39] = (tokens[1][39] + 1) % 1024
    marks = [1 + i // 5 for i in range(40)]
    made = [Dialogue(*each, marks) for each in zip(documents, tokens, strict=True)]
    monkeypatch.setattr(scoring, "dialogue", lambda context, total, index: made[index])
    done: list[int] = []
    tally = Tally(tmp_path)
    job = scoring.Job(DIALOGUE, CONTEXT, range(2), 2, (row,))
    scoring.score_dialogues(model, [job], lambda _: head_map, lambda _: policy, tally, done.append, tokens=40)
    count = tally.total(row)
    assert (count.right, count.total) == (15, 16)
    assert 0 < count.read < count.held
    assert sum(done) == 40
    assert Tally(tmp_path).total(row) == count


# --- what is said -----------------------------------------------------------------------------------------------------


def said(scores: dict[str, list[float]]) -> str:
    """The targets' lines for scores of each method's seeds at 1/8, dense being 99."""
    rows = []
    for method, seeds in scores.items():
        for seed, score in enumerate(seeds):
            row = dataclasses.asdict(row_of(8192, 1 / 8, method=method, seed=seed))
            if method == "none":
                row["rule"] = "forced"
            rows.append({**row, "score": score, "dense_score": 99.0, "budget_tokens": 1024})
    return "\n".join(report._targets({"rows": rows}))


def test_the_targets_are_judged_by_the_rows():
    good = said({"hardkuma": [98.0, 99.0], "layer": [92.0, 96.0], "none": [10.0, 10.0]})
    assert good.count(": met") == 2
    assert "(-0.50 points)" in good
    # A lead of 1.5 is less than what the seeds of the other differ by.
    assert "**not met**: not above layer (+1.50, spread 2.00)." in said({"hardkuma": [98, 98.0], "layer": [95.5, 97.5]})
    assert "at a budget of 1/8: **not met** (-1.50 points)" in said({"hardkuma": [97.0, 98.0], "layer": [0.0, 0.0]})


def test_bad_options_are_said_in_one_line(tmp_path: Path, monkeypatch, capsys):
    for options, message in (
        (["--points", "1,5"], "point 5 is unknown; use some of 1, 2, 3, 4"),
        (["--tasks", "poems"], "task 'poems' is unknown; use some of only-passkey"),
        (["--contexts", "8k"], "--contexts 8k: give whole numbers"),
        (["--seeds", "1,1"], "seeds: something is given twice"),
        (["--samples", "0"], "samples is 0; it must be at least 1"),
        (["--retrieval-heads", "32"], "the model has 32: none would be sparse"),
        (["--train-lengths", "5"], "--train-lengths 5: give two numbers"),
    ):
        monkeypatch.setattr("sys.argv", ["study", "--output", str(tmp_path / "out"), *options])
        assert command.main(command.run) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert error[-1].startswith("error: ")
        assert message in error[-1]
        assert not (tmp_path / "out").exists()
