"""Head maps from elsewhere: those that a folder holds for a config, and DuoAttention's scores."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.cli import main as cli
from lychee_jax.config import ModelConfig
from lychee_jax.errors import UserError
from lychee_jax.loading import load, read_config
from lychee_jax.maps.duo_attention import import_map
from lychee_jax.maps.shipped import SHIPPED, find_map
from tests.support import tiny_checkpoints

CONFIG = ModelConfig("llama", 96, 32, 48, 3, 4, 2, 8, 512)
SCORES = "0.1\t0.2\n0.5\t1e+00\n0.75\t0.5\n"


def save(folder: Path, name: str, config: ModelConfig, last: tuple[int, ...]) -> HeadMap:
    """A map for a config, told from others by what retrieves in the last layer."""
    roles = np.zeros((config.num_layers, config.num_kv_heads), bool)
    roles[0] = True
    roles[-1, list(last)] = True
    head_map = HeadMap.from_roles(roles, model=name, meta={"fingerprint": config.fingerprint()})
    head_map.save(folder / f"{name}.json")
    return head_map


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    file = tmp_path / "full_attention_heads.tsv"
    file.write_text(SCORES)
    return file


def test_a_map_is_found_by_the_fingerprint_of_its_config(tmp_path: Path):
    other = dataclasses.replace(CONFIG, vocab_size=97)
    save(tmp_path, "a", other, (0,))
    mine = save(tmp_path, "b", CONFIG, (1,))
    HeadMap.none(CONFIG).save(tmp_path / "c.json")  # of no model's in particular
    assert find_map(CONFIG, tmp_path) == mine
    # Neither the storage dtype nor the ids that end a text decide what heads compute.
    assert find_map(dataclasses.replace(CONFIG, dtype="float32", eos_token_ids=(7,)), tmp_path) == mine
    assert find_map(dataclasses.replace(CONFIG, vocab_size=98), tmp_path) is None


def test_the_maps_of_the_package_are_maps_of_different_models():
    found = [HeadMap.load(file).fingerprint for file in SHIPPED.glob("*.json")]
    assert None not in found
    assert len(set(found)) == len(found)


def test_a_model_takes_its_own_map_or_else_the_one_for_its_config(tmp_path: Path):
    folder, maps = tmp_path / "model", tmp_path / "maps"
    maps.mkdir()
    tiny_checkpoints.write_checkpoint(folder, tiny_checkpoints.TINY["llama"])
    assert load(folder, maps=maps).heads is None
    shipped = save(maps, "tiny", read_config(folder), (1,))
    seen = []
    model = load(folder, maps=maps, before_weights=lambda folder, config, heads, *_: seen.append(heads))
    assert [model.heads, model.choose_heads(), *seen] == [shipped] * 3
    assert model.choose_heads("all").is_dense
    own = HeadMap.none(model.config)
    own.save(folder / "heads.json")
    assert load(folder, maps=maps).heads == own


@pytest.mark.parametrize(
    ("rule", "retrieval", "told"),
    [
        ({}, [[0, 1], [0, 1], [0, 1]], "at least 0.5"),
        ({"threshold": 0.51}, [[0, 1], [1], [0]], "at least 0.51"),
        ({"threshold": 1.0}, [[0, 1], [1], []], "at least 1"),
        ({"retrieval_heads": 2}, [[0, 1], [], []], "the 2 highest"),
        ({"retrieval_heads": 4}, [[0, 1], [1], [0]], "the 4 highest"),
        ({"retrieval_heads": 5}, [[0, 1], [0, 1], [0]], "the 5 highest"),  # of equals the lower layer
    ],
)
def test_scores_become_a_map(scores: Path, rule: dict, retrieval: list[list[int]], told: str):
    made = import_map(scores, CONFIG, "tiny", **rule)
    assert made.to_json()["retrieval"] == retrieval
    assert made.to_json()["meta"] == {
        "fingerprint": CONFIG.fingerprint(), "method": "duo-attention", "rule": told,
        "source": "full_attention_heads.tsv", "sha256": hashlib.sha256(SCORES.encode()).hexdigest(),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("0\t0\n0\t0\n", "has 2 lines, but the model has 3 layers"),
        ("0\t0\n\n0\t0\n0\t0\n", "has 4 lines"),
        ("0\t0\n0\t0\t0\n0\t0\n", "line 2 has 3 entries separated by tabs, but the model has 2 KV heads"),
        ("0\t0\n0 0\n0\t0\n", "line 2 has 1 entries"),
        ("0\t0\n0\tx\n0\t0\n", "line 2 has 'x'; scores are numbers from 0 to 1"),
        ("0\t0\n0\t\n0\t0\n", "line 2 has ''"),
        ("0\t0\n0\t0\nnan\t0\n", "line 3 has 'nan'"),
        ("0\t0\n0\t0\n0\t1.01\n", "line 3 has '1.01'"),
        ("-0.5\t0\n0\t0\n0\t1\n", "line 1 has '-0.5'"),
        ("0\t0\n0\tinf\n0\t1\n", "line 2 has 'inf'"),
    ],
)
def test_other_files_are_refused(scores: Path, text: str, culprit: str):
    scores.write_text(text)
    with pytest.raises(UserError) as refusal:
        import_map(scores, CONFIG, "tiny")
    assert culprit in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("rule", "culprit"),
    [
        ({"threshold": 0.5, "retrieval_heads": 4}, "not both"),
        ({"threshold": 1.5}, "--threshold is 1.5"),
        ({"threshold": float("nan")}, "--threshold is nan"),
        ({"retrieval_heads": 1}, "layer 0 alone has 2"),
        ({"retrieval_heads": 7}, "the model has 6 KV heads"),
    ],
)
def test_other_rules_are_refused(scores: Path, rule: dict, culprit: str):
    with pytest.raises(UserError, match=culprit):
        import_map(scores, CONFIG, "tiny", **rule)


def test_the_command_imports_a_map_for_a_model(scores: Path, tmp_path: Path, capfd):
    folder, made = tmp_path / "tiny", tmp_path / "heads.json"
    tiny_checkpoints.write_checkpoint(folder, tiny_checkpoints.TINY["qwen3"] | {"num_hidden_layers": 3})
    argv = ["heads", "import", str(scores), "--model", str(folder), "--output", str(made)]
    assert cli.main([*argv, "--retrieval-heads", "4"]) == 0
    assert capfd.readouterr().out.startswith("tiny: 4 of 6 KV heads retrieve")
    head_map = HeadMap.load(made, read_config(folder))
    assert json.loads(made.read_text())["model"] == "tiny"
    assert head_map.num_retrieval == 4
    made.unlink()
    assert cli.main([*argv, "--retrieval-heads", "4", "--threshold", "0.5"]) == 2
    out, err = capfd.readouterr()
    assert (out, err) == ("", "error: give --threshold or --retrieval-heads, not both\n")
    assert not made.exists()
