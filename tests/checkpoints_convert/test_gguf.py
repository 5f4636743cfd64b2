"""GGUF files become the folder that their Hugging Face checkpoint becomes, or are refused by name."""

import json
import math

import numpy as np
import pytest
from safetensors.numpy import load_file

from checkpoints_convert import convert, store
from checkpoints_convert.config import ConvertConfig
from checkpoints_convert.verify import verify
from checkpoints_convert.weights import Weights
from lychee_jax.config import ModelConfig
from lychee_jax.engine.options import GenerateOptions
from lychee_jax.errors import UserError
from lychee_jax.llm import LLM
from lychee_jax.loading import load, read_config
from lychee_jax.models.rope import inverse_frequencies
from lychee_jax.models.spec import ModelSpec
from tests.support import tiny_checkpoints
from tests.support.golden import GOLDEN, golden_model, golden_prompts
from tests.support.hybrid_models import small_chunks
from tests.support.tiny_gguf import write_gguf

# Rows of whole blocks: 32 numbers of most types, 256 of the K types.
LLAMA, QWEN2, QWEN3 = (
    tiny_checkpoints.TINY[family] | {"intermediate_size": 64} for family in ("llama", "qwen2", "qwen3")
)
WIDE = LLAMA | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
SMALL = LLAMA | {"num_hidden_layers": 1}


def read_all(folder):
    weights = folder / store.WEIGHTS
    return store.read(weights, store.shapes(weights))


def k_types(name):
    kinds = {"q_proj": "Q2_K", "k_proj": "Q3_K", "v_proj": "Q4_K", "o_proj": "Q5_K", "down_proj": "Q6_K"}
    return next((kind for module, kind in kinds.items() if module in name), "F16")


@pytest.mark.parametrize(
    ("raw", "matrices", "dtype"),
    [
        (LLAMA, "F32", "float32"),
        (LLAMA | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}, "F16", "float16"),
        (LLAMA | {"tie_word_embeddings": True, "head_dim": 16}, "BF16", "bfloat16"),
        (QWEN2, "Q8_0", "bfloat16"),
        (QWEN3, "Q4_0", "bfloat16"),
        (QWEN3 | {"tie_word_embeddings": True}, "Q5_1", "bfloat16"),
        (WIDE, k_types, "bfloat16"),
    ],
    ids=["llama-f32", "llama-biases-f16", "llama-tied-bf16", "qwen2-q8_0", "qwen3-q4_0", "qwen3-tied-q5_1", "llama-k"],
)
def test_the_same_weights_as_of_the_hugging_face_folder(tmp_path, raw, matrices, dtype):
    """Numbers that the file holds, in a Hugging Face folder and in GGUF: one conversion, to the bit."""
    raw = raw | {"rms_norm_eps": 1e-5, "rope_theta": 50000.0, "bos_token_id": None, "eos_token_id": None}
    tensors = tiny_checkpoints.random_tensors(raw)
    held = write_gguf(tmp_path / "m.gguf", raw, tensors, matrices=matrices)
    tiny_checkpoints.write_checkpoint(tmp_path / "hf", raw | {"torch_dtype": dtype})
    tiny_checkpoints.write_shards(tmp_path / "hf", held)
    blocks = ConvertConfig(block_numbers=1 << 10)  # several to a tensor
    report = convert(tmp_path / "m.gguf", tmp_path / "gguf-out", verify=True, config=blocks)
    assert (report.dtype, report.tensors) == (dtype, len(tensors))
    convert(tmp_path / "hf", tmp_path / "hf-out")
    found, wanted = read_all(tmp_path / "gguf-out"), read_all(tmp_path / "hf-out")
    assert found.keys() == wanted.keys()
    for path, array in wanted.items():
        assert found[path].dtype == array.dtype == dtype
        np.testing.assert_array_equal(found[path], array, err_msg=path)
    assert ModelConfig.from_folder(tmp_path / "gguf-out") == ModelConfig.from_folder(tmp_path / "hf-out")
    convert(tmp_path / "m.gguf", tmp_path / "full", dtype="float32", verify=True)
    for path, array in read_all(tmp_path / "full").items():
        np.testing.assert_array_equal(array.astype(wanted[path].dtype), wanted[path], err_msg=path)


def test_split_files_are_read_whole_whichever_part_is_named(tmp_path):
    tensors = tiny_checkpoints.random_tensors(LLAMA)
    write_gguf(tmp_path / "m.gguf", LLAMA, tensors)
    write_gguf(tmp_path / "s.gguf", LLAMA, tensors, split_max_tensors=12)
    first, second = sorted(tmp_path.glob("s-*.gguf"))
    convert(tmp_path / "m.gguf", tmp_path / "whole")
    wanted = read_all(tmp_path / "whole")
    for part in (first, second):
        convert(part, tmp_path / "out", verify=True, overwrite=True)
        found = read_all(tmp_path / "out")
        assert all(np.array_equal(found[path], array) for path, array in wanted.items())
    second.rename(tmp_path / "kept")
    assert f"missing file: {second.name}" in refused(first)
    (tmp_path / "kept").rename(second)
    first.rename(tmp_path / "renamed.gguf")
    assert "is one of 2 parts" in refused(tmp_path / "renamed.gguf")
    (tmp_path / "renamed.gguf").rename(first)
    second.write_bytes((tmp_path / "m.gguf").read_bytes())
    assert "is in two parts" in refused(first)


ROPES = {
    "linear-v4": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 3.0},
    "yarn-v4": {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 32,
    },
    "llama3-v4": {},
}


def llama3_factors(rope, head_dim):
    """What Hugging Face's llama3 scaling divides each frequency by, as converters to GGUF store it."""
    original, factors = rope["original_max_position_embeddings"], []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * pair / head_dim)
        smooth = (original / wavelength - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        smooth = min(1.0, max(0.0, smooth))
        factors.append(1 / (smooth + (1 - smooth) / rope["factor"]))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("case", ROPES)
def test_rope_scaling_is_what_the_hugging_face_config_means(tmp_path, case):
    """The golden models' configs and weights; of the one whose frequencies have factors also what transformers made."""
    raw = json.loads((GOLDEN / case / "config.json").read_text())
    more = {}
    if case == "llama3-v4":
        more["rope_freqs.weight"] = llama3_factors(
            raw["rope_scaling"] | {"rope_theta": raw["rope_theta"]}, raw["head_dim"]
        )
    tensors = load_file(GOLDEN / case / "model.safetensors")
    write_gguf(tmp_path / "m.gguf", raw, tensors, metadata=ROPES[case], more_tensors=more)
    convert(tmp_path / "m.gguf", tmp_path / "out", verify=True)
    model, golden = load(tmp_path / "out"), golden_prompts(case)
    (_, found), (_, wanted) = (ModelSpec.split(each) for each in (model.model, golden_model(case)))
    assert all(np.array_equal(array, other) for array, other in zip(found, wanted, strict=True))
    original = ModelConfig.from_folder(GOLDEN / case)
    assert model.config.max_tokens == original.max_tokens
    if case != "llama3-v4":
        assert model.config.rope == original.rope  # what the golden tests compute with
        return
    np.testing.assert_allclose(
        inverse_frequencies(model.config.rope, 32), inverse_frequencies(original.rope, 32), rtol=2e-7, atol=0
    )
    small = LLM(model.path, model.config, model.model, None, (), engine_config=small_chunks(32))
    options = GenerateOptions("dense", page_size=16, max_new_tokens=len(golden[0].tokens))
    result = small.generate_tokens([prompt.prompt.tolist() for prompt in golden], options)
    for row, prompt in enumerate(golden):
        assert result.tokens[row] == prompt.tokens.tolist()
        logprobs = prompt.token_logits - np.logaddexp.reduce(prompt.token_logits, axis=-1, keepdims=True)
        chosen = np.take_along_axis(logprobs, prompt.tokens[:, None], axis=-1)[:, 0]
        np.testing.assert_allclose(result.logprobs[row], chosen, rtol=0, atol=2e-4)


def converted_rope(folder, metadata, more=None):
    write_gguf(folder / "r.gguf", SMALL, tiny_checkpoints.random_tensors(SMALL), metadata=metadata, more_tensors=more)
    return Weights(folder / "r.gguf").config.rope


def test_rope_metadata_in_its_other_forms(tmp_path):
    key = "llama.rope.scaling"
    assert converted_rope(tmp_path, {}).kind == "default"
    assert converted_rope(tmp_path, {f"{key}.type": "none", f"{key}.factor": 4.0}).kind == "default"
    for old in ({"llama.rope.scale_linear": 4.0}, {f"{key}.factor": 4.0}):  # no type: linear
        rope = converted_rope(tmp_path, old)
        assert (rope.kind, rope.factor) == ("linear", 4)
    rope = converted_rope(tmp_path, {f"{key}.type": "yarn", f"{key}.factor": 2.0, f"{key}.attn_factor": 1.5})
    assert (rope.kind, rope.original_max_position_embeddings) == ("yarn", 512)
    assert rope.attention_factor == pytest.approx(1.5 * (0.1 * math.log(2) + 1))
    ones = {"rope_freqs.weight": np.ones(4, np.float32)}
    assert converted_rope(tmp_path, {}, ones).kind == "default"
    stretched = {"rope_freqs.weight": np.array([1, 1, 2.5, 8], np.float32)}
    assert converted_rope(tmp_path, {}, stretched).factors == (1, 1, 2.5, 8)
    for metadata, more, reason in (
        ({f"{key}.type": "longrope"}, None, "rope scaling 'longrope'"),
        ({f"{key}.factor": 4.0}, stretched, "rope_freqs.weight together with linear"),
        ({f"{key}.factor": 4.0, f"{key}.attn_factor": 2.0}, None, "attn_factor is supported with yarn only"),
        ({f"{key}.type": "yarn", f"{key}.yarn_ext_factor": 0.5}, None, "yarn_ext_factor must be 1"),
        ({}, {"rope_freqs.weight": np.array([1, 2, 4], np.float32)}, "a factor for each of 4 frequencies, not 3"),
        ({}, {"rope_freqs.weight": np.array([1, 2, 4, np.nan], np.float32)}, "longrope factor must be a number"),
    ):
        with pytest.raises(UserError, match=reason):
            converted_rope(tmp_path, metadata, more)


def refused(path, **options):
    """What a conversion says that fails; nothing may be left of it."""
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(UserError) as error:
        convert(path, path.parent / "deep" / "out", **options)
    assert sorted(path.parent.rglob("*")) == before
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (
            {"general.architecture": "gemma3"},
            "architecture 'gemma3' is not supported; supported are llama, qwen2, qwen3",
        ),
        ({"general.type": "adapter"}, "holds no model but a GGUF adapter"),
        ({"llama.expert_count": 8}, "llama.expert_count = 8 is not supported"),
        ({"llama.attention.sliding_window": 4096}, "sliding_window = 4096 is not supported"),
        ({"llama.attention.causal": False}, "causal = False is not supported"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count = 4 is not supported"),
        ({"llama.attention.value_length": 16}, "value_length = 16 is not supported"),
        ({"llama.feed_forward_length": [64, 32]}, "not the same in all layers"),
        ({"llama.block_count": None}, "has no llama.block_count"),
        ({"llama.block_count": "one"}, "llama.block_count must be a whole number"),
        ({"llama.block_count": 2}, "missing: model.layers.1."),
        ({"llama.feed_forward_length": 32}, "model.layers.0.mlp.gate_proj.weight (64×32 instead of 32×32)"),
        ({"llama.attention.head_count": 3}, "must be a multiple of the number of key-value heads"),
    ],
)
def test_models_that_are_not_supported(tmp_path, metadata, reason):
    write_gguf(tmp_path / "m.gguf", SMALL, tiny_checkpoints.random_tensors(SMALL), metadata=metadata)
    assert reason in refused(tmp_path / "m.gguf")


def test_types_and_tensors_that_are_not_supported(tmp_path):
    tensors = tiny_checkpoints.random_tensors(SMALL)
    write_gguf(tmp_path / "m.gguf", SMALL, tensors, more_tensors={"blk.0.attn_sinks.weight": np.ones(4, np.float32)})
    assert "extra: blk.0.attn_sinks.weight" in refused(tmp_path / "m.gguf")
    write_gguf(tmp_path / "t.gguf", SMALL, tensors)
    content = bytearray((tmp_path / "t.gguf").read_bytes())
    place = content.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 2 * 8
    assert content[place : place + 4] == b"\0\0\0\0"  # its type: F32
    for number, reason in (
        (26, "unsupported dtype: model.layers.0.mlp.up_proj.weight (I32)"),
        (9, "unsupported dtype: model.layers.0.mlp.up_proj.weight (Q8_1)"),
        (250, "holds tensors of a type that the gguf package does not know (250)"),
    ):
        content[place] = number
        (tmp_path / "t.gguf").write_bytes(content)
        assert reason in refused(tmp_path / "t.gguf")


def test_files_that_are_no_whole_gguf_files(tmp_path):
    write_gguf(tmp_path / "m.gguf", SMALL, tiny_checkpoints.random_tensors(SMALL))
    content = (tmp_path / "m.gguf").read_bytes()
    for keep in (6, 40, 300, len(content) // 2, len(content) - 5):
        (tmp_path / "cut.gguf").write_bytes(content[:keep])
        assert "cut.gguf is no whole GGUF file" in refused(tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes(b"no")
    assert "is a file; a checkpoint is a folder with config.json and safetensors, or a GGUF file" in refused(
        tmp_path / "cut.gguf"
    )
    (tmp_path / "cut.gguf").unlink()
    assert refused(tmp_path / "cut.gguf") == f"no such file: {tmp_path / 'cut.gguf'}"
    (tmp_path / "folder").mkdir()
    (tmp_path / "m.gguf").rename(tmp_path / "folder" / "m.gguf")
    file = tmp_path / "folder" / "m.gguf"
    assert f"convert one: lychee convert {file} FOLDER" in refused(tmp_path / "folder")
    for read in (load, read_config):
        with pytest.raises(UserError, match=f"is a GGUF file; convert it first: lychee convert {file} FOLDER"):
            read(file)


def test_verify_notices_a_file_that_has_changed_and_numbers_that_are_not_finite(tmp_path):
    tensors = tiny_checkpoints.random_tensors(SMALL)
    write_gguf(tmp_path / "m.gguf", SMALL, tensors)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    weights = Weights(tmp_path / "m.gguf")
    verify(weights, tmp_path / "out", weights.config)
    tensors["model.layers.0.self_attn.q_proj.weight"][5, 7] += 1
    write_gguf(tmp_path / "m.gguf", SMALL, tensors)
    with pytest.raises(UserError, match=r": different: model\.layers\.0\.self_attn\.q_proj\.weight$"):
        verify(weights, tmp_path / "out", weights.config)
    (tmp_path / "m.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"cannot read .*m\.gguf: it ends too early"):
        verify(weights, tmp_path / "out", weights.config)
    tensors["model.norm.weight"][0] = np.nan
    write_gguf(tmp_path / "m.gguf", SMALL, tensors)
    assert "not finite (NaN or infinity): model.norm.weight" in refused(tmp_path / "m.gguf", verify=True)
