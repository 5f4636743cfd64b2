"""Pictures of a run that learns heads: read from its metrics alone, and their colours are what it says."""

import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.plotting.training import History, plot_training

RED = np.array([0xB3, 0x20, 0x2F])
EXPECTED = [
    [[0.5, 0.5], [0.5, 0.5]],
    [[0.95, 0.05], [0.9501, 0.0499]],
    [[1.0, 0.0], [0.94, 0.06]],
]  # steps × layers above 0 × heads


@pytest.fixture
def metrics(tmp_path) -> Path:
    lines = [
        {"step": 10 * i, "loss": 0.5 * i, "kept": 0.5, "density": 0.9 / i, "multiplier": 2.0 + i, "excess": 0.1,
         "expected": expected}
        for i, expected in enumerate(EXPECTED, 1)
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "metrics.jsonl"


def test_history_is_what_was_written(metrics):
    history = History.read(metrics)
    assert history.steps.tolist() == [10, 20, 30]
    assert history.numbers["multiplier"].tolist() == [3.0, 4.0, 5.0]
    assert history.numbers["loss"].tolist() == [0.5, 1.0, 1.5]
    assert set(history.numbers) == {"loss", "kept", "density", "multiplier", "excess"}
    np.testing.assert_array_equal(history.expected, EXPECTED)


def test_gates_at_the_limits_are_decided(metrics):
    """Strictly between 0.05 and 0.95."""
    assert History.read(metrics).undecided.tolist() == [1.0, 0.0, 0.5]


def test_retrieval_heads_are_red(metrics, tmp_path):
    """The panel of gates, upper left, has more red the more of its lines are of retrieval heads."""

    def red(*above: tuple[int, ...]) -> int:
        plot_training(metrics, HeadMap(3, 2, ((0, 1), *above)), tmp_path / "training.png")
        pixels = np.rint(255 * matplotlib.image.imread(tmp_path / "training.png")[..., :3]).astype(int)
        height, width = pixels.shape[:2]
        return int((pixels[: height // 2, : width // 2] == RED).all(axis=-1).sum())

    none, one, every = red((), ()), red((0,), ()), red((0, 1), (0, 1))
    assert none + 200 < one < every - 200
