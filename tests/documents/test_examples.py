"""The scripts in examples/ run as they are, on the bundled model."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
RUNS = {  # script → arguments, what it must print
    "generate.py": ([], ["48213", "tokens/s"]),
    "batch_and_stream.py": ([], ["silver otter", "It rained"]),
    "dense_and_hybrid.py": (["--tokens", "700", "--budget", "448"], ["dense: 100%", "hybrid: "]),
}


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix == ".py"} == set(RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("script", RUNS)
def test_it_runs(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    arguments, wanted = RUNS[script]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    out, err = capsys.readouterr()
    assert err == ""
    assert all(text in out for text in wanted), out
    if script == "dense_and_hybrid.py":
        assert (tmp_path / "heads.png").stat().st_size > 1000
