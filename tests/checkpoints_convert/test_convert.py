"""Conversion keeps every number: each family and layout, dtypes, tied embeddings, files, memory, `--verify`."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import orbax.checkpoint as ocp
import pytest

from checkpoints_convert import convert, store
from checkpoints_convert.config import ConvertConfig
from checkpoints_convert.verify import verify
from checkpoints_convert.weights import NOT_FINITE, Weights
from lychee_jax.cli import main as cli
from lychee_jax.config import ModelConfig
from lychee_jax.errors import UserError
from lychee_jax.loading import load
from tests.support import convert_memory, tiny_checkpoints

LLAMA, QWEN2, QWEN3 = (tiny_checkpoints.TINY[family] for family in ("llama", "qwen2", "qwen3"))
TIED = LLAMA | {"tie_word_embeddings": True}


def read_all(folder):
    weights = folder / store.WEIGHTS
    return store.read(weights, store.shapes(weights))


def expected(raw, tensors, dtype):
    """The converted weights by our paths, put together and cast with nothing of the package."""
    dtype = tiny_checkpoints.NUMPY_DTYPES[dtype]
    result = {
        "embed.embedding": tensors["model.embed_tokens.weight"],
        "norm.scale": tensors["model.norm.weight"],
    }
    if not raw.get("tie_word_embeddings", False):
        result["lm_head.kernel"] = tensors["lm_head.weight"]
    for layer in range(raw["num_hidden_layers"]):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        for path, modules in (
            ("attention.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("attention.o_proj", ("self_attn.o_proj",)),
            ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
            ("mlp.down_proj", ("mlp.down_proj",)),
        ):
            for leaf, kind in (("kernel", "weight"), ("bias", "bias")):
                parts = [tensors[name] for module in modules if (name := f"{theirs}.{module}.{kind}") in tensors]
                if parts:
                    result[f"{ours}.{path}.{leaf}"] = np.concatenate(parts)
        for path, module in (
            ("input_norm", "input_layernorm"),
            ("post_attention_norm", "post_attention_layernorm"),
            ("attention.q_norm", "self_attn.q_norm"),
            ("attention.k_norm", "self_attn.k_norm"),
        ):
            if f"{theirs}.{module}.weight" in tensors:
                result[f"{ours}.{path}.scale"] = tensors[f"{theirs}.{module}.weight"]
    return {path: array.astype(dtype) for path, array in result.items()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for path, array in wanted.items():
        assert found[path].dtype == array.dtype, path
        np.testing.assert_array_equal(found[path], array, err_msg=path)


@pytest.mark.parametrize(
    ("raw", "shards"),
    [
        (LLAMA, 1),
        (LLAMA | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}, 2),
        (TIED, 3),
        (QWEN2, 1),
        (QWEN3 | {"attention_bias": True}, 3),
    ],
    ids=["llama", "llama-biases", "llama-tied", "qwen2", "qwen3-biases"],
)
def test_every_tensor_arrives_in_our_layout(tmp_path, raw, shards):
    tensors = tiny_checkpoints.write_checkpoint(tmp_path / "hf", raw, shards=shards)
    report = convert(tmp_path / "hf", tmp_path / "out", verify=True)
    assert_same(read_all(tmp_path / "out"), expected(raw, tensors, "float32"))
    assert (report.tensors, report.dtype, report.verified) == (len(tensors), "float32", True)
    assert report.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert report.tied == raw.get("tie_word_embeddings", False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["hf", "out"]


@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
def test_dtypes(tmp_path, source, target):
    tensors = tiny_checkpoints.write_checkpoint(tmp_path / "hf", LLAMA | {"num_hidden_layers": 1}, dtype=source)
    convert(tmp_path / "hf", tmp_path / "out", dtype=target, verify=True)
    assert_same(read_all(tmp_path / "out"), expected(LLAMA | {"num_hidden_layers": 1}, tensors, target))
    assert ModelConfig.from_folder(tmp_path / "out").dtype == target


def test_the_dtype_is_the_checkpoints_unless_asked_for(tmp_path):
    for name, raw, stored, wanted in (
        ("named", LLAMA, "bfloat16", "bfloat16"),
        ("transformers 5", LLAMA | {"torch_dtype": None, "dtype": "float16"}, "float16", "float16"),
        ("not named", LLAMA | {"torch_dtype": None}, "bfloat16", "bfloat16"),
        ("config wins", LLAMA | {"torch_dtype": "bfloat16"}, "float32", "bfloat16"),
    ):
        tiny_checkpoints.write_checkpoint(tmp_path / name, raw, dtype=stored)
        assert convert(tmp_path / name, tmp_path / f"{name} out").dtype == wanted


def test_tensors_larger_than_a_block_and_a_tile_are_put_together_again(tmp_path):
    raw = LLAMA | {"vocab_size": 700, "hidden_size": 264, "intermediate_size": 520, "num_hidden_layers": 1}
    tensors = tiny_checkpoints.write_checkpoint(tmp_path / "hf", raw, dtype="bfloat16")
    config = ConvertConfig(block_numbers=300 * 264, chunk_bytes=1 << 15)
    convert(tmp_path / "hf", tmp_path / "out", verify=True, config=config)
    assert_same(read_all(tmp_path / "out"), expected(raw, tensors, "bfloat16"))


def test_the_weights_are_an_ordinary_orbax_checkpoint(tmp_path):
    tensors = tiny_checkpoints.write_checkpoint(tmp_path / "hf", QWEN3, dtype="bfloat16")
    convert(tmp_path / "hf", tmp_path / "out")
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(tmp_path / "out" / "weights")
    kernel = tree["layers"]["1"]["mlp"]["down_proj"]["kernel"]
    np.testing.assert_array_equal(kernel, tensors["model.layers.1.mlp.down_proj.weight"])


def rewrite(folder, tensors):
    tiny_checkpoints.write_shards(folder, tensors)


def test_tied_with_an_equal_head_is_tied(tmp_path):
    tensors = tiny_checkpoints.write_checkpoint(tmp_path / "hf", TIED)
    rewrite(tmp_path / "hf", tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()})
    assert convert(tmp_path / "hf", tmp_path / "out").tied
    assert "lm_head.kernel" not in read_all(tmp_path / "out")
    assert ModelConfig.from_folder(tmp_path / "out").tie_word_embeddings


def test_tied_with_another_head_keeps_both(tmp_path):
    tensors = tiny_checkpoints.write_checkpoint(tmp_path / "hf", TIED)
    head = tensors["model.embed_tokens.weight"].copy()
    head[-1, -1] += 1
    rewrite(tmp_path / "hf", tensors | {"lm_head.weight": head})
    assert not convert(tmp_path / "hf", tmp_path / "out", verify=True).tied
    np.testing.assert_array_equal(read_all(tmp_path / "out")["lm_head.kernel"], head)
    assert not ModelConfig.from_folder(tmp_path / "out").tie_word_embeddings


@pytest.mark.parametrize("shards", [1, 2])
def test_tied_with_a_head_alone_embeds_with_it(tmp_path, shards):
    """As in transformers, where either name may be the one that is stored."""
    tensors = tiny_checkpoints.write_checkpoint(tmp_path / "hf", TIED | {"torch_dtype": None}, dtype="bfloat16")
    renamed = {name.replace("model.embed_tokens", "lm_head"): array for name, array in tensors.items()}
    (tmp_path / "hf" / "model.safetensors").unlink()
    tiny_checkpoints.write_shards(tmp_path / "hf", renamed, shards=shards)
    report = convert(tmp_path / "hf", tmp_path / "out", verify=True)
    assert (report.tied, report.dtype) == (True, "bfloat16")
    assert_same(read_all(tmp_path / "out"), expected(TIED, tensors, "bfloat16"))
    found = load(tmp_path / "hf").model.embed.embedding[...]
    np.testing.assert_array_equal(found, tensors["model.embed_tokens.weight"])


def test_what_the_base_models_class_saved_has_no_prefix(tmp_path):
    """As Qwen3-Embedding; the head is tied, so nothing is missing."""
    raw = QWEN3 | {"tie_word_embeddings": True}
    tensors = tiny_checkpoints.write_checkpoint(tmp_path / "hf", raw)
    rewrite(tmp_path / "hf", {name.removeprefix("model."): array for name, array in tensors.items()})
    convert(tmp_path / "hf", tmp_path / "out", verify=True)
    assert_same(read_all(tmp_path / "out"), expected(raw, tensors, "float32"))
    (tmp_path / "hf" / "config.json").write_text(json.dumps(QWEN3))
    with pytest.raises(UserError, match=r": missing: lm_head\.weight$"):
        convert(tmp_path / "hf", tmp_path / "untied")


def test_rotary_frequencies_of_old_checkpoints_are_ignored(tmp_path):
    tensors = tiny_checkpoints.write_checkpoint(tmp_path / "hf", LLAMA)
    frequencies = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        "model.rotary_emb.inv_freq": np.ones(4, np.float64),
    }
    rewrite(tmp_path / "hf", tensors | frequencies)
    assert convert(tmp_path / "hf", tmp_path / "out").tensors == len(tensors)


def test_shards_come_by_the_index_and_strangers_are_not_opened(tmp_path):
    tensors = tiny_checkpoints.write_checkpoint(tmp_path / "hf", LLAMA, shards=2)
    (tmp_path / "hf" / "model-00009-of-00009.safetensors").write_bytes(b"not even safetensors")
    convert(tmp_path / "hf", tmp_path / "out")
    assert_same(read_all(tmp_path / "out"), expected(LLAMA, tensors, "float32"))


def test_text_files_come_along_and_nothing_else(tmp_path):
    tiny_checkpoints.write_checkpoint(tmp_path / "hf", LLAMA)
    texts = {
        "generation_config.json": '{"eos_token_id": [3, 4]}',
        "tokenizer.json": "{}",
        "tokenizer_config.json": "{}",
        "special_tokens_map.json": "{}",
        "added_tokens.json": "{}",
        "tokenizer.model": "\x00 é",
        "vocab.json": "{}",
        "merges.txt": "a b",
        "chat_template.jinja": "{{ messages }}",
        "chat_template.json": "{}",
        "heads.json": "{}",
    }
    for name, text in texts.items():
        (tmp_path / "hf" / name).write_text(text, encoding="utf-8")
    (tmp_path / "hf" / "README.md").write_text("stays")
    convert(tmp_path / "hf", tmp_path / "out")
    found = {file.name for file in (tmp_path / "out").iterdir()}
    assert found == {*texts, "config.json", "lychee.json", "weights"}
    for name, text in texts.items():
        assert (tmp_path / "out" / name).read_text(encoding="utf-8") == text
    assert json.loads((tmp_path / "out" / "lychee.json").read_text()) == {"format": "lychee-checkpoint/2"}


def test_the_config_keeps_what_it_said(tmp_path):
    raw = LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}, "something_new": [1]}
    tiny_checkpoints.write_checkpoint(tmp_path / "hf", raw)
    convert(tmp_path / "hf", tmp_path / "out", dtype="bfloat16")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == raw | {"dtype": "bfloat16", "tie_word_embeddings": False}


def verify_as(dtype, folder):
    weights = Weights(folder / "hf")
    verify(weights, folder / "out", dataclasses.replace(weights.config, dtype=dtype))


def test_verify_finds_what_differs(tmp_path):
    tensors = tiny_checkpoints.write_checkpoint(tmp_path / "hf", LLAMA, dtype="bfloat16")
    convert(tmp_path / "hf", tmp_path / "out")
    verify_as("bfloat16", tmp_path)
    with pytest.raises(UserError, match=r"missing or misshapen: embed\.embedding"):
        verify_as("float16", tmp_path)
    tensors["model.layers.1.mlp.up_proj.weight"].view(np.uint16)[5, 7] ^= 1
    rewrite(tmp_path / "hf", tensors)
    with pytest.raises(UserError, match=r": different: model\.layers\.1\.mlp\.up_proj\.weight$"):
        verify_as("bfloat16", tmp_path)


def chunk(folder, path):
    """The file that holds a small tensor of a converted checkpoint."""
    return next(file for file in (folder / "weights" / path / "c").rglob("*") if file.is_file())


def test_verify_finds_damaged_and_lost_files(tmp_path):
    tiny_checkpoints.write_checkpoint(tmp_path / "hf", LLAMA, dtype="bfloat16")
    convert(tmp_path / "hf", tmp_path / "out")
    damaged, lost = "layers.0.mlp.gate_up_proj.kernel", "layers.1.attention.o_proj.kernel"
    content = bytearray(chunk(tmp_path / "out", damaged).read_bytes())
    content[100] ^= 1
    chunk(tmp_path / "out", damaged).write_bytes(content)
    chunk(tmp_path / "out", lost).unlink()
    with pytest.raises(UserError, match="differs from the checkpoint") as error:
        verify_as("bfloat16", tmp_path)
    assert "different: model.layers.0.mlp.gate_proj.weight" in str(error.value)
    assert f"unreadable: {lost}" in str(error.value)
    assert "\n" not in str(error.value)


def test_verify_compares_bits(tmp_path):
    tiny_checkpoints.write_checkpoint(tmp_path / "hf", LLAMA)
    tensors = tiny_checkpoints.random_tensors(LLAMA)
    tensors["model.norm.weight"][:2] = [np.nan, -0.0]
    rewrite(tmp_path / "hf", tensors)
    weights = Weights(tmp_path / "hf")
    array = weights.read("norm.scale", "float32")
    assert weights.compare("norm.scale", array).keys() == {NOT_FINITE}  # NaN is equal to itself here
    array[1] = 0.0
    assert weights.compare("norm.scale", array) == {key: ["model.norm.weight"] for key in ("different", NOT_FINITE)}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_verify_refuses_what_is_not_finite(tmp_path, value):
    tensors = tiny_checkpoints.write_checkpoint(tmp_path / "hf", LLAMA)
    tensors["model.layers.1.self_attn.v_proj.weight"][3, 5] = value
    rewrite(tmp_path / "hf", tensors)
    with pytest.raises(UserError) as error:
        convert(tmp_path / "hf", tmp_path / "out", dtype="bfloat16", verify=True)
    expected = "not finite (NaN or infinity): model.layers.1.self_attn.v_proj.weight"
    assert str(error.value) == f"{tmp_path / 'hf'}: {expected}"
    assert [file.name for file in tmp_path.iterdir()] == ["hf"]
    assert not convert(tmp_path / "hf", tmp_path / "out").verified


def test_verify_refuses_what_the_new_dtype_makes_infinite(tmp_path):
    tensors = tiny_checkpoints.write_checkpoint(tmp_path / "hf", LLAMA)
    tensors["model.norm.weight"][0] = np.finfo(np.float32).max
    rewrite(tmp_path / "hf", tensors)
    with pytest.raises(UserError, match=r"not finite .*: model\.norm\.weight$"):
        convert(tmp_path / "hf", tmp_path / "out", dtype="bfloat16", verify=True)
    assert convert(tmp_path / "hf", tmp_path / "out", verify=True).verified


def test_progress_is_told_for_both_stages(tmp_path):
    tensors = tiny_checkpoints.write_checkpoint(tmp_path / "hf", LLAMA)
    heard = []
    convert(tmp_path / "hf", tmp_path / "out", verify=True, progress=lambda *told: heard.append(told))
    for stage in ("convert", "verify"):
        steps = [told[1:] for told in heard if told[0] == stage]
        done = [step for step, _ in steps]
        assert done == sorted(set(done))
        assert (done[0], done[-1], len(done)) == (0, len(tensors), len(expected(LLAMA, tensors, "float32")) + 1)
        assert {total for _, total in steps} == {len(tensors)}


def test_both_command_lines_convert(tmp_path, capsys):
    tiny_checkpoints.write_checkpoint(tmp_path / "hf", LLAMA)
    command = [sys.executable, "-m", "checkpoints_convert", "hf", "out", "--dtype", "bfloat16", "--verify"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "21 tensors" in done.stdout
    assert "bfloat16" in done.stdout
    assert "verified" in done.stdout
    assert cli.main(["convert", str(tmp_path / "hf"), str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert cli.main(["convert", str(tmp_path / "hf"), str(tmp_path / "out"), "--overwrite"]) == 0
    assert "float32" in capsys.readouterr().out


@pytest.mark.slow
def test_two_gigabytes_take_less_than_one_in_memory():
    found = convert_memory.measure()
    assert found["bytes"] > 1.9e9
    assert found["above_import_mb"] < 1000 / 1.048576
