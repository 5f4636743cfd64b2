"""How many picked pages a quantised cache changes: counted against two readings, and the command."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.cli import main as cli
from lychee_jax.engine.options import GenerateOptions
from lychee_jax.errors import UserError
from lychee_jax.evaluation.picks import compare_picks
from lychee_jax.llm import LLM
from lychee_jax.loading import load
from tests.support import tiny_checkpoints


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoints.write_speaker(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> LLM:
    return load(folder)


def test_pages_that_differ_are_counted(model: LLM) -> None:
    heads = HeadMap.none(model.config)
    options = GenerateOptions("hybrid", heads, SelectionPolicy(64, 16, 16), page_size=16, kv_dtype="fp8")
    prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 200)).tolist()
    done: list[int] = []
    found = compare_picks(model, prompts, options, done.append)
    assert done == [1, 2, 3, 4]
    picked = differ = 0
    for prompt in prompts:
        plain = model.read_pages(prompt, dataclasses.replace(options, kv_dtype=None))
        quantised = model.read_pages(prompt, options, token=plain.token)
        assert quantised.token == plain.token
        for layer, retrieving in enumerate(heads.retrieval):
            for head in set(range(heads.num_kv_heads)) - set(retrieving):
                one, other = (
                    set(np.flatnonzero(reading.pages[layer, head])) - {0, 12} for reading in (plain, quantised)
                )
                assert len(one) == len(other) == 2
                picked, differ = picked + len(one), differ + len(one - other)
    assert (found.picked, found.differ, found.prompts) == (picked, differ, 2)
    assert found.share == differ / picked
    with pytest.raises(UserError, match="nothing to compare"):
        compare_picks(model, prompts, dataclasses.replace(options, kv_dtype=None))


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["eval", "picks", "--model", str(folder), "--lengths", "200", "--samples", "1", "--budget", "64", "--heads",
            "none", "--page-size", "16", "--sink", "16", "--recent", "16"]  # fmt: skip
    assert cli.main([*argv, "--kv-dtype", "int8", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["length"], row["budget"], row["kv_dtype"], row["prompts"]) == (200, 64, "int8", 1)
    assert 0 <= row["differ"] <= row["picked"]
    assert cli.main([*argv, "--samples", "0", "--kv-dtype", "int8"]) == 2
    assert "--samples" in capsys.readouterr().err
    assert cli.main(argv) == 2
    assert "--kv-dtype is auto" in capsys.readouterr().err
