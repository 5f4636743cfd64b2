"""A request's tokens never depend on its company: its slot, its arrival, others that were aborted, cached prefixes.

Compiled as for users, in a process of its own: the suite's flags would hide what XLA does to products of many rows.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("shape", "dtype", "correct_every"),
    [("bundled", "float32", 0), ("bundled", "bfloat16", 5), ("smollm2", "bfloat16", 0), ("smollm2", "float32", 0)],
)
def test_tokens_are_those_of_the_request_alone(shape: str, dtype: str, correct_every: int) -> None:
    """Greedy and sampled, dense, hybrid and auto, with and without cache correction, with up to 13 other rows."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.company", shape, dtype, str(correct_every)],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["differ"] == []
    assert found["gap"] <= 1e-5
    assert found["cached"] >= 96, "nothing was reused: the prefix cache is not tested"
    assert found["lengths"] == [14]
    assert found["aborted"] == ["abort"] * 3 + ["length"]
    assert found["owned"] == 0
