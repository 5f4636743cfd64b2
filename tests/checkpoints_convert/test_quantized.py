"""Checkpoints of Hugging Face that are stored in 8 bits: exact to a plain reading, kept or rounded, refused by name."""

import json
import re
from typing import Any

import numpy as np
import pytest

from checkpoints_convert import convert, store
from checkpoints_convert.config import ConvertConfig
from lychee_jax.cli import main as cli
from lychee_jax.errors import UserError
from lychee_jax.loading import load
from lychee_jax.models.quantization import quantize_kernel
from tests.support import tiny_checkpoints
from tests.support.tiny_checkpoints import block_fp8, compressed_tensors, plain_reading, quantised, write_quantised

LLAMA, QWEN2, QWEN3 = (
    tiny_checkpoints.TINY[family] | {"num_hidden_layers": 1} for family in ("llama", "qwen2", "qwen3")
)
WIDE = QWEN3 | {"hidden_size": 160, "intermediate_size": 272, "head_dim": 40}
UP, Q_PROJ = "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"

# As they are published: the model, what its config says, how weights and scales lie, the block.
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], tuple[int, int] | None]] = {
    "per-channel": (LLAMA, compressed_tensors(), {"kind": "fp8", "layout": "channel"}, None),
    "per-tensor": (
        QWEN2,
        compressed_tensors(strategy="tensor"),
        {"kind": "fp8", "layout": "tensor", "scale_dtype": "float32"},
        None,
    ),
    "int8": (QWEN3, compressed_tensors("int8"), {"kind": "int8", "layout": "channel"}, None),
    "blocks-of-compressed-tensors": (
        LLAMA,
        compressed_tensors(strategy="block", block_structure=[16, 20]),
        {"kind": "fp8", "layout": (16, 20)},
        (16, 20),
    ),
    "qwen": (WIDE, block_fp8(128, 128), {"kind": "fp8", "layout": (128, 128), "suffix": "_scale_inv"}, (128, 128)),
    "scalars": (
        LLAMA,
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        {"kind": "fp8", "layout": "scalar", "scale_dtype": "float16"},
        None,
    ),
}
KEPT = {"per-channel": "fp8", "per-tensor": "fp8", "scalars": "fp8", "int8": "int8"}


def write(folder, name, *, shards=1, **changes):
    """A checkpoint of a layout; returns its tensors and what a plain reading makes of them."""
    raw, config, how, block = LAYOUTS[name]
    tensors = quantised(tiny_checkpoints.random_tensors(raw, dtype="bfloat16"), **how, **changes)
    write_quantised(folder, raw, config, tensors, shards=shards)
    return tensors, plain_reading(tensors, block)


def read_all(folder):
    return store.read(folder / store.WEIGHTS, store.shapes(folder / store.WEIGHTS))


def names(path):
    """The matrices of Hugging Face that a kernel of the first layer is made of."""
    at = "model.layers.0"
    return {
        "layers.0.attention.qkv_proj": [f"{at}.self_attn.{each}_proj.weight" for each in "qkv"],
        "layers.0.attention.o_proj": [f"{at}.self_attn.o_proj.weight"],
        "layers.0.mlp.gate_up_proj": [f"{at}.mlp.{each}_proj.weight" for each in ("gate", "up")],
        "layers.0.mlp.down_proj": [f"{at}.mlp.down_proj.weight"],
        "lm_head": ["lm_head.weight"],
    }[path.removesuffix(".kernel")]


def stacked(tensors, path):
    return np.concatenate([tensors[name] for name in names(path)])


def channels(tensors, name, suffix="_scale"):
    """A scale for each row of a matrix, in float32."""
    scale = tensors[f"{name}{suffix}"].astype(np.float32)
    return np.broadcast_to(scale.reshape(-1), tensors[name].shape[:1])


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_are_those_of_a_plain_reading(tmp_path, name, dtype, caplog):
    """Also where the shards keep weights and scales apart, and blocks of reading cut across blocks of scales."""
    _, wanted = write(tmp_path / "hf", name, shards=3)
    report = convert(
        tmp_path / "hf", tmp_path / "out", dtype=dtype, verify=True, config=ConvertConfig(block_numbers=5 * 160)
    )
    found = read_all(tmp_path / "out")
    kernels = [path for path in found if path.endswith(".kernel")]
    assert len(kernels) >= 4
    for path in kernels:
        exact = stacked(wanted, path)
        np.testing.assert_array_equal(found[path], exact.astype(found[path].dtype), err_msg=path)
        assert found[path].dtype.name == dtype
    assert (report.dtype, report.verified, report.tensors) == (dtype, True, len(wanted))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    loaded = load(tmp_path / "hf", dtype)
    for path, array in zip(loaded.spec.names, loaded.weights, strict=True):
        np.testing.assert_array_equal(np.asarray(array), found[path], err_msg=path)
    assert caplog.messages == []


@pytest.mark.parametrize("name", KEPT)
def test_what_is_stored_as_our_kernels_are_is_kept_to_the_bit(tmp_path, name, caplog):
    tensors, _ = write(tmp_path / "hf", name)
    convert(tmp_path / "hf", tmp_path / "out", quantize=KEPT[name], verify=True)
    found = read_all(tmp_path / "out")
    small = [path for path, array in found.items() if array.dtype == tiny_checkpoints.STORED[KEPT[name]]]
    assert len(small) == 4
    for path in small:
        np.testing.assert_array_equal(found[path].view(np.uint8), stacked(tensors, path).view(np.uint8))
        scale = np.concatenate([channels(tensors, each) for each in names(path)])
        np.testing.assert_array_equal(found[path.replace("kernel", "scale")], scale)
    one, other = load(tmp_path / "hf", quantize=KEPT[name]), load(tmp_path / "out")
    assert one.config == other.config
    assert one.weights_digest() == other.weights_digest()
    assert caplog.messages == []


@pytest.mark.parametrize(("name", "quantize"), [("qwen", "fp8"), ("per-channel", "int8"), ("int8", "fp8")])
def test_what_is_rounded_again_says_by_how_much(tmp_path, name, quantize, caplog):
    _, wanted = write(tmp_path / "hf", name)
    convert(tmp_path / "hf", tmp_path / "out", quantize=quantize, verify=True)
    found, errors = read_all(tmp_path / "out"), []
    for path in [path for path, array in found.items() if array.dtype == tiny_checkpoints.STORED[quantize]]:
        exact = stacked(wanted, path)
        kernel, scale = quantize_kernel(exact, quantize)
        np.testing.assert_array_equal(found[path].view(np.uint8), kernel.view(np.uint8))
        np.testing.assert_array_equal(found[path.replace("kernel", "scale")], scale)
        moved = kernel.astype(np.float64) * scale[:, None] - exact
        errors.append(np.linalg.norm(moved, axis=1) / np.linalg.norm(exact.astype(np.float64), axis=1))
    error = np.concatenate(errors)
    (said,) = caplog.messages
    assert f"was rounded again: relative error of a channel {error.mean():.2%} on average, {error.max():.2%} at" in said
    assert 0 < error.mean() < error.max() < 0.1
    caplog.clear()
    assert load(tmp_path / "hf", quantize=quantize).weights_digest() == load(tmp_path / "out").weights_digest()
    assert caplog.messages == [said]


def test_the_command_line_says_so_once(tmp_path, capsys, caplog):
    write(tmp_path / "hf", "qwen")
    assert cli.main(["convert", str(tmp_path / "hf"), str(tmp_path / "out"), "--quantize", "int8"]) == 0
    said = capsys.readouterr().err
    assert said.startswith("notice: ")
    assert said.count("\n") == 1
    assert caplog.messages == [], "the root logger, which may have a handler, hears nothing of it"


def test_a_kernel_of_parts_that_are_stored_differently(tmp_path, caplog):
    """Queries stay in bfloat16 and are rounded; keys and values are kept; a quantised head is read, or kept, too."""
    raw, config, how, _ = LAYOUTS["per-channel"]
    plain = tiny_checkpoints.random_tensors(raw, dtype="bfloat16")
    tensors = quantised(plain, **how, skip=("q_proj", "embed_tokens"))
    write_quantised(tmp_path / "hf", raw, config | {"ignore": ["re:.*q_proj"]}, tensors)
    convert(tmp_path / "hf", tmp_path / "out", quantize="fp8", verify=True)
    convert(tmp_path / "hf", tmp_path / "head", quantize="fp8", quantize_head=True, verify=True)
    found, head = read_all(tmp_path / "out"), read_all(tmp_path / "head")
    kernel, scale = quantize_kernel(plain[Q_PROJ], "fp8")
    rows = len(kernel)
    qkv, scales = found["layers.0.attention.qkv_proj.kernel"], found["layers.0.attention.qkv_proj.scale"]
    np.testing.assert_array_equal(qkv[:rows].view(np.uint8), kernel.view(np.uint8))
    np.testing.assert_array_equal(scales[:rows], scale)
    for path in names("layers.0.attention.qkv_proj")[1:]:
        np.testing.assert_array_equal(qkv[rows : rows + len(tensors[path])], tensors[path])
        rows += len(tensors[path])
    wanted = plain_reading(tensors)["lm_head.weight"]
    np.testing.assert_array_equal(found["lm_head.kernel"], wanted.astype(found["lm_head.kernel"].dtype))
    np.testing.assert_array_equal(head["lm_head.kernel"], tensors["lm_head.weight"])
    assert caplog.messages == []


def test_scales_of_activations_and_caches_are_not_used(tmp_path, caplog):
    raw, config, how, _ = LAYOUTS["per-channel"]
    tensors = quantised(tiny_checkpoints.random_tensors(raw, dtype="bfloat16"), **how)
    beside = {
        "model.layers.0.self_attn.k_scale": np.ones(1, np.float32),
        "model.layers.0.self_attn.v_scale": np.ones(1, np.float32),
        "model.layers.0.self_attn.k_proj.output_scale": np.ones((), np.float32),
        "model.layers.0.self_attn.k_proj.input_scale": np.ones((), np.float32),
    }
    write_quantised(tmp_path / "hf", raw, config, tensors)
    convert(tmp_path / "hf", tmp_path / "out")
    assert caplog.messages == []
    write_quantised(tmp_path / "hf", raw, config | {"kv_cache_scheme": {"num_bits": 8}}, tensors | beside)
    convert(tmp_path / "hf", tmp_path / "again")
    assert len(caplog.messages) == 1
    assert "scales of a quantised cache are not used" in caplog.text
    assert "is one of 3" in caplog.text
    one, other = read_all(tmp_path / "out"), read_all(tmp_path / "again")
    assert all(np.array_equal(array, other[path]) for path, array in one.items())


def refused(folder, **options):
    """What a conversion says that fails; nothing may be left of it."""
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(UserError) as error:
        convert(folder, folder.parent / "out", **options)
    assert sorted(folder.parent.rglob("*")) == before
    message = str(error.value)
    assert "\n" not in message
    with pytest.raises(UserError) as error:
        load(folder, options.get("dtype"), quantize=options.get("quantize"))
    assert str(error.value) == message
    return message


def rows(count):
    return np.ones((count, 1), np.float32)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({f"{UP}_scale": None}, f": missing: the scale of {UP}$"),
        ({f"{UP}_scale": rows(47)}, rf": misshapen: {UP}_scale \(47×1 instead of 1 or 48×1\)$"),
        ({f"{UP}_scale": rows(48).astype(np.int8)}, rf": unsupported dtype: {UP}_scale \(I8\)$"),
        ({f"{UP}_scale_inv": rows(48)}, f": more than one scale: {UP}$"),
        ({UP: None}, f": scale without a weight: {UP}_scale; missing: {UP}$"),
        ({UP: np.ones((48, 32), np.float16)}, rf"no matrix of e4m3 or int8: {UP}_scale \({UP} is F16, 48×32\)$"),
        ({UP: np.ones((32, 48), np.int8)}, rf": misshapen: {UP}_scale \(48×1 instead of 1 or 32×1\)$"),
        ({"model.norm.weight_scale": rows(32)}, r"model\.norm\.weight_scale \(model\.norm\.weight is BF16, 32\)$"),
        ({"lm_head.weight": np.ones((96, 32), np.int8)}, r": missing: the scale of lm_head\.weight$"),
        ({"model.layers.0.mlp.up_proj.weight_zero_point": rows(48)}, r": extra: .*up_proj\.weight_zero_point$"),
        ({"model.layers.0.mlp.up_proj.weight_packed": rows(48)}, r"quantised checkpoints \(.*weight_packed is one"),
    ],
)  # fmt: skip
def test_scales_and_weights_that_do_not_fit(tmp_path, changes, told):
    tensors, _ = write(tmp_path / "hf", "per-channel")
    kept = {name: array for name, array in (tensors | changes).items() if array is not None}
    tiny_checkpoints.write_shards(tmp_path / "hf", kept)
    assert re.search(told, refused(tmp_path / "hf"))


def test_blocks_have_a_grid_of_scales(tmp_path):
    tensors, _ = write(tmp_path / "hf", "qwen")
    name = f"{UP}_scale_inv"
    tiny_checkpoints.write_shards(tmp_path / "hf", tensors | {name: tensors[name].T.copy()})
    assert f": misshapen: {name} (2×3 instead of 1 or 272×1 or 3×2)" in refused(tmp_path / "hf")


def test_numbers_that_are_not_finite(tmp_path):
    tensors, _ = write(tmp_path / "hf", "per-channel")
    for name, value in ((UP, tensors[UP].copy()), (f"{UP}_scale", tensors[f"{UP}_scale"].copy())):
        value[3, 0] = np.nan
        tiny_checkpoints.write_shards(tmp_path / "hf", tensors | {name: value})
        for quantize in ("fp8", "int8"):
            assert refused(tmp_path / "hf", quantize=quantize) == (
                f"{UP}: a weight is NaN or infinite, and has no scale in 8 bits"
            )
        with pytest.raises(UserError, match=rf"not finite .*: {UP}$"):
            convert(tmp_path / "hf", tmp_path / "out", verify=True)


def test_a_shard_that_is_lost_is_told_alone(tmp_path):
    write(tmp_path / "hf", "per-channel", shards=2)
    (tmp_path / "hf" / "model-00001-of-00002.safetensors").unlink()
    assert refused(tmp_path / "hf") == f"{tmp_path / 'hf'}: missing file: model-00001-of-00002.safetensors"


FLOAT4 = compressed_tensors(num_bits=4, strategy="tensor_group", group_size=16) | {"format": "nvfp4-pack-quantized"}
INT4 = compressed_tensors("int8", num_bits=4, strategy="group", group_size=128) | {"format": "pack-quantized"}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"quant_method": "gptq", "bits": 8}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt"),
        ({"quant_method": "fbgemm_fp8"}, "fbgemm_fp8"),
        (block_fp8(128, 128) | {"fmt": "e5m2"}, "fp8, e5m2"),
        (FLOAT4, "compressed-tensors, nvfp4-pack-quantized, 4 bits of float, strategy tensor_group"),
        (INT4, "compressed-tensors, pack-quantized, 4 bits of int, strategy group"),
        (compressed_tensors(strategy="group", group_size=32), "8 bits of float, strategy group"),
        (compressed_tensors("int8", symmetric=False), "8 bits of int, strategy channel, not symmetric"),
        (compressed_tensors("int8") | {"format": "pack-quantized"}, "pack-quantized, 8 bits of int, strategy channel"),
        (compressed_tensors() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        (compressed_tensors() | {"transform_config": {"config_groups": {"u": {}}}}, "with transforms"),
    ],
)  # fmt: skip
def test_other_methods_are_refused_by_name(tmp_path, config, told):
    write(tmp_path / "hf", "per-channel")
    raw = json.loads((tmp_path / "hf" / "config.json").read_text()) | {"quantization_config": config}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(raw))
    message = refused(tmp_path / "hf")
    assert f"{told})" in message
    assert "(quantization_config: " in message


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (block_fp8(128), "weight_block_size must be two positive integers, not [128]"),
        (block_fp8(0, 128), "weight_block_size must be two positive integers"),
        (compressed_tensors(strategy="block"), "block_structure must be two positive integers, not None"),
        ({"quant_method": "compressed-tensors"}, "config_groups must be an object of objects, not None"),
        ({"quant_method": "lychee", "quantize": "int8", "quantize_head": False}, "is said of converted folders alone"),
        ({"quant_method": "lychee", "quantize": "int3"}, "which this version does not read"),
    ],
)  # fmt: skip
def test_configs_that_say_nothing_sensible(tmp_path, config, told):
    write(tmp_path / "hf", "per-channel")
    raw = json.loads((tmp_path / "hf" / "config.json").read_text()) | {"quantization_config": config}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(raw))
    assert told in refused(tmp_path / "hf")


def test_the_config_of_old_checkpoints_has_another_key(tmp_path):
    _, wanted = write(tmp_path / "hf", "per-channel")
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    raw["compression_config"] = raw.pop("quantization_config")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(raw))
    convert(tmp_path / "hf", tmp_path / "out", dtype="float32")
    path = "layers.0.mlp.gate_up_proj.kernel"
    np.testing.assert_array_equal(read_all(tmp_path / "out")[path], stacked(wanted, path))
    assert "compression_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
