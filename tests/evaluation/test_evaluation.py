"""Evaluations as runs: the same results whatever interrupts them, folders that are resumed or refused, the report."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.cli import main as cli
from lychee_jax.engine.options import GenerateOptions
from lychee_jax.errors import UserError
from lychee_jax.evaluation.cases import Case, Cell
from lychee_jax.evaluation.passkey import STYLE, Passkey
from lychee_jax.evaluation.report import EvaluationReport, Style
from lychee_jax.evaluation.runner import EvaluationPlan
from lychee_jax.evaluation.session import evaluate
from lychee_jax.evaluation.variants import Budget, variants_of
from lychee_jax.llm import LLM
from lychee_jax.loading import load
from tests.support import tiny_checkpoints


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny random model that speaks the bundled tokenizer: its answers are noise, but always the same noise."""
    return tiny_checkpoints.write_speaker(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> LLM:
    return load(folder)


def plan_of(model: LLM, *, samples: int = 5, batch: int = 2, decode_last: int = 0) -> EvaluationPlan:
    assert model.tokenizer is not None
    task = Passkey(model.tokenizer, facts=2, max_new_tokens=6)
    cells = [Cell(task, 300, samples, depth) for depth in (0.0, 1.0)]
    options = GenerateOptions(
        heads=HeadMap.none(model.config), policy=SelectionPolicy(64, 16, 16), page_size=16, eos_ids=model.eos_ids
    )
    return EvaluationPlan(cells, variants_of(["dense", "hybrid"], ["1/3"]), options, batch, decode_last)


def answers(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    return sorted(lines, key=lambda line: (line["length"], line["depth"], line["index"], line["variant"]))


class Interrupt(Exception):
    pass


def test_an_interrupted_run_ends_as_an_undisturbed_one(model, tmp_path):
    whole = evaluate(model, STYLE, plan_of(model), tmp_path / "whole", {"seed": 0})
    assert len(answers(tmp_path / "whole")) == plan_of(model).answers == 20
    parts = tmp_path / "parts"
    for stop, batch in ((2, 2), (9, 3), (15, 2)):

        def tell(cell: Cell, count: int, stop: int = stop) -> None:
            if count and len(answers(parts)) >= stop:
                raise Interrupt

        with pytest.raises(Interrupt):
            evaluate(model, STYLE, plan_of(model, batch=batch), parts, {"seed": 0}, tell)
        with (parts / "answers.jsonl").open("a") as file:
            file.write('{"task": "passkey", "len')  # as a process leaves it that is killed while it writes
    told: list[int] = []
    resumed = evaluate(model, STYLE, plan_of(model), parts, {"seed": 0}, lambda cell, count: told.append(count))
    assert sum(told) == 20
    assert answers(parts) == answers(tmp_path / "whole")
    assert {answer["kv_read_share"] for answer in answers(parts) if answer["variant"] == "dense"} == {1.0}
    assert all(answer["kv_read_share"] < 1 for answer in answers(parts) if answer["variant"] != "dense")
    assert resumed.to_json()["results"] == whole.to_json()["results"]
    prompts = [json.loads(line) for line in (parts / "prompts.jsonl").read_text().splitlines()]
    assert len(prompts) == 10
    assert all("Answer:" in prompt["prompt"] for prompt in prompts)
    assert {path.name for path in parts.iterdir()} == {
        "answers.jsonl", "prompts.jsonl", "settings.json", "results.json", "results.md", "results.png",
    }  # fmt: skip
    assert (parts / "results.png").read_bytes()[:4] == b"\x89PNG"


def test_a_folder_grows_and_other_settings_are_refused(model, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    evaluate(model, STYLE, plan_of(model, samples=1), tmp_path, {"seed": 0})
    grown = evaluate(model, STYLE, plan_of(model, samples=2), tmp_path, {"seed": 0})
    assert {result.samples for result in grown.results} == {2}
    assert (tmp_path / "mine.txt").read_text() == "mine"
    with pytest.raises(UserError, match="seed was 0, now 1"):
        evaluate(model, STYLE, plan_of(model, samples=1), tmp_path, {"seed": 1})
    with pytest.raises(UserError, match="is a file"):
        evaluate(model, STYLE, plan_of(model, samples=1), tmp_path / "mine.txt", {"seed": 0})


def test_the_token_that_ends_an_answer_is_not_in_it(model, tmp_path):
    """Though the tokenizer does not call it special, so that it would show; an exact match would be none."""
    plan = plan_of(model, samples=1)
    case = plan.cells[0].task.case(300, 0.0, 0)
    first, second = model.generate([case.tokens], max_new_tokens=2, attention="dense", page_size=16).tokens[0]
    assert first != second
    assert second not in model.tokenizer.special_ids
    ended = dataclasses.replace(plan, options=dataclasses.replace(plan.options, eos_ids=(second,)))
    evaluate(model, STYLE, ended, tmp_path, {})
    answer = next(each for each in answers(tmp_path) if (each["depth"], each["variant"]) == (0.0, "dense"))
    assert (answer["answer"], answer["new_tokens"]) == (model.tokenizer.decode([first]), 2)


def test_a_prompt_read_to_its_end_token_by_token_gets_the_same_dense_answer(model, tmp_path):
    evaluate(model, STYLE, plan_of(model, samples=2), tmp_path / "read", {})
    evaluate(model, STYLE, plan_of(model, samples=2, decode_last=20), tmp_path / "decoded", {})
    read, decoded = answers(tmp_path / "read"), answers(tmp_path / "decoded")
    for one, other in zip(read, decoded, strict=True):
        assert one["prompt_tokens"] == other["prompt_tokens"]
        assert len(other["forced_logprobs"]) == 20
        if one["variant"] == "dense":
            assert one["answer"] == other["answer"]


def test_budgets_are_numbers_or_shares():
    options = GenerateOptions()
    assert [variant.label for variant in variants_of(["dense", "hybrid"], ["1024", "1/8"])] == [
        "dense", "hybrid@1024", "hybrid@1/8",
    ]  # fmt: skip
    assert Budget.parse("1024").at(100, options) == 1024
    assert Budget.parse("1/8").at(16384, options) == 2048
    assert Budget.parse("1/8").at(1000, options) == 512  # six forced pages, and two to pick
    for bad in ("", "1/0", "2/8", "-5", "x"):
        with pytest.raises(UserError, match="neither a number of tokens nor a share"):
            Budget.parse(bad)
    with pytest.raises(UserError, match="given twice"):
        variants_of(["hybrid"], ["512", "512"])
    with pytest.raises(UserError, match="unknown; use some of auto, hybrid, dense"):
        variants_of(["sparse"], ["512"])


def record(task: str, variant: str, score: float, length: int = 1024) -> dict:
    case = {"task": task, "length": length, "depth": None, "index": 0}
    return {**case, "variant": variant, "score": score, "kv_read_share": 0.5}


def test_the_table_and_the_json_say_what_was_scored():
    records = [record("a", "dense", s) for s in (1.0, 0.0, 1.0, 1.0)] + [record("b", "dense", 0.5)]
    records += [record("a", "hybrid@64", 0.25)]
    report = EvaluationReport.of(Style("bench", "%", "task", average=True), {"model": "tiny"}, records)
    lines = report.markdown().splitlines()
    assert lines[2] == "| length | variant | a | b | mean | KV cache read | samples |"
    assert lines[4] == "| 1,024 | dense | 75.0 | 50.0 | 62.5 | 50% | 1 to 4 |"
    assert lines[5] == "| 1,024 | hybrid@64 | 25.0 |  |  | 50% | 1 |"
    rows = report.to_json()["results"]
    assert rows[0]["stderr"] == pytest.approx(0.5 / math.sqrt(4))
    assert rows[1]["stderr"] is None
    assert rows[0]["shown"] == 75.0


class Refusing:
    """A task whose cases cannot be made."""

    name = "refusing"

    def case(self, length: int, depth: float | None, index: int) -> Case:
        raise UserError("no room")

    def score(self, case: Case, answer: str, logprobs: list[float]) -> float:
        return 0.0


def test_bad_plans_are_refused_before_they_run(model, tmp_path):
    good = plan_of(model)
    with pytest.raises(UserError, match="given twice"):
        evaluate(
            model, STYLE, EvaluationPlan([*good.cells, good.cells[0]], good.variants, good.options), tmp_path / "a", {}
        )
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluate(model, STYLE, EvaluationPlan([], good.variants, good.options), tmp_path / "a", {})
    with pytest.raises(UserError, match="multiple of the page size"):
        EvaluationPlan(good.cells, variants_of(["hybrid"], ["70"]), good.options)
    with pytest.raises(UserError, match="batch is 0"):
        EvaluationPlan(good.cells, good.variants, good.options, batch=0)
    with pytest.raises(UserError, match="samples is 0"):
        EvaluationPlan([Cell(Refusing(), 64, 0)], good.variants, good.options)
    with pytest.raises(UserError, match="no room"):
        evaluate(
            model, STYLE, EvaluationPlan([Cell(Refusing(), 64, 1)], good.variants, good.options), tmp_path / "b", {}
        )


SMALL = ["--page-size", "16", "--sink", "16", "--recent", "16", "--heads", "none"]


def lychee(capfd, *argv: object) -> tuple[int, str, str]:
    status = cli.main([str(part) for part in argv])
    return status, *capfd.readouterr()


def test_the_command_prints_its_table_and_resumes(capfd, folder, tmp_path):
    command = ["eval", "passkey", "--model", folder, "--lengths", "300", "--depths", "any,0.5", "--samples", "1",
               "--facts", "2", "--budget", "64", "--output", tmp_path / "out", *SMALL]  # fmt: skip
    status, out, _ = lychee(capfd, *command)
    assert status == 0
    assert "| passkey | 300 | hybrid@64 |" in out
    assert "| any | 0.5 |" in out
    before = (tmp_path / "out" / "answers.jsonl").read_bytes()
    assert lychee(capfd, *command)[:2] == (0, out)
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lengths", "4k"], "--lengths has '4k'"),
        (["--lengths", ","], "--lengths is empty"),
        (["--depths", "2"], "--depths has 2"),
        (["--depths", "top"], "--depths has 'top'"),
        (["--attention", "sparse"], "attention 'sparse' is unknown"),
        (["--budget", "2/3"], "neither a number of tokens nor a share"),
        (["--tasks", "passport"], "task 'passport' is unknown"),
        (["--page-size", "0"], "page size is 0"),
        (["--lengths", "100000"], "above the model's limit of 2,048"),
    ],
)
def test_bad_options_end_with_one_line(capfd, folder, tmp_path, argv, message):
    status, out, err = lychee(
        capfd, "eval", "passkey", "--model", folder, "--samples", "1", "--facts", "2", "--output", tmp_path / "o", *argv
    )
    assert status == 2
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert out == ""
