"""Learning which heads retrieve on several devices, which are virtual ones of a CPU in a process of its own."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lychee_jax.training import learn_heads
from tests.support import tiny_models

SMALL = dataclasses.replace(tiny_models.CONFIG, num_layers=2)
EIGHT = tiny_models.plan(batch=8, steps=4)
CHILD = """
import sys
from pathlib import Path
import jax
from tests.support import tiny_models
from tests.training.test_several_devices import EIGHT, SMALL
from lychee_jax.errors import UserError
from lychee_jax.training import learn_heads
assert jax.device_count() == 8
loaded, folder = tiny_models.make(SMALL), Path(sys.argv[1])
def stop(done, metrics):
    if done == 2:
        raise KeyboardInterrupt
try:
    learn_heads.learn(loaded, EIGHT, folder / "eight", log_every=1, on_step=stop)
except KeyboardInterrupt:
    learn_heads.learn(loaded, EIGHT, folder / "eight", log_every=1)
try:
    learn_heads.learn(loaded, tiny_models.plan(batch=12), folder / "refused")
except UserError as error:
    print(error)
"""


def test_eight_devices_learn_what_one_does(tmp_path):
    """Also with a pause: the state comes back onto all devices."""
    root = Path(__file__).parents[2]
    several = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)], env=os.environ | several, cwd=root, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "a batch of 12 rows cannot be divided among 8 devices; use a multiple\n"
    assert not (tmp_path / "refused").exists()

    learn_heads.learn(tiny_models.make(SMALL), EIGHT, tmp_path / "one", log_every=1)
    one, eight = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "eight")
    )
    assert len(one) == 4
    for mine, theirs in zip(one, eight, strict=True):
        for name, value in mine.items():
            np.testing.assert_allclose(theirs[name], value, rtol=1e-4, atol=1e-4, err_msg=name)
    assert one[0]["loss"] != pytest.approx(one[1]["loss"], rel=1e-3)
