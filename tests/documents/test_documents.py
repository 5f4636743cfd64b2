"""What the documents show can be run: every command in a code block, every Python block, every link to a file.

Commands run as they stand, in a folder with the files that they name, on tiny models and with small numbers.
"""

import json
import random
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

import lychee_jax
import pallas_kernels
from lychee_jax.benchmarks import shapes, tpu_schedule
from lychee_jax.benchmarks.tpu_schedule import ASSUMPTIONS, ScheduleReport, ScheduleRow
from lychee_jax.benchmarks.tpu_step import TpuStepRow
from lychee_jax.cli import main as cli
from lychee_jax.cli.serve import serve
from lychee_jax.config import ModelConfig
from lychee_jax.data import language
from lychee_jax.evaluation.longbench import TASKS
from lychee_jax.loading import BUNDLED
from lychee_jax.studies import pretrain, profile_heads
from lychee_jax.studies.head_maps import __main__ as study
from lychee_jax.studies.real_model import __main__ as real_model
from tests.support import tiny_checkpoints

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", BUNDLED / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Options that decide how long a command takes, and what they become here.
SMALL = {
    "--samples": "1", "--max-new-tokens": "3", "--context": "200", "--batch": "2", "--decode-last": "4",
    "--lengths": "1700", "--facts": "3", "--retrieval-heads": "3", "--tensor-parallel": "1",
}  # fmt: skip
HEADS = {"format": "lychee-heads/1", "model": "tiny", "num_layers": 2, "num_kv_heads": 2, "retrieval": [[0, 1], [1]]}
MODELS = ("qwen3-8b", "my-8b")


def blocks(document: Path) -> Iterator[tuple[str, str]]:
    """Language and text of every fenced block."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every command line that is shown, without its comment, once: where its numbers go makes it no other command."""
    found: dict[str, str] = {}
    for document in DOCUMENTS:
        for tag, text in blocks(document):
            for line in text.splitlines() if not tag else ():
                line = line.split(" #")[0].strip()
                if re.match(r"(lychee|make|pip|python)\s", line):
                    found.setdefault(re.sub(r" --json \S+", "", line), line)
    return list(found.values())


COMMANDS = commands()
# A server does not end: tests/server/test_document.py runs the clients that docs/serving.md shows.
LYCHEE = [line for line in COMMANDS if re.match(r"lychee (?!serve\b)", line)]
OTHERS = [line for line in COMMANDS if line not in LYCHEE]
SHOWN = [block for document in DOCUMENTS if document.stem != "serving" for block in blocks(document)]
PYTHON = list(dict.fromkeys(text for tag, text in SHOWN if tag == "python"))


def squad() -> dict:
    entries = [
        {"question": f"What is {i}?", "is_impossible": False, "answers": [{"text": f"number {i}"}]} for i in range(3)
    ]
    return {"data": [{"paragraphs": [{"context": f"Text {i} is number {i}.", "qas": [entries[i]]} for i in range(3)]}]}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with every file that the documents name."""
    folder = tmp_path_factory.mktemp("workplace")
    raw = tiny_checkpoints.TINY["llama"] | {
        "vocab_size": language.VOCAB_SIZE, "max_position_embeddings": 40000, "eos_token_id": 2,
    }  # fmt: skip
    tiny_checkpoints.write_checkpoint(folder / "qwen3-8b", raw)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, folder / "qwen3-8b")
    shutil.copytree(folder / "qwen3-8b", folder / "my-8b")
    (folder / "heads.json").write_text(json.dumps(HEADS))
    (folder / "full_attention_heads.tsv").write_text("0.25\t1\n0.5\t0\n")
    (folder / "learned").mkdir()
    shutil.copy(folder / "heads.json", folder / "learned")
    (folder / "question.txt").write_text("Where is the fox?")
    (folder / "talk.json").write_text(json.dumps([{"role": "user", "content": "Where is the fox?"}]))
    (folder / "book.txt").write_text("The old fox ran to the river. " * 700)
    shutil.copy(ROOT / "LICENSE", folder)
    (folder / "ids.json").write_text("[5, 6, 7]")
    (folder / "ruler-data").mkdir()
    rng = random.Random(0)
    essay = " ".join(f"On day {i} we saw {rng.randint(1, 99)} birds." for i in range(200))
    (folder / "ruler-data" / "PaulGrahamEssays.json").write_text(json.dumps({"text": essay}))
    (folder / "ruler-data" / "squad.json").write_text(json.dumps(squad()))
    hotpot = [{"question": "Which?", "answer": "one", "context": [["One", ["It is ", "one."]]]}]
    (folder / "ruler-data" / "hotpotqa.json").write_text(json.dumps(hotpot))
    (folder / "tasks").mkdir()
    task = {
        "task": "my_task", "dataset_path": "json", "test_split": "test", "output_type": "loglikelihood_rolling",
        "dataset_kwargs": {"data_files": {"test": str(folder / "tasks" / "texts.jsonl")}}, "doc_to_text": "",
        "doc_to_target": "{{text}}", "metric_list": [{"metric": "word_perplexity"}],
    }  # fmt: skip
    (folder / "tasks" / "my_task.yaml").write_text(json.dumps(task))
    (folder / "tasks" / "texts.jsonl").write_text(json.dumps({"text": "The old fox ran."}))
    (folder / "longbench").mkdir()
    for task in TASKS:
        line = {"context": "words and more words " * 30, "input": "Which?", "answers": ["Paragraph 1"]}
        (folder / "longbench" / f"{task}.jsonl").write_text(json.dumps(line) + "\n")
    return folder


def made_small(argv: list[str], workplace: Path) -> list[str]:
    """The same command with smaller numbers, on a tiny model."""
    argv = [SMALL.get(before, part) for before, part in zip(["", *argv], argv, strict=False)]
    if argv[0] == "convert":  # the hub's model is a folder here
        return ["convert", str(workplace / "qwen3-8b"), "converted", *argv[3:]]
    if argv[:2] == ["eval", "harness"]:
        return argv
    if argv[0] == "eval":
        argv += [part for option in ("--samples", "--batch") if option not in argv for part in (option, SMALL[option])]
    if argv[:2] == ["eval", "perplexity"]:
        argv += ["--scored", "4"]
    if argv[:2] in (["eval", "ruler"], ["eval", "longbench"]) and "--budget" in argv:
        budget = argv.index("--budget") + 1  # each more is programs more; passkey and perplexity take all
        argv[budget] = argv[budget].split(",")[0]
    if argv[:2] == ["eval", "ruler"]:
        argv[argv.index("--lengths") + 1] = "2400"  # cwe needs more words than the others
    if argv[:2] == ["bench", "targets"]:
        return [*argv[:2], *(str(ROOT / file) for file in argv[2:])]
    if argv[:2] == ["bench", "tpu"]:
        return [*argv, "--chip", "v5e"]
    if argv[:2] == ["bench", "kernels"]:
        return [*argv, "--batch", "1", "--repeats", "1", "--dtype", "float32", "--page-size", "16", "--pages", "8",
                "--context", "200", "--working-set", str(1 << 20)]  # fmt: skip
    if argv[0] == "train-heads":
        return [*argv, "--steps", "2", "--min-length", "193", "--max-length", "256", "--room", "48", "--facts", "3",
                "--page-size", "8", "--sink", "8", "--recent", "8"]  # fmt: skip
    if argv[:2] == ["bench", "train"]:
        return [*argv, "--repeats", "1", "--retrieval-heads", "3"]
    if argv[:2] == ["bench", "prefill"]:
        return [*argv, "--repeats", "1", "--page-size", "16"]
    if argv[:2] == ["bench", "decode"]:
        model = (
            ["--batch", "1", "--retrieval-heads", "3"] if "--shape" in argv else ["--model", str(workplace / "my-8b")]
        )
        return [
            *argv,
            *model,
            "--context",
            "200",
            "--page-size",
            "16",
            "--budget",
            "64",
            "--sink",
            "16",
            "--recent",
            "16",
        ]
    if argv[0] in ("generate", "eval", "bench", "demo") and "--model" not in argv:
        argv += ["--model", str(workplace / "my-8b")]
    return argv


def test_the_documents_show_commands():
    assert len(LYCHEE) >= 12
    assert {"eval", "generate", "convert", "bench", "heads", "train-heads"} <= {shlex.split(line)[1] for line in LYCHEE}


@pytest.mark.slow
@pytest.mark.parametrize("line", LYCHEE)
def test_a_command_that_is_shown_runs(line: str, workplace: Path, monkeypatch, capfd):
    monkeypatch.chdir(workplace)
    for name in ("llama-3-8b", "qwen3-8b", "qwen2.5-7b"):
        monkeypatch.setitem(shapes.MODELS, name, ModelConfig("llama", 64, 32, 48, 2, 4, 2, 16, 4096))
    # What it compiles, minutes for all models, is `test_tpu_schedule`'s matter.
    raw = json.loads((ROOT / "docs" / "results" / "tpu_schedule.json").read_text())
    steps = [TpuStepRow(**row) for row in raw["steps"]]
    published = ScheduleReport(ASSUMPTIONS, [ScheduleRow(**row) for row in raw["rows"]], steps)
    monkeypatch.setattr(tpu_schedule, "run", lambda chips, on_row: published)
    (workplace / "docs" / "results").mkdir(parents=True, exist_ok=True)
    shutil.rmtree(workplace / "converted", ignore_errors=True)
    for made in workplace.glob("eval-*"):
        shutil.rmtree(made)
    status = cli.main(made_small(shlex.split(line)[1:], workplace))
    out, err = capfd.readouterr()
    assert status == 0, err
    assert out


def options_of(function: Callable[..., Any]) -> set[str]:
    """The options of a function that Typer makes a command of."""
    app = typer.Typer()
    app.command()(function)
    return {option for parameter in get_command(app).params for option in parameter.opts}


@pytest.mark.parametrize("line", OTHERS)
def test_other_commands_name_what_there_is(line: str):
    """Those that install, serve, train for minutes or are the suite: their targets, options and files are checked."""
    words = shlex.split(line)
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert set(words[1:]) <= targets
    elif words[0] == "pip":
        assert words[1:3] == ["install", "-e"]
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"\[(\w+)\]", words[3])) <= set(extras)
    elif words[:2] == ["lychee", "serve"]:
        assert {word for word in words[2:] if word.startswith("--")} <= options_of(serve)
    elif words[1] == "-m":
        functions = {
            "pretrain": pretrain.main,
            "profile_heads": profile_heads.run,
            "head_maps": study.run,
            "real_model": real_model.run,
        }
        function = functions[words[2].rpartition(".")[2]]
        assert {word for word in words[3:] if word.startswith("--")} <= options_of(function)
    else:
        assert (ROOT / words[1]).is_file()


def test_the_demo_of_the_makefile_is_the_command():
    recipe = (ROOT / "Makefile").read_text().split("\ndemo:")[1].splitlines()[1]
    assert recipe.strip() == "$(BIN)/lychee demo --output demo-output"


@pytest.mark.parametrize("code", PYTHON)
def test_python_that_is_shown_runs(code: str, workplace: Path, monkeypatch, capfd):
    monkeypatch.chdir(workplace)
    exec(re.sub(r"max_new_tokens=\d+", "max_new_tokens=3", code), {})
    assert capfd.readouterr().out


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_links_lead_to_files(document: Path):
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target


def test_json_that_is_shown_is_json():
    shown = [text for document in DOCUMENTS for tag, text in blocks(document) if tag == "json"]
    assert shown
    for text in shown:
        json.loads(text)


def test_the_api_page_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text()
    for name in lychee_jax.__all__:
        if name == "LoadedModel":  # the former name of LLM
            continue
        assert re.search(rf"^::: lychee_jax\.\S*\b{name}$", page, re.MULTILINE), name
    for name in pallas_kernels.__all__:
        if name not in ("MASKED", "recorded"):
            assert re.search(rf"^::: pallas_kernels\.\S*\b{name}$", page, re.MULTILINE), name
