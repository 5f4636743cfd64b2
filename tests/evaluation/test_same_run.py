"""A folder of answers belongs to one run: to these weights, texts, data and prompts, by what they hold."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.benchmarks.shapes import MODELS
from lychee_jax.cli import main as cli
from lychee_jax.engine.options import GenerateOptions
from lychee_jax.errors import UserError
from lychee_jax.evaluation.cases import Case, Cell, Task
from lychee_jax.evaluation.journal import Journal
from lychee_jax.evaluation.longbench import TASKS, LongBench
from lychee_jax.evaluation.passkey import STYLE, Passkey
from lychee_jax.evaluation.perplexity import FilePerplexity
from lychee_jax.evaluation.ruler_data import Files
from lychee_jax.evaluation.runner import EvaluationPlan, tokenizer_of
from lychee_jax.evaluation.session import evaluate
from lychee_jax.evaluation.variants import variants_of
from lychee_jax.llm import LLM
from lychee_jax.loading import load
from lychee_jax.models.digest import weights_digest
from lychee_jax.models.spec import ModelSpec
from lychee_jax.text.chat import ChatOptions
from tests.support import tiny_checkpoints

DATED = "{{ strftime_now('%f') }} {% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_checkpoints.write_speaker(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> LLM:
    return load(folder)


def run(model: LLM, task: Task, output: Path) -> list[dict]:
    """Ask one prompt, dense; returns the answers that the folder holds."""
    options = GenerateOptions(
        heads=HeadMap.none(model.config), policy=SelectionPolicy(64, 16, 16), page_size=16, eos_ids=model.eos_ids
    )
    evaluate(model, STYLE, EvaluationPlan([Cell(task, 160, 1)], variants_of(["dense"], []), options), output, {})
    return [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]


def passkey(model: LLM, chat: ChatOptions | None = None) -> Passkey:
    return Passkey(tokenizer_of(model), facts=1, max_new_tokens=2, chat=chat)


def test_other_weights_are_refused_wherever_they_lie_and_the_same_ones_go_on(model, folder, tmp_path):
    output = tmp_path / "out"
    before = run(model, passkey(model), output)
    copy = load(tiny_checkpoints.write_speaker(tmp_path / "copy"))
    assert run(copy, passkey(copy), output) == before
    other = load(tiny_checkpoints.write_speaker(tmp_path / "elsewhere" / folder.name, seed=1))
    with pytest.raises(UserError, match=r"other settings \(weights was"):
        run(other, passkey(other), output)
    tiny_checkpoints.write_speaker(tmp_path / "copy", seed=1)
    overwritten = load(tmp_path / "copy")
    with pytest.raises(UserError, match=r"other settings \(weights was"):
        run(overwritten, passkey(overwritten), output)
    assert [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()] == before


def test_a_text_of_other_content_is_refused_by_name_and_more_texts_may_come(model, tmp_path):
    one, more, output = tmp_path / "book.txt", tmp_path / "more.txt", tmp_path / "out"
    one.write_text("The old fox ran to the river. " * 40)
    more.write_text("The young fox ran to the river. " * 40)

    def ask(path: Path) -> list[dict]:
        return run(model, FilePerplexity(tokenizer_of(model), path, 4, 1), output)

    assert len(ask(one)) == 1
    assert len(ask(more)) == 2
    one.write_text("The old fox ran to the river. " * 40 + "It ran.")  # behind the only window
    with pytest.raises(UserError, match=r"other contents of book\.txt; give another folder"):
        ask(one)


def test_a_line_of_a_data_file_that_changed_is_noticed(model, tmp_path):
    """Also one that is not asked again."""
    lines = [json.dumps({"context": "fox " * n, "input": "Where?", "answers": ["here"]}) for n in (1, 2)]
    file = tmp_path / f"{TASKS[0]}.jsonl"
    file.write_text("\n".join(lines))
    before = LongBench(tokenizer_of(model), TASKS[0], tmp_path).inputs
    file.write_text("\n".join([lines[0], lines[1].replace("here", "there")]))
    assert LongBench(tokenizer_of(model), TASKS[0], tmp_path).inputs != before
    assert before.keys() == {file.name}


def test_ruler_says_which_files_it_has_read(tmp_path):
    (tmp_path / "PaulGrahamEssays.json").write_text(json.dumps({"text": "one two"}))
    files = Files(tmp_path)
    assert files.digests == {}
    assert files.essays == ["one", "two"]
    assert files.digests.keys() == {"PaulGrahamEssays.json"}


def with_template(folder: Path, template: str) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))


def test_another_date_in_the_chat_template_is_refused(tmp_path):
    """The template writes microseconds, so that no two prompts are the same."""
    with_template(tiny_checkpoints.write_speaker(tmp_path / "model"), DATED)
    model = load(tmp_path / "model")
    run(model, passkey(model, ChatOptions()), tmp_path / "out")
    with pytest.raises(UserError, match="passkey at length 160, prompt 0, is not what was asked"):
        run(model, passkey(model, ChatOptions()), tmp_path / "out")


def test_a_prompt_is_asked_once_and_stays_what_it_was(model, tmp_path):
    """Where a later variant meets it in another form, in the midst of a run, too."""
    journal, cell = Journal(tmp_path / "out", {}), Cell(passkey(model), 160, 2, 0.5)
    journal.keep_prompt(cell, 1, Case("a", [1, 2], ["x"], 3, forced=[4]))
    journal.keep_prompt(cell, 1, Case("a", [1, 2, 4], ["x"], 3))  # only read in another way
    again = Journal(tmp_path / "out", {})
    again.check_prompt(cell, 0, Case("b", [9], [], 1))
    for changed in (Case("a", [1, 2, 5], ["x"], 3), Case("a", [1, 2, 4], ["y"], 3), Case("a", [1, 2, 4], ["x"], 4)):
        with pytest.raises(UserError, match=r"length 160 and depth 0\.5, prompt 1, is not what was asked"):
            again.keep_prompt(cell, 1, changed)


def test_the_command_refuses_an_edited_template(capfd, tmp_path):
    """Also where no prompt shows it, as for long conversations alone; without a chat it does not matter."""
    folder, template = tmp_path / "model", "{% for message in messages %}{{ message.content }}{% endfor %}"
    tiny_checkpoints.write_speaker(folder)
    command = ["eval", "passkey", "--model", folder, "--lengths", "160", "--samples", "1", "--facts", "1", "--depths",
               "any", "--attention", "dense", "--page-size", "16", "--sink", "16", "--recent", "16",
               "--output"]  # fmt: skip

    def lychee(*argv: object) -> tuple[int, str]:
        return cli.main([str(part) for part in (*command, *argv)]), capfd.readouterr().err

    with_template(folder, template)
    assert lychee(tmp_path / "plain") == (0, "")
    assert lychee(tmp_path / "chat", "--chat") == (0, "")
    with_template(folder, template + "{% if messages | length > 9 %}!{% endif %}")
    assert lychee(tmp_path / "plain") == (0, "")
    status, error = lychee(tmp_path / "chat", "--chat")
    assert status == 2
    assert "chat_template was" in error
    assert error.count("\n") == 1


def test_every_number_of_every_tensor_counts():
    spec, _ = ModelSpec.abstract(MODELS["bundled"], "float32")
    names = dataclasses.replace(spec, names=("a", "b"), axes=spec.axes[:2])
    weights = [jnp.ones((3, 5), jnp.bfloat16), jnp.arange(4, dtype=jnp.float32)]
    found, told = weights_digest(names, weights), []
    assert weights_digest(names, [array.copy() for array in weights], lambda *at: told.append(at)) == found
    assert told == [(30, 46), (46, 46)]
    others = [
        (names, [weights[0].at[2, 4].set(1.0078125), weights[1]]),
        (names, [weights[0].reshape(5, 3), weights[1]]),
        (dataclasses.replace(names, names=("a", "c")), weights),
        (names, [weights[0].astype(jnp.float16), weights[1]]),
    ]
    assert len({found, *(weights_digest(*each) for each in others)}) == 5
