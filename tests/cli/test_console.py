"""Bars on standard error: what share is done, in units that people read, and nothing where nobody looks."""

import io
import json
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from lychee_jax.cli import main as cli
from lychee_jax.cli.console import reading, stages
from lychee_jax.engine.compile_timer import Programs, count_programs
from tests.support import tiny_checkpoints


def terminal() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=True, force_interactive=True, width=100, color_system=None), file


def test_a_stage_shows_its_share_and_disappears_at_its_end():
    console, file = terminal()
    with stages(console) as bars:
        bars.show("Loading my-[8b]", 0, 16 * 10**9, "bytes")
        bars.show("Loading my-[8b]", 4 * 10**9, 16 * 10**9, "bytes")
        bars.show("tiny", 0, 2_000_000, "bytes")
        reading(bars)(1500, 2000)
        reading(bars)(1024, 131072)
        bars.show("answers", 3, 10, "answers", "passkey at 4,096")
        bars.stop()
        text = file.getvalue()
        for shown in ("Loading my-[8b]", "25%", "4.0 of 16.0 GB", "0.0 of 2.0 MB", "1,024 of 131,072 tokens",
                      "passkey at 4,096", "3 of 10 answers", "left"):  # fmt: skip
            assert shown in text
        assert "1,500" not in text  # a short prompt
        assert "Compiling" not in text
    console, file = terminal()
    with stages(console) as bars:
        bars.show("Loading", 16 * 10**9, 16 * 10**9, "bytes")
    assert "Loading" not in file.getvalue()


def test_programs_that_are_being_compiled_have_a_bar():
    go, before = threading.Event(), count_programs()

    @jax.jit
    def slow(x: jax.Array) -> jax.Array:
        go.wait(60)
        return x

    programs = Programs(np.dtype(np.float32), "bars")
    programs.prepare(slow, "one", (), jnp.zeros(3))
    try:
        assert count_programs() == (before[0], before[1] + 1)
        console, file = terminal()
        with stages(console):
            pass
        assert f"{before[0]:,} of {before[1] + 1:,} programs" in file.getvalue()
    finally:
        go.set()
    programs(slow, "one", (), jnp.zeros(3))
    assert count_programs() == (before[0] + 1, before[1] + 1)
    console, file = terminal()
    with stages(console):
        pass
    assert "programs" not in file.getvalue()


def test_nothing_is_written_where_standard_error_is_no_terminal():
    file = io.StringIO()
    with stages(Console(file=file)) as bars:
        bars.show("Loading", 1, 16 * 10**9, "bytes")
        bars.stop()
    assert file.getvalue() == ""


def test_json_stays_alone_on_standard_output(capfd, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Where standard error is a terminal, too."""
    folder, prompts = tiny_checkpoints.write_speaker(tmp_path / "model"), tmp_path / "ids.json"
    prompts.write_text(json.dumps([[5] * 1100, [6] * 1100]))
    command = ["generate", "--model", str(folder), "--prompt-ids", str(prompts), "--max-new-tokens", "2", "--json"]
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    assert cli.main(command) == 0
    out, err = capfd.readouterr()
    answer = json.loads(out)
    assert out == json.dumps(answer) + "\n"
    assert [*answer] == ["prompt_tokens", "tokens", "logprobs", "text", "finish_reason", "timing", "attention"]
    assert answer["prompt_tokens"] == [1100, 1100]
    assert "\N{ESCAPE}[" in err
    monkeypatch.setenv("TTY_COMPATIBLE", "0")
    monkeypatch.setenv("TTY_INTERACTIVE", "0")
    assert cli.main(command) == 0
    assert "\N{ESCAPE}[" not in capfd.readouterr().err
