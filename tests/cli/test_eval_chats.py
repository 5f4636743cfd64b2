"""Every evaluation that asks questions takes a system message, turns before the question, and template keywords."""

import json
from pathlib import Path

import pytest

from lychee_jax.cli import main as cli
from lychee_jax.evaluation.longbench import TASKS
from tests.support import tiny_checkpoints

# Refuses to be a template for anything else than what is given below.
TEMPLATE = (
    "{% if messages | map(attribute='role') | join(' ') != 'system user assistant user' %}"
    "{{ raise_exception('other turns') }}{% endif %}"
    "{% if messages[0].content != 'Be short.' or messages[2].content != 'Yes?' or enable_thinking is not false %}"
    "{{ raise_exception('other words') }}{% endif %}"
    "{% for message in messages %}{{ message.content }} {% endfor %}"
)
TURNS = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes?"}]
CHAT = ["--system", "Be short.", "--template-kwargs", '{"enable_thinking": false}']


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tiny_checkpoints.write_speaker(tmp_path_factory.mktemp("chats") / "model")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    beside = folder.parent
    (beside / "turns.json").write_text(json.dumps(TURNS))
    document = {"text": "Where is the fox?", "context": "The fox ran. ", "input": "Where?", "answers": ["here"]}
    (beside / f"{TASKS[0]}.jsonl").write_text(json.dumps(document))
    task = {
        "task": "words", "dataset_path": "json", "test_split": "test", "output_type": "generate_until",
        "dataset_kwargs": {"data_files": {"test": str(beside / f"{TASKS[0]}.jsonl")}, "cache_dir": str(beside / "c")},
        "doc_to_text": "{{text}}", "doc_to_target": "x", "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 1},
    }  # fmt: skip
    (beside / "words.yaml").write_text(json.dumps(task))
    return folder


@pytest.mark.parametrize(
    "asked",
    [
        "passkey --lengths 160 --samples 1 --facts 1 --depths any",
        "ruler --tasks niah_single_1 --lengths 1024 --samples 1",
        f"longbench --data . --tasks {TASKS[0]} --lengths 512",
        "harness words --include . --limit 1",
    ],
    ids=lambda asked: asked.split()[0],
)
def test_the_conversation_reaches_the_template(folder, asked, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(folder.parent)
    argv = ["eval", *asked.split(), "--model", str(folder), "--attention", "dense", "--page-size", "16", "--sink", "16",
            "--recent", "16", "--output", str(tmp_path / "out")]  # fmt: skip
    assert cli.main([*argv, *CHAT, "--messages", "turns.json"]) == 0, capfd.readouterr().err
    capfd.readouterr()
    for less, told in ((CHAT, "without a chat"), ([*CHAT, "--chat"], "other turns"), (["--chat"], "other turns")):
        assert cli.main([*argv[:-1], str(tmp_path / "less"), *less]) == 2
        assert told in capfd.readouterr().err
