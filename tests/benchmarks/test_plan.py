"""What a model takes on each of several devices."""

import dataclasses
from pathlib import Path

import pytest

from lychee_jax.benchmarks.plan import Wish, plan
from lychee_jax.benchmarks.shapes import MODELS
from lychee_jax.benchmarks.step import spread_heads
from lychee_jax.cli.main import main
from tests.support import tiny_checkpoints

CONFIG = MODELS["llama-3-8b"]
WISH = Wish(CONFIG, spread_heads(CONFIG, 32), 131072)


def test_bytes_are_those_of_the_shapes_and_halve_with_twice_the_devices() -> None:
    one, two, three, four = (plan(WISH, n, memory=141e9, bandwidth=4.6e12)[-1] for n in (1, 2, 3, 4))
    assert one.weight_bytes == pytest.approx(16.06e9, rel=1e-3)
    assert one.sequence_bytes == 2 * 2 * 32 * 8 * 128 * 131072
    assert two.sequence_bytes == one.sequence_bytes // 2
    assert three.sequence_bytes == four.sequence_bytes * 3 // 2, "8 KV heads on 3 devices are padded to 9"
    assert two.weight_bytes == pytest.approx(one.weight_bytes / 2, rel=1e-3)
    # The roofline of the issue: 15 GB of weights and 2.62 GB of the cache.
    assert one.hybrid_ms == pytest.approx((15.0 + 2.62) / 4.6, rel=5e-3)
    assert one.dense_ms == pytest.approx((15.0 + 17.18) / 4.6, rel=5e-3)
    assert one.dense_ms > two.dense_ms > four.dense_ms
    assert (one.sequences, four.sequences) == (5, 25)


def test_eight_bits_take_less() -> None:
    small = dataclasses.replace(WISH, config=dataclasses.replace(CONFIG, quantize="int8"), kv_dtype="fp8")
    (before, after) = (plan(wish, 1, memory=24e9, bandwidth=1e12)[0] for wish in (WISH, small))
    assert before.sequences == 0 < after.sequences
    assert after.sequence_bytes == before.sequence_bytes // 2


def test_the_table_of_the_documents_is_what_comes_out() -> None:
    lines = (Path(__file__).parents[2] / "docs" / "devices.md").read_text().splitlines()
    for row in plan(WISH, 8, memory=80e9, bandwidth=3.3e12):
        numbers = row.weight_bytes / 1e9, row.sequence_bytes / 1e9, row.sequences, row.hybrid_ms, row.dense_ms
        shown = " | ".join(f"{number:.1f}" if isinstance(number, float) else str(number) for number in numbers)
        assert f"| Llama-3-8B | {row.devices} | {shown} |" in lines


def test_the_command_says_what_fits(tmp_path: Path, capfd) -> None:
    tiny_checkpoints.write_checkpoint(tmp_path / "tiny", tiny_checkpoints.TINY["llama"])
    model = ["--model", str(tmp_path / "tiny"), "--page-size", "16", "--budget", "64", "--sink", "16", "--recent", "16"]
    assert main(["plan", *model, "--context", "512", "--devices", "3", "--device-memory", "1"]) == 0
    out = capfd.readouterr().out
    assert [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")] == ["1", "2", "3"]
    assert "fastest by these numbers: --tensor-parallel 1" in out, "messages cost more than so little memory"
    assert main(["plan", *model, "--context", "512", "--device-memory", "0.0001"]) == 0
    assert "none of these is enough" in capfd.readouterr().out
    for wrong, culprit in (
        (["--context", "0", "--device-memory", "1"], "context is 0"),
        (["--context", "8", "--device-memory", "-1"], "memory is -1e+09"),
        (["--context", "8", "--device-memory", "1", "--devices", "0"], "devices is 0"),
        (["--context", "8", "--device-memory", "1", "--quantize-head"], "quantize_head"),
    ):
        assert main(["plan", *model, *wrong]) == 2
        out, err = capfd.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert culprit in err
