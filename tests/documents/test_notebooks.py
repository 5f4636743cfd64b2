"""The notebooks run from their first cell to their last, as on Colab, in five minutes each on two cores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What people watch for minutes is enough for a test after a few steps.
SHORTER = {
    "quickstart_tpu": [("LENGTH = 4096", "LENGTH = 1000"), ("QUESTIONS = 4", "QUESTIONS = 2")],
    "learn_heads": [
        ("STEPS = 40", "STEPS = 3"),
        ("LENGTH = 512", "LENGTH = 384"),
        ("PROMPTS, FACTS, TOKENS = 6, 8, 4 * LENGTH", "PROMPTS, FACTS, TOKENS = 2, 4, 2 * LENGTH"),
    ],
    "inside_the_kernels": [
        ("B, K, G, H = 2, 3, 2, 64", "B, K, G, H = 2, 2, 2, 64"),
        ("LENGTHS = [700, 310]", "LENGTHS = [310, 220]"),
        ("LONG, LONG_BUDGET = 32768,", "LONG, LONG_BUDGET = 4096,"),
    ],
    "convert_and_generate": [("MEGABYTES = 400", "MEGABYTES = 120")],
}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    named = {"quickstart_tpu", "convert_and_generate", "learn_heads", "inside_the_kernels"}
    assert {path.stem for path in NOTEBOOKS} == named


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(notebook: Path, tmp_path: Path):
    copy = tmp_path / notebook.name
    text = notebook.read_text()
    for number, smaller in SHORTER.get(notebook.stem, []):
        assert number in text
        text = text.replace(number, smaller)
    copy.write_text(text)
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    run = subprocess.run(
        [sys.executable, "-m", "jupyter", "execute", "--inplace", "--timeout=300", copy.name],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    cells = [cell for cell in json.loads(copy.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert cells[0]["outputs"] == [], "the install cell does nothing where the package is there"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_made_for_colab_and_kept_without_outputs(notebook: Path):
    cells = json.loads(notebook.read_text())["cells"]
    first = "".join(cells[0]["source"])
    assert f"colab.research.google.com/github/lychee-jax/lychee-jax/blob/main/notebooks/{notebook.name}" in first
    assert "".join(cells[1]["source"]).startswith("# Installs lychee-jax where it is missing")
    assert all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code")
