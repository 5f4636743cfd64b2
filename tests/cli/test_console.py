"""Bars on standard error: what share is done, in units that people read, and nothing where nobody looks."""

import io
import threading

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from lychee_jax.cli.console import reading, stages
from lychee_jax.engine.compile_timer import Programs, count_programs


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
