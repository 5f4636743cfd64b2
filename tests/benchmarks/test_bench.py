"""The decode benchmark: its numbers are its own timings, and what it times is the attention that it names."""

import dataclasses
import json
import statistics

import jax.numpy as jnp
import numpy as np
import pytest

from lychee_jax.benchmarks import decode, kernels, shapes, step, train
from lychee_jax.cli import main as cli
from lychee_jax.config import ModelConfig
from lychee_jax.errors import UserError
from lychee_jax.loading import load
from tests.support import tiny_checkpoints

LAYERS, HEADS, HEAD_DIM, PAGE = 3, 2, 8, 16
RETRIEVAL = [[0, 1], [1], []]
CONTEXT, TOKENS = 150, 16  # as many tokens as the command measures, which then compiles nothing of its own


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_checkpoints.write_checkpoint(folder, tiny_checkpoints.TINY["llama"] | {"num_hidden_layers": LAYERS})
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
    runner = decode._random_cache(model, CONTEXT, dataclasses.replace(options, max_new_tokens=1))
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(rng.standard_normal((LAYERS, 1, 1, HEADS, 4, HEAD_DIM)), jnp.float32)
    positions = jnp.asarray([CONTEXT - 1], jnp.int32)
    table = jnp.arange(10, dtype=jnp.int32)[None]
    pools, out = decode._paged(None, options.policy, None, runner.pools, table, positions, qkv)
    plain = decode._plain(tuple(decode._contiguous(pool, table, CONTEXT, np.dtype("float32")) for pool in pools), qkv)
    assert jnp.std(out) > 0.01
    np.testing.assert_allclose(out.reshape(plain.shape), plain, atol=1e-5)


@pytest.mark.parametrize(("context", "message"), [(0, "at least 1"), (-5, "at least 1"), (510, "limit of 512")])
def test_impossible_context_is_refused(model, options, context, message):
    with pytest.raises(UserError, match=message):
        decode.run(model, options, context=context)


def test_a_model_of_nan_is_refused(model, options):
    """It decodes nothing, so that there would be a share of nothing."""
    broken = dataclasses.replace(model, model=model.spec.merge(tuple(array * jnp.nan for array in model.weights)))
    with pytest.raises(UserError, match="logits are not finite"):
        decode.run(broken, options, context=CONTEXT, tokens=TOKENS, repeats=1)


def test_command_prints_one_object(folder, capsys):
    arguments = ["--context", str(CONTEXT), "--page-size", "16", "--budget", "64", "--sink", "16", "--recent", "16"]
    quantised = ["--kv-dtype", "fp8"]
    status = cli.main(["bench", "decode", "--model", str(folder), "--json", "-", *arguments, *quantised])
    printed = json.loads(capsys.readouterr().out)
    assert status == 0
    assert printed["kv"] == "fp8"
    assert (printed["context"], printed["budget"], printed["retrieval_heads"]) == (CONTEXT, 64, 3)
    assert printed["speedup"]["step"] == pytest.approx(printed["step_ms"]["dense"] / printed["step_ms"]["hybrid"])


SMALL = ["--context", "256", "--page-size", "16", "--budget", "64", "--sink", "16", "--recent", "16"]


def test_a_shape_is_measured_without_a_model(monkeypatch, tmp_path, capsys):
    """The whole step of random weights: a row for each batch, the rivals of the same run beside it."""
    config = ModelConfig("llama", 64, 32, 48, 3, 4, 2, 16, 128)  # a longer context is made room for
    monkeypatch.setitem(shapes.MODELS, "llama-3-8b", config)
    target = tmp_path / "rows.json"
    shape = ["--shape", "llama-3-8b", "--retrieval-heads", "3", "--batch", "1,2", "--dtype", "float32"]
    kinds = ["--quantize", "int8", "--kv-dtype", "int8"]
    assert cli.main(["bench", "decode", *shape, *kinds, "--json", str(target), *SMALL]) == 0
    assert "hybrid" in capsys.readouterr().out
    rows = json.loads(target.read_text())["rows"]
    assert [(row["batch"], row["retrieval_heads"], row["kv_heads"], row["pages"]) for row in rows] == [
        (1, 3, 6, 4),
        (2, 3, 6, 4),
    ]
    for row in rows:
        assert row["us"] == statistics.median(row["samples_us"]) > 0
        assert row["rivals"].keys() == {"dense", "dense_cudnn"}
        assert row["pool_copies"] == 0
        weights = row["weight_bytes"] - 64 * 32 * 4
        assert (row["dtype"], row["weights"], row["kv"]) == ("float32", "int8", "int8")
        read = row["batch"] * (3 * 16 + 3 * 4) * 16 * (2 * 16 + 2 * 4)
        assert row["roofline_us"] == pytest.approx(1e6 * (weights + read) / 4.6e12)


def test_a_prefill_is_measured_by_its_operations(monkeypatch, tmp_path, capsys):
    config = ModelConfig("llama", 64, 32, 48, 3, 4, 2, 16, 128)
    monkeypatch.setitem(shapes.MODELS, "llama-3-8b", config)
    target = tmp_path / "rows.json"
    arguments = ["--context", "200", "--page-size", "16", "--dtype", "float32", "--repeats", "2"]
    assert cli.main(["bench", "prefill", *arguments, "--json", str(target)]) == 0
    assert "llama-3-8b" in capsys.readouterr().out
    (row,) = json.loads(target.read_text())["rows"]
    assert row["seconds"] == statistics.median(row["samples_s"]) > 0
    assert len(row["samples_s"]) == 2
    projections = 3 * (32 * 16 * (4 + 2 + 2 + 4) + 3 * 32 * 48)  # q, k, v, o, and the MLP's three
    attention = 3 * 4 * 16 * sum(range(1, 201))  # products of a query with a key; as many with its value
    assert row["attention_operations"] == 4 * attention
    assert row["operations"] == 2 * 200 * projections + 4 * attention
    assert row["share"] == pytest.approx(row["operations"] / row["seconds"] / 989e12)


def test_a_training_step_is_measured(monkeypatch, tmp_path, capsys):
    config = ModelConfig("llama", 64, 32, 48, 3, 4, 2, 16, 2048)
    monkeypatch.setitem(shapes.MODELS, "llama-3-8b", config)
    target = tmp_path / "rows.json"
    arguments = ["--context", "300", "--dtype", "float32", "--repeats", "2", "--retrieval-heads", "3"]
    assert cli.main(["bench", "train", *arguments, "--loss", "logits", "--json", str(target)]) == 0
    assert "llama-3-8b" in capsys.readouterr().out
    (row,) = json.loads(target.read_text())["rows"]
    assert row["seconds"] == statistics.median(row["samples_s"]) > 0
    assert len(row["samples_s"]) == 2
    assert (row["context"], row["answer_tokens"], row["loss"]) == (300, 768, "logits")
    layers = 3 * (32 * 16 * (4 + 2 + 2 + 4) + 3 * 32 * 48 + 2 * 32)
    assert row["weight_bytes"] == 4 * (layers + 2 * 64 * 32 + 32)


@pytest.mark.parametrize("room", [1, 63, 64, 200])
def test_random_documents_fill_their_room_with_answers(room):
    asked = train.RandomTokens(50)(np.random.default_rng(0), 100, room)
    assert asked.start == 100
    assert len(asked.tokens) == len(asked.answers) <= 100 + room
    assert max(asked.tokens) < 50
    answers = [mark for mark in asked.answers if mark]
    assert len(answers) == (room if room < 64 else 48 * (room // 64))
    assert len(set(answers)) == max(1, room // 64)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_retrieval_heads_are_spread(count):
    config = ModelConfig("llama", 64, 32, 48, 3, 4, 2, 16, 128)
    head_map = step.spread_heads(config, count)
    head_map.check(config)
    assert head_map.num_retrieval == count


def test_kernels_are_timed_beside_their_rivals(tmp_path, capsys):
    target = tmp_path / "kernels.json"
    arguments = ["--batch", "1", "--repeats", "2", "--dtype", "float32", "--context", "200", "--pages", "8",
                 "--working-set", str(1 << 20)]  # fmt: skip
    assert cli.main(["bench", "kernels", "--page-size", "16", "--json", str(target), *arguments]) == 0
    assert "sparse_decode" in capsys.readouterr().out
    rows = json.loads(target.read_text())["rows"]
    assert [(row["name"], row["retrieval_heads"]) for row in rows] == [
        ("sparse_decode", 0), ("dense_decode", 8), ("dense_decode", 1), ("hybrid_decode", 1), ("select_pages", 8)
    ]  # fmt: skip
    page = 16 * 2 * 128 * 4
    for row, read in zip(rows, [8 * 8 * page, 8 * 13 * page, 13 * page, (13 + 7 * 8) * page, 8 * 13 * 4], strict=True):
        assert row["roofline_us"] == pytest.approx(1e6 * read / 4.6e12)
        assert row["rivals"]["xla"] > 0


def test_what_an_implementation_does_not_run_is_refused_before_caches_are_made(monkeypatch, capsys):
    def made(*args):
        raise AssertionError("caches of gigabytes are made here")

    monkeypatch.setattr(kernels, "measure_batch", made)
    assert cli.main(["bench", "kernels", "--implementation", "mosaic_gpu"]) == 2
    assert "Hopper" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decode", "--batch", "2"], "--shape"),
        (["decode", "--repeats", "2"], "--shape"),
        (["decode", "--shape", "bundled", "--repeats", "0"], "at least 1"),
        (["decode", "--shape", "llama-3-8b", "--model", "x"], "exclude"),
        (["decode", "--shape", "llama-3-8b", "--batch", "two"], "whole numbers"),
        (["kernels", "--batch", "0"], "at least one"),
        (["decode", "--shape", "llama-3-8b", "--retrieval-heads", "7", "--page-size", "64"], "layer 0 alone has 8"),
        (["kernels", "--pages", "3"], "at least 7"),
        (["kernels", "--page-size", "0"], "--page-size"),
        (["prefill", "--context", "0"], "at least 1"),
        (["train", "--repeats", "0"], "at least 1"),
        (["train", "--context", "0"], "at least 1"),
        (["train", "--context", "200000"], "positions for 131072"),
        (["train", "--shape", "bundled", "--retrieval-heads", "3"], "layer 0 alone has 4"),
        (["kernels", "--implementation", "mosaic_gpu"], "Hopper"),
    ],
    ids=" ".join,
)
def test_impossible_benchmarks_are_refused(arguments, message, capsys):
    assert cli.main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
