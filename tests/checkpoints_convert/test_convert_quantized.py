"""`lychee convert --quantize`: what the folder stores, that it remembers it, and that it loads as it was rounded."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from checkpoints_convert import __main__ as command_line
from checkpoints_convert import convert, store
from checkpoints_convert.verify import verify
from checkpoints_convert.weights import Weights
from lychee_jax.attention.head_map import HeadMap
from lychee_jax.cli import main as cli
from lychee_jax.config import ModelConfig
from lychee_jax.errors import UserError
from lychee_jax.loading import load, read_config
from tests.support import first_format, tiny_checkpoints
from tests.support.tiny_gguf import write_gguf

LLAMA, QWEN2, QWEN3 = (
    tiny_checkpoints.TINY[family] | {"num_hidden_layers": 1} for family in ("llama", "qwen2", "qwen3")
)
UP = "model.layers.0.mlp.up_proj.weight"


def arrays(model):
    return {name: np.asarray(leaf) for name, leaf in zip(model.spec.names, model.weights, strict=True)}


def read_all(folder):
    return store.read(folder / store.WEIGHTS, store.shapes(folder / store.WEIGHTS))


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for path, array in wanted.items():
        assert found[path].dtype == array.dtype, path
        np.testing.assert_array_equal(found[path].view(np.uint8), array.view(np.uint8), err_msg=path)


@pytest.mark.parametrize(
    ("raw", "quantize", "head"),
    [
        (LLAMA, "int8", False),
        (LLAMA | {"attention_bias": True, "mlp_bias": True}, "fp8", True),
        (QWEN2, "int8", True),  # tied: the head is a copy
        (QWEN2, "fp8", False),
        (QWEN3, "fp8", True),
        (QWEN3, "int8", False),
    ],
)
def test_a_folder_stores_what_loading_would_round(tmp_path, raw, quantize, head):
    tiny_checkpoints.write_checkpoint(tmp_path / "hf", raw, shards=2)
    wanted, heard = load(tmp_path / "hf", "bfloat16", quantize=quantize, quantize_head=head), []
    report = convert(
        tmp_path / "hf", tmp_path / "out", dtype="bfloat16", quantize=quantize, quantize_head=head, verify=True,
        progress=lambda *told: heard.append(told),
    )  # fmt: skip
    for stage in ("convert", "verify"):  # nothing is read twice, but for a tied table that is also a head
        steps = [told[1:] for told in heard if told[0] == stage]
        assert [done for done, _ in steps] == sorted({done for done, _ in steps})
        assert steps[-1] == (steps[0][1], report.tensors + (report.tied and head))
    assert_same(read_all(tmp_path / "out"), arrays(wanted))
    assert report.bytes == sum(array.nbytes for array in arrays(wanted).values())
    assert (report.quantize, report.verified) == (quantize, True)
    assert f"in bfloat16 with kernels in {quantize}" in str(report)
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written == {"quant_method": "lychee", "quantize": quantize, "quantize_head": head}
    found = load(tmp_path / "out")
    assert_same(arrays(found), arrays(wanted))
    assert found.config == wanted.config == ModelConfig.from_folder(tmp_path / "out") == read_config(tmp_path / "out")
    assert found.weights_digest() == wanted.weights_digest()


def test_nothing_is_rounded_twice(tmp_path):
    """The kind that is stored may be named; another is refused; the dtype of the rest may change."""
    tiny_checkpoints.write_checkpoint(tmp_path / "hf", QWEN3)
    convert(tmp_path / "hf", tmp_path / "out", quantize="int8")
    plain, same = load(tmp_path / "out"), load(tmp_path / "out", quantize="int8")
    assert_same(arrays(same), arrays(plain))
    with pytest.raises(UserError, match=r"was converted with --quantize int8; for fp8, convert the original again$"):
        load(tmp_path / "out", quantize="fp8")
    with pytest.raises(UserError, match="converted already"):
        convert(tmp_path / "out", tmp_path / "again", quantize="int8")
    half = arrays(load(tmp_path / "out", "bfloat16"))
    for path, array in arrays(plain).items():
        kept = array.dtype == np.int8 or f"{path.removesuffix('scale')}kernel" in half
        np.testing.assert_array_equal(half[path], array if kept else array.astype(half[path].dtype), err_msg=path)
    # The head is stored in float32, and is rounded once if it is asked for.
    head = arrays(load(tmp_path / "out", quantize_head=True))
    wanted = arrays(load(tmp_path / "hf", quantize="int8", quantize_head=True))
    assert_same(head, wanted)


def test_gguf_files_are_rounded_from_what_they_mean(tmp_path, caplog):
    raw = LLAMA | {"hidden_size": 64, "intermediate_size": 96}
    tensors = tiny_checkpoints.random_tensors(raw)
    write_gguf(tmp_path / "whole.gguf", raw, tensors)
    tiny_checkpoints.write_checkpoint(tmp_path / "hf", raw)
    convert(tmp_path / "whole.gguf", tmp_path / "out", quantize="fp8", quantize_head=True, verify=True)
    convert(tmp_path / "hf", tmp_path / "other", quantize="fp8", quantize_head=True)
    assert_same(read_all(tmp_path / "out"), read_all(tmp_path / "other"))
    assert caplog.messages == []
    write_gguf(tmp_path / "small.gguf", raw, tensors, matrices="Q8_0")
    convert(tmp_path / "small.gguf", tmp_path / "again", quantize="int8", verify=True)
    (said,) = caplog.messages
    assert "small.gguf is quantised already, and was rounded again: relative error of a channel 0." in said


def test_verify_compares_channels(tmp_path):
    tensors = tiny_checkpoints.write_checkpoint(tmp_path / "hf", LLAMA)
    convert(tmp_path / "hf", tmp_path / "out", quantize="int8")
    weights = Weights(tmp_path / "hf")
    config = dataclasses.replace(weights.config, quantize="int8")
    verify(weights, tmp_path / "out", config)
    with pytest.raises(UserError, match=r"missing or misshapen: layers\.0\.attention\.o_proj\.kernel, "):
        verify(weights, tmp_path / "out", dataclasses.replace(config, quantize="fp8"))
    tensors[UP][[3, 9]] *= 1.5  # of a channel only the scale changes, of another one number
    tensors[UP][20, np.abs(tensors[UP][20]).argmin()] += 0.1
    tiny_checkpoints.write_shards(tmp_path / "hf", tensors)
    with pytest.raises(UserError, match=rf": different: {UP} \(3 of 48 channels\)$"):
        verify(Weights(tmp_path / "hf"), tmp_path / "out", config)


def test_folders_that_do_not_hold_what_their_config_says(tmp_path):
    tiny_checkpoints.write_checkpoint(tmp_path / "hf", LLAMA)
    convert(tmp_path / "hf", tmp_path / "out", quantize="int8")
    file = tmp_path / "out" / "config.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps(raw | {"quantization_config": None}))
    with pytest.raises(UserError, match=r": extra: layers\.0\.attention\.o_proj\.scale, "):
        load(tmp_path / "out")
    told = raw["quantization_config"]
    file.write_text(json.dumps(raw | {"quantization_config": told | {"quantize_head": True}}))
    with pytest.raises(UserError, match=r": missing: lm_head\.scale; of another dtype: lm_head\.kernel \(float32"):
        load(tmp_path / "out")
    file.write_text(json.dumps(raw | {"quantization_config": told | {"quantize": "fp8"}}))
    with pytest.raises(UserError, match=r"kernel \(int8 instead of float8_e4m3fn\)"):
        load(tmp_path / "out")


def test_what_cannot_be_rounded_leaves_nothing(tmp_path):
    tensors = tiny_checkpoints.write_checkpoint(tmp_path / "hf", LLAMA)
    tensors[UP][3, 5] = np.inf
    tiny_checkpoints.write_shards(tmp_path / "hf", tensors)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"quantize": "int8"}, f"{UP}: a weight is NaN or infinite"),
        ({"quantize": "int4"}, "use int8 or fp8"),
        ({"quantize_head": True}, "quantize is none"),
    ]
    for options, told in cases:
        with pytest.raises(UserError, match=told):
            convert(tmp_path / "hf", tmp_path / "deep" / "out", **options)
    assert [file.name for file in tmp_path.iterdir()] == ["hf"]


def test_folders_of_the_first_format_are_rounded_when_they_are_loaded(tmp_path):
    tiny_checkpoints.write_checkpoint(tmp_path / "hf", LLAMA)
    config = ModelConfig.from_hf(LLAMA)
    rng = np.random.default_rng(0)
    drawn = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in first_format.shapes(config).items()}
    first_format.write(tmp_path / "first", LLAMA, drawn)
    fused = first_format.fused(drawn)
    whole, small = arrays(load(tmp_path / "first")), arrays(load(tmp_path / "first", quantize="int8"))
    assert_same(whole, {path: np.ascontiguousarray(array) for path, array in fused.items()})
    path = "layers.0.attention.o_proj"
    error = np.abs(small[f"{path}.kernel"] * small[f"{path}.scale"][:, None] - fused[f"{path}.kernel"])
    assert (error <= 0.51 * small[f"{path}.scale"][:, None]).all()


def test_both_command_lines_and_the_head_map(tmp_path, capsys):
    """The map of a model fits its quantised folder, and `lychee heads` shows it."""
    tiny_checkpoints.write_checkpoint(tmp_path / "hf", QWEN2)
    HeadMap.all(ModelConfig.from_hf(QWEN2)).save(tmp_path / "hf" / "heads.json")
    argv = ["convert", str(tmp_path / "hf"), str(tmp_path / "out"), "--quantize", "int8", "--quantize-head", "--verify"]
    assert cli.main(argv) == 0
    assert "with kernels in int8" in capsys.readouterr().out
    argv[2] = str(tmp_path / "other")
    assert command_line.main(argv[1:]) == 0
    assert_same(read_all(tmp_path / "out"), read_all(tmp_path / "other"))
    capsys.readouterr()
    assert load(tmp_path / "out").heads == HeadMap.all(ModelConfig.from_hf(QWEN2))
    assert cli.main(["heads", "show", str(tmp_path / "out" / "heads.json")]) == 0
    argv = ["generate", "--model", str(tmp_path / "out"), "--quantize", "fp8", "-p", "x"]
    assert cli.main(argv) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "was converted with --quantize int8; for fp8" in said.err
    assert command_line.main([*map(str, (tmp_path / "hf", tmp_path / "x")), "--quantize-head"]) == 2
