"""`lychee train-heads` and the head maps it makes, from outside, on a tiny random model."""

import dataclasses
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.cli import main as cli
from lychee_jax.cli.train import train_heads
from lychee_jax.data import language
from lychee_jax.loading import BUNDLED, load, read_config
from lychee_jax.training import learn_heads
from lychee_jax.training.learn_heads import FILES, TrainingPlan
from tests.support import tiny_checkpoints, tiny_tokenizers

RAW = tiny_checkpoints.TINY["llama"] | {
    "vocab_size": language.VOCAB_SIZE, "max_position_embeddings": 512, "eos_token_id": 2,
}  # fmt: skip
SMALL = ["--retrieval-heads", 3, "--steps", 4, "--min-length", 193, "--max-length", 256, "--room", 48, "--facts", 3,
         "--questions", 3, "--page-size", 8, "--sink", 8, "--recent", 8]  # fmt: skip


def write_model(folder: Path, raw: dict[str, Any] = RAW, **options: Any) -> Path:
    tiny_checkpoints.write_checkpoint(folder, raw, **options)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A checkpoint in the bundled model's language, without a head map."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def lychee(capfd):
    """Runs the command line in this process: (exit status, stdout, stderr)."""

    def run(*argv: Any) -> tuple[int, str, str]:
        status = cli.main([str(part) for part in argv])
        return status, *capfd.readouterr()

    return run


@pytest.fixture(scope="module")
def learned(model, tmp_path_factory) -> tuple[Path, str]:
    """The folder of a finished run, and what was printed."""
    folder = tmp_path_factory.mktemp("runs") / "learned"
    done = subprocess.run(
        [sys.executable, "-m", "lychee_jax", "train-heads", "--model", model, "--output", folder, *map(str, SMALL)],
        capture_output=True, text=True, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.stderr == ""
    return folder, done.stdout


def test_it_prints_the_map_and_where_everything_is(learned, model, lychee):
    folder, out = learned
    lines = out.splitlines()
    assert lines[0] == "tiny: 3 of 4 KV heads retrieve (■)"
    assert lines[1] == "layer   0  ■ ■"
    assert lines[2] in ("layer   1  ■ ·", "layer   1  · ■")
    assert lines[:3] == lychee("heads", "show", folder / "heads.json", "--model", model)[1].splitlines()
    above = json.loads((folder / "gates.json").read_text())["above_half"]
    assert lines[3] == f"E[z] is above 1/2 for {above} of 4 heads; the 3 highest make the map"
    assert lines[4] == f"{folder}: {', '.join(FILES)}"
    assert {path.name for path in folder.iterdir()} == {*FILES, "plan.json"}
    for name in ("heads.png", "training.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_the_map_decodes(learned, model, lychee):
    status, out, err = lychee(
        "generate", "--model", model, "--heads", learned[0] / "heads.json", "--attention", "hybrid", "--page-size", 8,
        "--budget", 32, "--sink", 8, "--recent", 8, "--prompt", "The old fox. " * 20, "--max-new-tokens", 3, "--json",
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert json.loads(out)["attention"]["retrieval_heads"] == 3


def test_a_finished_run_is_shown_again(learned, model, lychee, monkeypatch):
    monkeypatch.setattr(learn_heads, "make_batch", None)  # nothing is trained
    status, out, err = lychee("train-heads", "--model", model, "--output", learned[0], *SMALL, "--balance", 2)
    assert (status, err) == (0, "")
    assert "the 3 that suit 2 devices (E[z] 0.000 lower in all) make the map" in out
    assert "2 devices: the one with most retrieval heads of a layer has 2 over all layers" in out
    assert json.loads((learned[0] / "heads.json").read_text())["meta"]["balance"] == 2
    assert lychee("train-heads", "--model", model, "--output", learned[0], *SMALL) == (0, learned[1], "")


def test_ctrl_c_saves_and_the_same_command_goes_on(learned, model, lychee, monkeypatch, tmp_path):
    command = ["train-heads", "--model", model, "--output", tmp_path / "run", *SMALL]
    original = learn_heads.make_batch

    def interrupted(plan: TrainingPlan, source: Any, step: int) -> Any:
        if step == 2:
            raise KeyboardInterrupt
        return original(plan, source, step)

    with monkeypatch.context() as patch:
        patch.setattr(learn_heads, "make_batch", interrupted)
        status, out, err = lychee(*command)
    assert (status, out) == (130, "")
    assert err == f"saved; the same command goes on from {tmp_path / 'run'}\ninterrupted\n"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]

    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal, where the progress is shown
    status, out, err = lychee(*command)
    assert (status, out.splitlines()[:4]) == (0, learned[1].splitlines()[:4])
    for word in ("density", "λ", "loss", "kept", "4/4"):
        assert word in err
    for name in ("metrics.jsonl", "gates.json", "heads.json"):
        assert (tmp_path / "run" / name).read_bytes() == (learned[0] / name).read_bytes()


@pytest.mark.slow
def test_a_signal_ends_it_with_130(model, tmp_path):
    """From outside, at a moment of its own."""
    argv = ["train-heads", "--model", model, "--output", tmp_path / "run", *SMALL, "--steps", 100000]
    with subprocess.Popen(
        [sys.executable, "-m", "lychee_jax", *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    ) as process:  # fmt: skip
        metrics = tmp_path / "run" / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, b"")
    assert err.decode().splitlines() == [f"saved; the same command goes on from {tmp_path / 'run'}", "interrupted"]
    lines = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    saved = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert max(saved) >= lines[-1] >= 1


def test_nan_is_one_line(lychee, tmp_path):
    folder = write_model(tmp_path / "model")
    tensors = tiny_checkpoints.random_tensors(RAW)
    tensors["model.norm.weight"][3] = np.nan
    tiny_checkpoints.write_shards(folder, tensors)
    status, out, err = lychee("train-heads", "--model", folder, "--output", tmp_path / "run", *SMALL)
    assert (status, out) == (2, "")
    assert err.startswith("error: step 1: the loss or a gate is not finite any more")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "culprit"),
    [
        (["--retrieval-heads", 1], "layer 0 alone has 2"),
        (["--retrieval-heads", 5], "has 4 KV heads"),
        (["--retrieval-heads", "many"], "--retrieval-heads"),
        (["--max-length", 1000], "positions for 512"),
        (["--min-length", 300], "min-length is 300"),
        (["--min-length", 20], "--min-length"),
        (["--steps", 0], "steps is 0"),
        (["--batch", 0], "batch is 0"),
        (["--seed", -1], "seed is -1"),
        (["--learning-rate", 0], "learning-rate is 0"),
        (["--data", "riddles"], "riddles"),
        (["--text", "/nowhere/book.txt"], "/nowhere/book.txt"),
        (["--questions-file", "/nowhere/q.json"], "--data multi-hop"),
        (["--data", "multi-hop", "--questions-file", "/nowhere/q.json"], "/nowhere/q.json"),
        (["--loss", "l2"], "l2"),
        (["--gates", "soft"], "soft"),
        (["--page-size", 0], "page size is 0"),
        (["--budget", 12], "multiple of the page size"),
        (["--budget", 8], "more than the budget"),
        (["--sink", -1], "sink is -1"),
        (["--ratio", 0], "ratio is 0"),
        (["--rule", "budget"], "--rule budget needs --budget"),
        (["--checkpoint-every", 0], "checkpoint-every is 0"),
        (["--keep", 0], "keep is 0"),
        (["--dtype", "float8"], "float8"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_writes_nothing(lychee, model, tmp_path, argv, culprit):
    status, out, err = lychee("train-heads", "--model", model, "--output", tmp_path / "run", *SMALL, *argv)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert culprit in err
    assert not (tmp_path / "run").exists()


def test_what_is_required(lychee, tmp_path):
    for argv, culprit in [
        (["--output", tmp_path / "run"], "--retrieval-heads"),
        (["--retrieval-heads", 3], "--output"),
    ]:
        status, out, err = lychee("train-heads", *argv)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert culprit in err


def test_folders_that_are_in_the_way(lychee, model, learned, tmp_path):
    """A file, a run with other settings, a plan that is no JSON: left as they are."""
    file, broken = tmp_path / "file", tmp_path / "broken"
    file.write_text("mine")
    broken.mkdir()
    (broken / "plan.json").write_text("{]")
    before = (learned[0] / "metrics.jsonl").read_bytes()
    for output, changed, culprit in [(file, [], "is a file"), (broken, [], "not valid JSON"),
                                     (learned[0], ["--seed", 7], "other settings")]:  # fmt: skip
        status, out, err = lychee("train-heads", "--model", model, "--output", output, *SMALL, *changed)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert culprit in err
    assert file.read_text() == "mine"
    assert [path.name for path in broken.iterdir()] == ["plan.json"]
    assert (learned[0] / "metrics.jsonl").read_bytes() == before


def test_a_model_without_a_tokenizer(lychee, tmp_path):
    folder = tmp_path / "bare"
    tiny_checkpoints.write_checkpoint(folder, RAW | {"vocab_size": 96})
    status, out, err = lychee("train-heads", "--model", folder, "--output", tmp_path / "run", *SMALL)
    assert (status, out) == (2, "")
    assert "no tokenizer" in err
    assert not (tmp_path / "run").exists()


def test_any_models_tokens_and_a_text(lychee, tmp_path):
    """A model with a tokenizer of its own, and a text of its user's; logits, and rule budget."""
    folder = tmp_path / "model"
    tiny_checkpoints.write_checkpoint(
        folder, RAW | {"vocab_size": 320, "eos_token_id": 1, "max_position_embeddings": 2048}
    )
    tiny_tokenizers.write_tokenizer(folder, tiny_tokenizers.byte_level())
    (tmp_path / "book.txt").write_text("The dog is no stop. " * 50)
    status, out, err = lychee(
        "train-heads", "--model", folder, "--output", tmp_path / "run", *SMALL, "--text", tmp_path / "book.txt",
        "--data", "mixed", "--min-length", 600, "--max-length", 640, "--room", 64, "--steps", 1, "--loss", "logits",
        "--rule", "budget", "--budget", 64,
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert out.startswith("model: 3 of 4 KV heads retrieve")


def test_defaults_are_the_plans():
    given = {name: parameter.default for name, parameter in inspect.signature(train_heads).parameters.items()}
    plan = TrainingPlan(retrieval_heads=1)
    names = {"gates": "family", "questions_file": "file"}
    for name in ("steps", "seed", "gates", "loss", "data", "facts", "questions", "text", "questions_file", "min_length",
                 "max_length", "room", "learning_rate", "multiplier", "multiplier_rate", "page_size"):  # fmt: skip
        assert given[name] == getattr(plan, names.get(name, name)), name
    for name in ("sink", "recent", "rule", "ratio", "threshold", "page_score"):
        assert given[name] == getattr(plan.policy, name), name
    assert given["top_p_mass"] == plan.policy.top_p
    learn = inspect.signature(learn_heads.learn).parameters
    assert all(given[name] == learn[name].default for name in ("checkpoint_every", "keep"))
    fields = {field.name for field in dataclasses.fields(TrainingPlan)} - {"policy"}
    assert fields <= {names.get(name, name) for name in given}  # every field has its option


def test_help_is_on_stdout(lychee):
    for argv in (["train-heads", "--help"], ["heads", "show", "-h"]):
        status, out, err = lychee(*argv)
        assert (status, err) == (0, "")
        assert "Usage: lychee" in out


# Maps of other models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["show", "plot"])
def test_maps_of_other_models_are_refused_on_request(lychee, learned, model, tmp_path, command):
    """By shape, and by fingerprint where the map has one; weights are not needed for that."""
    file = tmp_path / "heads.json"
    shutil.copy(learned[0] / "heads.json", file)
    deeper = tmp_path / "deeper"
    other = tmp_path / "other"
    for folder, change in ((deeper, {"num_hidden_layers": 3}), (other, {"rms_norm_eps": 0.5})):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(RAW | change))
    for folder, culprit in ((deeper, "3 × 2"), (other, "fingerprint"), (tmp_path / "nowhere", "nowhere")):
        status, out, err = lychee("heads", command, file, "--model", folder)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert culprit in err
    assert not (tmp_path / "heads.png").exists()
    (other / "config.json").write_text(json.dumps(RAW))
    for options in ([], ["--model", model], ["--model", other]):
        assert lychee("heads", command, file, *options)[0] == 0


def test_the_config_alone_is_the_loaded_models(model, tmp_path):
    """Also of a checkpoint that calls itself tied and brings a head of its own."""
    raw = RAW | {"tie_word_embeddings": True}
    tensors = tiny_checkpoints.random_tensors(raw | {"tie_word_embeddings": False})
    own = tmp_path / "own-head"
    own.mkdir()
    (own / "config.json").write_text(json.dumps(raw))
    tiny_checkpoints.write_shards(own, tensors)
    tied = write_model(tmp_path / "tied", raw)
    for folder in (model, own, tied, BUNDLED):
        assert read_config(folder).fingerprint() == load(folder).config.fingerprint()
    assert read_config(own).tie_word_embeddings is False
    assert HeadMap.load(BUNDLED / "heads.json", read_config(BUNDLED)).num_retrieval > 0
