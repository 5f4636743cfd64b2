"""The serve benchmark: its arithmetic on deliveries made by hand, its traffic, and the command on a tiny model."""

import dataclasses
import json
import math
import statistics

import numpy as np
import pytest

from lychee_jax.benchmarks import serve, shapes
from lychee_jax.benchmarks.deliveries import Delivery, Spread, columns
from lychee_jax.cli import main as cli
from lychee_jax.config import ModelConfig
from lychee_jax.errors import UserError
from lychee_jax.loading import read_config
from tests.support import tiny_checkpoints

CONFIG = ModelConfig("llama", 64, 32, 48, 2, 4, 2, 16, 1000)
# Runs that agree in the size of the cache share programs: 12 pages, and 2 that idle rows write to.
SMALL = ["--max-num-seqs", "2", "--cache-memory", str(14 * 4096)]
PAGES = ["--page-size", "16", "--budget", "64", "--sink", "16", "--recent", "16"]

# a decodes; b arrives at 1, is read from 3 on, and joins at 6; a ends at 8.
ARRIVALS = {"a": 0.0, "b": 1.0}
DELIVERIES = [
    Delivery(1.0, "a", 1, "decoding", 0.1),
    Delivery(2.0, "a", 8, "decoding", 0.2),
    Delivery(3.0, "a", 8, "reading", 0.3),
    Delivery(5.0, "a", 8, "reading", 0.4),
    Delivery(6.0, "b", 1, "decoding", 0.5),
    Delivery(7.0, "a", 8, "decoding", 0.6),
    Delivery(7.0, "b", 8, "decoding", 0.6),
    Delivery(8.0, "a", 8, "decoding", 0.8),
    Delivery(8.0, "b", 8, "decoding", 0.8),
    Delivery(9.0, "b", 4, "decoding", 1.8),
]


def test_columns_of_deliveries_made_by_hand():
    found = columns(ARRIVALS, DELIVERIES)
    assert found.seconds == 9.0
    assert found.tokens_per_s == pytest.approx(62 / 9)
    # From 6 to 8: later a has ended, earlier b is read.
    assert (found.full_rows, found.full_seconds, found.full_tokens_per_s) == (2, 2.0, 16.0)
    assert found.host_share == pytest.approx(0.3 / 2)
    assert found.samples_first_token_s == [1.0, 5.0]
    assert dataclasses.astuple(found.first_token_s) == pytest.approx((3.0, 4.96))
    assert found.samples_gap_s == [1.0, 1.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0]
    assert found.samples_gap_tokens == [8, 8, 8, 8, 8, 8, 8, 4]
    assert found.between_tokens_s == Spread(0.125, 0.25)
    assert (found.block_s, found.longest_stall_s, found.stall_blocks) == (1.0, 2.0, 2.0)


def test_the_usual_block_is_one_without_a_prompt_beside_it():
    """Most gaps have a chunk of a prompt in them; the median of all gaps would hide how long rows stall."""
    quiet = [Delivery(time, "a", 8, "decoding") for time in (1.0, 2.0)]
    found = columns({"a": 0.0}, quiet + [Delivery(time, "a", 8, "reading") for time in (5.0, 8.0, 11.0)])
    assert (found.block_s, found.longest_stall_s, found.stall_blocks) == (1.0, 3.0, 3.0)
    assert statistics.median(found.samples_gap_s) == 3.0


def test_a_prompt_read_between_two_deliveries_is_noticed():
    """Nobody sees it being read, but a first token ends the stretch."""
    deliveries = [
        Delivery(1.0, "a", 1, "decoding"),
        Delivery(2.0, "a", 8, "decoding"),
        Delivery(4.0, "a", 8, "decoding"),
        Delivery(4.0, "b", 1, "decoding"),
        Delivery(5.0, "a", 8, "decoding"),
        Delivery(5.0, "b", 8, "decoding"),
    ]
    found = columns({"a": 0.0, "b": 2.0}, deliveries)
    assert (found.block_s, found.longest_stall_s) == (1.0, 2.0)
    assert (found.full_rows, found.full_seconds, found.full_tokens_per_s) == (2, 1.0, 16.0)


def test_what_was_never_seen_is_left_open():
    found = columns({"a": 0.5}, [Delivery(1.0, "a", 1, "decoding")])
    assert found.tokens_per_s == 2.0
    assert (found.full_rows, found.full_seconds) == (0, 0)
    assert found.first_token_s == Spread(0.5, 0.5)
    nothing = (found.full_tokens_per_s, found.between_tokens_s, found.block_s, found.longest_stall_s)
    assert nothing == (None, None, None, None)
    assert (found.stall_blocks, found.host_share) == (None, None)


def test_arrivals_are_random_and_the_same_for_a_seed():
    traffic = serve.Traffic(400, 2.0, (10, 30), 5)
    first, second = (serve.arrivals(traffic, CONFIG, seed) for seed in (1, 2))
    assert first == serve.arrivals(traffic, CONFIG, 1)
    assert first != second
    times = [each.time for each in first]
    assert times[0] == 0
    assert times == sorted(times)
    assert np.mean(np.diff(times)) == pytest.approx(0.5, rel=0.2)
    assert {len(each.prompt) for each in first} == {10, 30}
    assert len({each.prompt for each in first}) == 400
    assert all(0 <= token < 64 for each in first for token in each.prompt)
    at_once = serve.arrivals(dataclasses.replace(traffic, rate=math.inf), CONFIG, 1)
    assert {each.time for each in at_once} == {0.0}


def test_the_late_prompt_is_the_longest_and_leaves_room_for_its_tokens():
    made = serve.arrivals(serve.Traffic(4, math.inf, (20, 1000), 600, late=True), CONFIG, 0)
    assert [len(each.prompt) for each in made] == [20, 20, 20, 1000 - 16]
    assert [each.new_tokens for each in made] == [600, 600, 600, 16]
    assert [each.after_tokens for each in made] == [0, 0, 0, 128]


@pytest.mark.parametrize("name", serve.SCENARIOS)
def test_scenarios_fit_the_models_that_they_are_for(name):
    large = serve.scenario(name, shapes.MODELS["llama-3-8b"], "gpu")
    assert large == serve.SCENARIOS[name]
    small = serve.scenario(name, shapes.MODELS["bundled"], "cpu")
    assert max(small.prompt_lengths) <= 16384
    for traffic, shape in ((large, "llama-3-8b"), (small, "bundled")):
        config = shapes.MODELS[shape]
        made = serve.arrivals(traffic, config, 0)
        assert len(made) == traffic.requests
        assert max(len(each.prompt) + each.new_tokens for each in made) <= config.max_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_checkpoints.write_checkpoint(folder, tiny_checkpoints.TINY["llama"])
    return str(folder)


def _serve(*arguments):
    return cli.main(["bench", "serve", "--offline", *PAGES, *arguments])


def test_the_command_serves_and_writes_a_results_file(folder, tmp_path, capsys):
    target = tmp_path / "engine.json"
    arguments = ["--requests", "3", "--rate", "inf", "--prompt-lengths", "24,30", "--new-tokens", "60"]
    assert _serve("--model", folder, *arguments, *SMALL, "--output", str(target), "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(target.read_text())
    assert printed.keys() == {"device", "jax", "command", "rows", "targets"}
    assert printed["targets"] == []
    mixed, alone = printed["rows"]
    assert (mixed["name"], alone["name"]) == ("mixed", "alone")
    for row, requests in ((mixed, 3), (alone, 1)):
        assert len(row["prompt_tokens"]) == len(row["samples_first_token_s"]) == requests
        assert row["new_tokens"] == [60] * requests
        assert sum(row["samples_gap_tokens"]) == 59 * requests
        assert row["tokens_per_s"] == pytest.approx(60 * requests / row["seconds"])
        assert row["full_rows"] == min(requests, 2)
        assert row["full_tokens_per_s"] > 0
        assert 0 < row["host_share"] <= 1
        assert row["longest_stall_s"] == max(row["samples_gap_s"])
        assert 0 < row["pages_owned"] <= row["pages"] == 12
        # All at once: the second pass meets what the first one did.
        assert (row["passes"], row["late_compile_s"]) == (2, 0)
    assert mixed["programs"] > 0
    assert mixed["compile_s"] > 0
    assert set(mixed["prompt_tokens"]) <= {24, 30}
    assert alone["prompt_tokens"] == [min(mixed["prompt_tokens"])]


def test_a_long_prompt_arrives_while_others_decode(folder, capsys):
    arguments = ["--requests", "2", "--prompt-lengths", "24,80", "--new-tokens", "60"]
    assert _serve("--model", folder, "--scenario", "long-prompt", *arguments, *SMALL, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    row = printed["rows"][0]
    assert (row["prompt_tokens"], row["new_tokens"]) == ([24, 80], [60, 16])
    (target,) = printed["targets"]
    assert target["value"] == row["stall_blocks"] == row["longest_stall_s"] / row["block_s"]
    assert (target["target"], target["sense"]) == (3, "<=")


def test_long_prompts_are_read_once_for_both_kinds_of_attention(folder, tmp_path, capsys):
    target = tmp_path / "serve.json"
    arguments = ["--requests", "2", "--prompt-lengths", "70", "--new-tokens", "26", "--heads", "none", *SMALL]
    every = ["--scenario", "long-batch", "--model", folder, *arguments, "--output", str(target), "--append"]
    assert _serve(*every, "--no-read-again") == 0
    printed = json.loads(target.read_text())
    rows = printed["rows"]
    assert [(row["name"], row["attention"]) for row in rows] == [
        ("prompts read", "hybrid"), ("prompts known", "hybrid"), ("prompts known", "dense"),
    ]  # fmt: skip
    assert all(row["late_compile_s"] == 0 and row["full_rows"] == 2 for row in rows)
    assert [row["prompt_tokens_read"] for row in rows] == 3 * [140]  # only prompts of many pages are kept
    (reached,) = printed["targets"]
    assert reached["value"] == rows[1]["full_tokens_per_s"] / rows[2]["full_tokens_per_s"]
    assert "prompts known" in capsys.readouterr().out


def test_a_shared_beginning_and_a_guided_row(folder, tmp_path):
    target = tmp_path / "serve.json"
    model = ["--model", folder, "--output", str(target), "--append", *SMALL]
    lengths = ["--requests", "2", "--prompt-lengths", "80", "--new-tokens", "16"]
    assert _serve("--scenario", "guided", *lengths, *model) == 0
    assert _serve("--scenario", "guided", *lengths, *model) == 0
    printed = json.loads(target.read_text())
    assert [row["name"] for row in printed["rows"]] == 2 * ["no guided", "one guided"]
    assert [row["device"] for row in printed["rows"]] == 4 * [printed["device"]]
    assert all(each["value"] > 0 for each in printed["targets"])


def test_prompts_may_begin_alike():
    made = serve.arrivals(serve.Traffic(3, math.inf, (40,), 5, shared=30), CONFIG, 0)
    assert len({each.prompt[:30] for each in made}) == 1
    assert len({each.prompt[30:] for each in made}) == 3
    with pytest.raises(UserError, match="share"):
        serve.Traffic(3, math.inf, (40, 20), 5, shared=30)


def test_people_get_a_table_and_random_weights_will_do(folder, monkeypatch, capsys):
    monkeypatch.setitem(shapes.MODELS, "llama-3-8b", read_config(folder))
    arguments = ["--requests", "2", "--prompt-lengths", "24", "--new-tokens", "60", "--rate", "inf"]
    assert _serve("--shape", "llama-3-8b", "--dtype", "float32", *arguments, "--max-num-seqs", "2") == 0
    text = capsys.readouterr().out
    # On a CPU the cache has from the start what the two take together, so that it never grows.
    assert "pages there are" in text
    assert text.split("pages there are")[1].split()[:2] == ["12", "12"]
    for part in ("llama-3-8b", "full batch", "longest stall", "compiling", "alone"):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "bundled", "--model", "x"], "exclude"),
        (["--shape", "bundled", "--requests", "0"], "--requests"),
        (["--shape", "bundled", "--requests", "1", "--scenario", "long-prompt"], "at least 2"),
        (["--shape", "bundled", "--rate", "0"], "--rate"),
        (["--shape", "bundled", "--rate", "nan"], "--rate"),
        (["--shape", "bundled", "--prompt-lengths", "8K"], "whole numbers"),
        (["--shape", "bundled", "--prompt-lengths", "0"], "--prompt-lengths"),
        (["--shape", "bundled", "--prompt-lengths", "100000"], "limit of 65536"),
        (["--shape", "bundled", "--prompt-lengths", "64", "--scenario", "long-prompt"], "two lengths"),
        (["--shape", "bundled", "--new-tokens", "1"], "--new-tokens"),
        (["--shape", "bundled", "--max-num-seqs", "0"], "max_num_seqs"),
        (["--shape", "bundled", "--cache-memory", "0"], "--cache-memory"),
        (["--shape", "bundled", "--seed", "-1"], "--seed"),
        (["--shape", "bundled", "--budget", "100"], "multiple of the page size"),
    ],
    ids=" ".join,
)
def test_impossible_traffic_is_refused(arguments, message, capsys):
    assert cli.main(["bench", "serve", "--offline", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


def test_the_way_must_be_named(capsys):
    for arguments in ([], ["--offline", "--url", "http://127.0.0.1:1"]):
        assert cli.main(["bench", "serve", *arguments]) == 2
        assert "--offline" in capsys.readouterr().err


def test_a_server_that_is_not_there(capsys):
    for url, told in (("http://127.0.0.1:1", "cannot be reached"), ("ftp://x", "give an address")):
        assert cli.main(["bench", "serve", "--url", url]) == 2
        assert told in capsys.readouterr().err


def test_a_request_that_does_not_fit_is_refused(folder, capsys):
    assert _serve("--model", folder, "--prompt-lengths", "200", "--cache-memory", str(1 << 15)) == 2
    assert "KV cache has room" in capsys.readouterr().err


def test_lengths_that_leave_no_room_are_refused():
    with pytest.raises(UserError, match="limit of 1000"):
        serve.arrivals(serve.Traffic(1, math.inf, (10,), 1000), CONFIG, 0)
