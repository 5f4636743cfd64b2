"""Files whose names are no UTF-8, as every system allows them, end no run after its work is done."""

import os
from pathlib import Path

import pytest

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.cli import main as cli
from tests.support import tiny_checkpoints

ODD = os.fsdecode(b"b\xffok")
SHOWN = r"b\udcffok"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_checkpoints.write_speaker(tmp_path_factory.mktemp("odd") / "model")


def test_texts_outputs_and_pictures(folder, tmp_path, capfd):
    text, output, picture = tmp_path / f"{ODD}.txt", tmp_path / ODD, tmp_path / f"{ODD}.png"
    text.write_text("The old fox ran to the river. " * 40)
    argv = ["eval", "perplexity", "--model", folder, "--text", text, "--lengths", "160", "--samples", "1", "--scored",
            "4", "--attention", "dense", "--page-size", "16", "--sink", "16", "--recent", "16", "--output"]  # fmt: skip
    assert cli.main([str(part) for part in (*argv, output)]) == 0
    assert f"{SHOWN}: results.json" in capfd.readouterr().out
    assert f"| {SHOWN}.txt | dense |" in (output / "results.md").read_text(encoding="utf-8")
    assert (output / "results.png").exists()
    HeadMap(1, 1, ((0,),)).save(tmp_path / f"{ODD}.json")
    assert cli.main(["heads", "plot", str(tmp_path / f"{ODD}.json"), "--output", str(picture)]) == 0
    assert f"{SHOWN}.png" in capfd.readouterr().out
    assert picture.exists()
