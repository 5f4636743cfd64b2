"""The decode benchmark: its numbers are its own timings, and what it times is the attention that it names."""

import dataclasses
import json
import statistics

import jax.numpy as jnp
import numpy as np
import pytest

from lychee_jax import cli
from lychee_jax.benchmarks import decode
from lychee_jax.errors import UserError
from lychee_jax.loading import load

from . import checkpoints

LAYERS, HEADS, HEAD_DIM, PAGE = 3, 2, 8, 16
RETRIEVAL = [[0, 1], [1], []]
CONTEXT, TOKENS = 150, 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    checkpoints.write_checkpoint(folder, checkpoints.TINY["llama"] | {"num_hidden_layers": LAYERS})
    head_map = {"format": "lychee-heads/1", "num_layers": LAYERS, "num_kv_heads": HEADS, "retrieval": RETRIEVAL}
    (folder / "heads.json").write_text(json.dumps(head_map))
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.fixture(scope="module")
def options(model):
    return model.options(attention="hybrid", page_size=PAGE, budget=4 * PAGE, sink=PAGE, recent=PAGE)


@pytest.fixture(scope="module")
def report(model, options):
    return decode.run(model, options, context=CONTEXT, tokens=TOKENS, repeats=3)


def test_times_are_medians_and_speedups_their_ratios(report):
    assert report.step_ms.keys() == report.step_samples_ms.keys() == {"dense", "hybrid", "auto"}
    assert report.attention_ms.keys() == {"dense", "hybrid", "jax.nn"}
    for mode, samples in report.step_samples_ms.items():
        assert len(samples) == 3
        assert min(samples) > 0
        assert report.step_ms[mode] == statistics.median(samples)
    for name, times, way in (
        ("step", report.step_ms, "hybrid"),
        ("step_auto", report.step_ms, "auto"),
        ("attention", report.attention_ms, "hybrid"),
    ):
        assert report.speedup[name] == pytest.approx(times["dense"] / times[way])


def test_share_and_bytes_are_those_of_the_head_map(report):
    held = [-(-length // PAGE) for length in range(CONTEXT + 1, CONTEXT + TOKENS + 1)]
    share = sum(3 * pages + 3 * 4 for pages in held) / sum(6 * pages for pages in held)
    assert report.kv_read_share == {"dense": 1.0, "hybrid": pytest.approx(share), "auto": 1.0}  # auto: a short text
    assert (report.retrieval_heads, report.kv_heads) == (3, 6)
    assert report.kv_bytes == 4 * LAYERS * HEADS * 2 * HEAD_DIM * 160
    embedding, norm = 96 * 32, 32
    layer = 2 * norm + 2 * 32 * 4 * HEAD_DIM + 2 * 32 * HEADS * HEAD_DIM + 3 * 32 * 48
    assert report.weight_bytes == 4 * (LAYERS * layer + norm + embedding)  # of the embedding a row, of the head all
    assert report.speedup["attention_bytes"] == pytest.approx(1 / share)
    assert 1 < report.speedup["step_bytes"] < report.speedup["attention_bytes"]


def test_report_can_be_read_by_people_and_programs(report):
    text = str(report)
    for part in ("dense", "hybrid", "auto", "jax.nn", f"{report.speedup['step']:.2f}×", "150 tokens"):
        assert part in text
    assert json.loads(json.dumps(dataclasses.asdict(report)))["step_ms"] == report.step_ms


def test_dense_attention_and_its_plain_rival_agree(model, options):
    filled = decode._random_cache(model.engine, CONTEXT, dataclasses.replace(options, max_new_tokens=1))
    assert filled.pools is not None
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(rng.standard_normal((LAYERS, 1, 1, HEADS, 4, HEAD_DIM)), jnp.float32)
    positions = jnp.asarray([CONTEXT - 1], jnp.int32)
    pools, out = decode._paged(None, options.policy, None, filled.pools, filled.page_table, positions, qkv)
    plain = decode._plain(tuple(decode._contiguous(pool, filled.page_table, CONTEXT) for pool in pools), qkv)
    assert jnp.std(out) > 0.01
    np.testing.assert_allclose(out.reshape(plain.shape), plain, atol=1e-5)


@pytest.mark.parametrize(("context", "message"), [(0, "at least 1"), (-5, "at least 1"), (510, "limit of 512")])
def test_impossible_context_is_refused(model, options, context, message):
    with pytest.raises(UserError, match=message):
        decode.run(model, options, context=context)


def test_command_prints_one_object(folder, capsys):
    arguments = ["--context", "120", "--page-size", "16", "--budget", "64", "--sink", "16", "--recent", "16"]
    status = cli.main(["bench", "decode", "--model", str(folder), "--json", *arguments])
    printed = json.loads(capsys.readouterr().out)
    assert status == 0
    assert (printed["context"], printed["budget"], printed["retrieval_heads"]) == (120, 64, 3)
    assert printed["speedup"]["step"] == pytest.approx(printed["step_ms"]["dense"] / printed["step_ms"]["hybrid"])
