"""The study of a real model: prompts of an exact length, paired differences, and the whole of it on a tiny model."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lychee_jax.errors import UserError
from lychee_jax.llm import LLM
from lychee_jax.loading import load
from lychee_jax.studies.real_model import __main__ as command
from lychee_jax.studies.real_model import report
from lychee_jax.studies.real_model.prompts import HELD_OUT, PERPLEXITY, SCORED, TASKS, VALIDATION, Prompts
from lychee_jax.studies.real_model.study import Sizes, Study
from lychee_jax.studies.real_model.variants import PAGE, RECENT, SINK, Grid, Variant
from lychee_jax.text.tokenizer import Tokenizer
from tests.support import tiny_checkpoints

LENGTH = 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_checkpoints.write_speaker(tmp_path_factory.mktemp("real") / "speaker")


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("books") / "book.txt"
    file.write_text(" ".join(f"On day {day} the boat came to the town." for day in range(1200)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def prompts(folder, book) -> Prompts:
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    return Prompts(tokenizer, book)


@pytest.mark.parametrize("task", [*TASKS, PERPLEXITY])
def test_prompts_have_the_length_and_hold_their_answer(prompts, task):
    for index in range(6):
        asked = prompts.make(HELD_OUT, task, LENGTH + index, index)
        assert len(asked.tokens) == LENGTH + index
        assert len(asked.answer) == prompts.width(task)
        again = prompts.make(HELD_OUT, task, LENGTH + index, index)
        np.testing.assert_array_equal(asked.tokens, again.tokens)
        if task == PERPLEXITY:
            assert len(asked.answer) == SCORED
            continue
        text = prompts.tokenizer.decode(asked.tokens.tolist())
        assert text.count(f"is: {asked.text}.") == 1
        assert text.count("One of the special magic numbers") == TASKS[task]
        key = text.rpartition("number for ")[2].partition(" mentioned")[0]
        assert f"for {key} is: {asked.text}." in text
        assert prompts.tokenizer.decode(asked.answer[asked.answer >= 0].tolist()).strip() == asked.text


def test_streams_share_no_prompt_and_rows_past_the_end_have_no_answer(prompts):
    held, tried = (prompts.make(stream, "passkey_prose", LENGTH, 0) for stream in (HELD_OUT, VALIDATION))
    assert held.text != tried.text
    batch = prompts.batch(HELD_OUT, "passkey_prose", LENGTH, range(2), rows=3)
    assert [bool((row.answer >= 0).any()) for row in batch] == [True, True, False]


def test_what_does_not_fit_is_refused(prompts, tmp_path):
    with pytest.raises(UserError, match="too short"):
        prompts.make(HELD_OUT, "lookup_prose", 300, 0)
    short = tmp_path / "short.txt"
    short.write_text("A sentence. " * 20, encoding="utf-8")
    with pytest.raises(UserError, match="1,000 or more"):
        dataclasses.replace(prompts, prose=short).make(HELD_OUT, "passkey_prose", LENGTH, 0)
    with pytest.raises(UserError, match="multiple of the page size"):
        Grid(budgets=(300,))


def test_marks_keep_their_places():
    assert report.marks({0: 1, 3: 0}) == "1--0"
    assert report.unmarked("1--0") == {0: 1, 3: 0}
    assert report.marks({}) == ""


def test_paired_differences():
    """Only prompts that differ count; the interval is wide where few were asked, and never a point."""
    ours, theirs = [1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 1]
    middle, low, high = report.paired_interval(ours, theirs)
    assert middle == pytest.approx(100 / 6)
    n, gained, lost = 8, 2.5, 1.5
    deviation = math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n
    assert high - low == pytest.approx(2 * 196 * deviation)
    assert report.paired_interval([1] * 500, [1] * 500)[2] == pytest.approx(0.39, abs=0.01)
    assert report.paired_interval(theirs, ours)[0] == pytest.approx(-middle)


def test_every_variant_keeps_two_recent_pages_and_a_window_fills_its_budget():
    variants = Grid().variants(3)
    assert len({variant.label for variant in variants}) == len(variants)
    for variant in variants:
        assert variant.policy.forced_pages(PAGE) * PAGE >= SINK + RECENT
        assert variant.policy.recent >= 2 * PAGE
    window = Variant("window-16-0", 512).policy
    assert (window.rule, window.sink + window.recent) == ("forced", 512)
    assert Grid().layers(3) == {16: 18, 12: 12, 24: 24}


def test_other_weights_do_not_go_on(folder, book, prompts, tmp_path):
    def begin(model: LLM) -> None:
        Study(model, prompts, book, Grid(), Sizes(), tmp_path, lambda *_: None)

    model = load(folder)
    begin(model)
    begin(load(folder))
    other = dataclasses.replace(model, model=model.spec.merge(tuple(array + 1 for array in model.weights)))
    with pytest.raises(UserError, match=r"other settings \(weights was"):
        begin(other)


@pytest.fixture(scope="module")
def studied(folder, book, tmp_path_factory) -> Path:
    """The whole command, then a second time with answers of other systems."""
    output = tmp_path_factory.mktemp("study") / "out"
    arguments = {
        "model": str(folder), "text": book, "training_text": book, "output": output, "lengths": "1024",
        "budgets": "192,256", "compared": 256, "samples": 3, "others": 2, "windows": 2, "rows": 2,
        "retrieval_heads": "4", "seeds": "0", "steps": 2, "train_lengths": "500,600", "ratio": 0.1,
        "data": "passkeys", "stages": "prompts,learn,score,generate,report", "json_file": None, "rivals": None,
    }  # fmt: skip
    command.run(**arguments)
    lines = [json.loads(line) for line in (output / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    rivals = output / "rivals.jsonl"
    rivals.write_text("".join(
        json.dumps({**{name: line[name] for name in ("task", "length", "index")}, "rival": "snapkv", "share": 0.5,
                    "answer": " " + line["references"][0] + ".", "kv_read_share": 0.5}) + "\n"
        for line in lines
    ), encoding="utf-8")  # fmt: skip
    scores = (output / "scores.jsonl").read_bytes()
    command.run(**arguments | {"rivals": rivals, "json_file": output / "copy" / "real.json"})
    assert (output / "scores.jsonl").read_bytes() == scores, "nothing is scored twice"
    other = book.with_name("other.txt")
    other.write_text(book.read_text(encoding="utf-8") + "The end.", encoding="utf-8")
    changes: list[dict[str, Any]] = [
        {"training_text": other},
        {"text": other},
        {"rows": 1},
        {"compared": 192},
        {"samples": 4},
    ]
    for change in changes:
        with pytest.raises(UserError, match="another"):  # chunks of other prompts, or maps of another text
            command.run(**arguments | change)
    return output


def test_the_study_reads_as_much_as_the_engine(studied, folder):
    """A random model answers nothing, so that its answers prove little; the scorer has tests of its own for them."""
    results = json.loads((studied / "results.json").read_text(encoding="utf-8"))
    assert (studied / "copy" / "real.json").read_bytes() == (studied / "results.json").read_bytes()
    cells = report.Cells(results)
    assert results["main"] == "learned-4-0@256"
    for task in TASKS:
        for variant in ("dense", results["main"]):
            scored = cells.right(variant, task, LENGTH)
            (answered,) = (a for a in results["answers"] if (a["task"], a["variant"]) == (task, variant))
            assert list(report.unmarked(answered["right"]).values()) == scored
            assert cells.read(variant, task, LENGTH) == pytest.approx(100 * answered["kv_read_share"], abs=0.5)
    model = load(folder)
    assert model.tokenizer is not None
    losses = next(c["losses"] for c in results["cells"] if (c["variant"], c["task"]) == ("dense", PERPLEXITY))
    assert len(losses) == 2
    assert min(losses) > 0


def test_other_systems_stand_beside_it(studied):
    results = json.loads((studied / "results.json").read_text(encoding="utf-8"))
    assert [(rival["task"], rival["length"], rival["right"]) for rival in results["rivals"]] == [
        (task, length, "1" * count) for task in sorted(TASKS) for length, count in ((LENGTH, 3),)
    ]
    assert all((rival["system"], rival["kv_read_share"]) == ("snapkv at 0.5", 0.5) for rival in results["rivals"])
    table = (studied / "report.md").read_text(encoding="utf-8")
    assert "| snapkv at 0.5 | 50.0 |" in table
    # A random model answers nothing, so no cell is counted and no target is claimed.
    assert results["targets"] == []
    assert "(100.0 · +100.0" in table


def test_targets_are_about_counted_cells():
    cells = [
        {"variant": variant, "task": task, "length": 4096, "right": right, "read": 1, "held": 4}
        for task, dense in (("easy", "1110"), ("hard", "0100"))
        for variant, right in (("dense", dense), ("learned-4-0@256", "1100"))
    ]
    rivals = [
        {"system": "quest", "task": "easy", "length": length, "right": right, "kv_read_share": 0.25}
        for length, right in ((2048, "1111"), (4096, "1000"))
    ]
    found = report.targets({"cells": cells, "main": "learned-4-0@256", "rivals": rivals})
    assert [(target["value"], target["target"], target["sense"]) for target in found] == [
        (25.0, 1.0, "<="), (25.0, 0.0, ">="),
    ]  # fmt: skip
