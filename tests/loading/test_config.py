"""Reading `config.json`: two dialects of one meaning, Hugging Face's defaults, refusals that name their reason."""

import copy
import dataclasses
import json
import math
from typing import Any

import pytest

from lychee_jax.config import ModelConfig, RopeConfig, token_ids
from lychee_jax.errors import UserError
from lychee_jax.quantization_config import converted_quantization
from tests.support.tiny_checkpoints import TINY, block_fp8, compressed_tensors

FAMILIES = sorted(TINY)
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def read(family: str = "llama", without: tuple[str, ...] = (), **changes) -> ModelConfig:
    raw = TINY[family] | changes
    return ModelConfig.from_hf({key: value for key, value in raw.items() if key not in without})


def refusal(family: str = "llama", without: tuple[str, ...] = (), **changes) -> str:
    with pytest.raises(UserError) as caught:
        read(family, without, **changes)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


# What the checkpoints' own files say, as published.
LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192},
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
QWEN3_8B = {
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_llama_31_8b():
    assert ModelConfig.from_hf(LLAMA_31_8B) == ModelConfig(
        family="llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rope=RopeConfig("llama3", theta=5e5, factor=8.0, original_max_position_embeddings=8192),
        rms_norm_eps=1e-5,
        dtype="bfloat16",
        bos_token_id=128000,
        eos_token_ids=(128001, 128008, 128009),
    )


def test_qwen3_8b():
    assert ModelConfig.from_hf(QWEN3_8B) == ModelConfig(
        family="qwen3",
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope=RopeConfig(theta=1e6),
        rms_norm_eps=1e-6,
        qk_norm=True,
        dtype="bfloat16",
        bos_token_id=151643,
        eos_token_ids=(151645,),
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 2},
        {"type": "dynamic", "factor": 2.5},
        YARN | {"beta_fast": 16, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False},
        LLAMA3 | {"original_max_position_embeddings": 64},
    ],
    ids=lambda scaling: str((scaling or {}).get("rope_type", (scaling or {}).get("type"))),
)
def test_both_dialects_mean_the_same(family, scaling):
    old = read(family, rope_theta=5000, rope_scaling=scaling, torch_dtype="float16")
    new = read(family, rope_parameters={"rope_theta": 5000.0, **(scaling or {})}, dtype="float16")
    assert old == new
    assert old.fingerprint() == new.fingerprint()
    assert old.rope.theta == 5000.0


@pytest.mark.parametrize(("family", "length"), [("llama", 2048), ("qwen2", 32768), ("qwen3", 32768)])
def test_absent_keys_take_the_defaults_of_the_model_class(family, length):
    sizes = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = ModelConfig.from_hf({key: TINY[family][key] for key in sizes})
    assert config == ModelConfig(
        family=family,
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=128 if family == "qwen3" else 8,
        max_position_embeddings=length,
        rope=RopeConfig(theta=10000.0),
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        dtype="float32",
        bos_token_id=1 if family == "llama" else None,
        eos_token_ids=(2,) if family == "llama" else (),
    )


@pytest.mark.parametrize(("family", "expected"), [("llama", 8), ("qwen2", 8), ("qwen3", 128)])
def test_head_dim(family, expected):
    assert read(family, without=("head_dim",)).head_dim == expected
    assert read(family, head_dim=None).head_dim == expected
    assert read(family, head_dim=24).head_dim == 24
    # The width need not be a multiple of the heads if head_dim says so itself.
    assert read(family, head_dim=24, hidden_size=30).head_dim == 24


def test_kv_heads_and_groups():
    assert read(without=("num_key_value_heads",)).num_kv_heads == 4
    assert read(num_key_value_heads=None).num_kv_heads == 4
    assert [read(num_key_value_heads=count).groups for count in (4, 2, 1)] == [1, 2, 4]


@pytest.mark.parametrize(
    ("family", "changes", "qkv", "out", "mlp"),
    [
        ("llama", {}, False, False, False),
        ("llama", {"attention_bias": True}, True, True, False),
        ("llama", {"mlp_bias": True}, False, False, True),
        ("qwen2", {}, True, False, False),
        # The Qwen classes know no such keys: their biases are fixed.
        ("qwen2", {"attention_bias": False, "mlp_bias": True}, True, False, False),
        ("qwen2", {"attention_bias": True}, True, False, False),
        ("qwen3", {}, False, False, False),
        ("qwen3", {"attention_bias": True, "mlp_bias": True}, True, True, False),
    ],
)
def test_biases(family, changes, qkv, out, mlp):
    config = read(family, **changes)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (qkv, out, mlp)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(7, (7,)), ([7, 9, 7], (7, 9)), (None, ()), ([], ()), (0, (0,)), (-1, ()), (10**6, (10**6,))],
)
def test_eos(value, expected):
    assert read(eos_token_id=value).eos_token_ids == expected


@pytest.mark.parametrize("value", ["</s>", 2.0, True, [1, None], {"id": 2}])
def test_token_ids_of_a_wrong_type(value):
    with pytest.raises(UserError, match="eos_token_id must be an integer, a list of integers or null"):
        token_ids(value, "eos_token_id")


def test_dtype():
    assert read(torch_dtype="bfloat16").dtype == "bfloat16"
    assert read(torch_dtype="bfloat16", dtype="float32").dtype == "float32"
    assert read(torch_dtype="bfloat16", dtype=None).dtype == "bfloat16"


def test_rope_parameters_are_found_where_they_are():
    assert read(rope_theta=None, rope_scaling=None).rope == RopeConfig(theta=10000.0)
    assert read(rope_scaling={}, rope_parameters={"rope_theta": 77}).rope.theta == 77
    assert read(rope_theta=5, rope_parameters={"rope_theta": 77}).rope.theta == 77
    assert read(rope_theta=5, rope_parameters={"rope_type": "default"}).rope.theta == 5
    # A transformers 5 file to which someone has added what model cards of version 4 tell them to add.
    both = read(rope_parameters={"rope_theta": 77, "rope_type": "default"}, rope_scaling=YARN).rope
    assert (both.kind, both.theta, both.factor) == ("yarn", 77, 4)
    assert read(rope_scaling={"type": "linear", "rope_type": "dynamic", "factor": 2}).rope.kind == "dynamic"


@pytest.mark.parametrize("kind", ["yarn", "llama3", "linear", "dynamic"])
def test_original_length(kind):
    rope = LLAMA3 | {"rope_type": kind}

    def original(**changes) -> int:
        return read(**changes).rope.original_max_position_embeddings

    assert original(rope_scaling=rope) == 512
    assert original(rope_scaling=rope | {"original_max_position_embeddings": 64}) == 64
    assert original(rope_scaling=rope, original_max_position_embeddings=32) == 32
    within = rope | {"original_max_position_embeddings": 64}
    assert original(rope_scaling=within, original_max_position_embeddings=32) == 32
    assert original(rope_scaling=within, original_max_position_embeddings=None) == 64


def test_yarn_options():
    # The factor is taken as written, whatever the lengths are.
    assert read(rope_scaling=YARN | {"factor": 7}).rope.factor == 7
    options = {"attention_factor": 1.25, "mscale": 0.7, "mscale_all_dim": 1, "beta_fast": 20, "beta_slow": 2}
    rope = read(rope_scaling=YARN | options | {"truncate": False}).rope
    assert rope == RopeConfig(
        "yarn", factor=4.0, original_max_position_embeddings=256, attention_factor=1.25, mscale=0.7,
        mscale_all_dim=1.0, beta_fast=20.0, beta_slow=2.0, truncate=False,
    )  # fmt: skip
    empty = dict.fromkeys([*options, "truncate"])
    assert read(rope_scaling=YARN | empty).rope == read(rope_scaling=YARN).rope
    assert read(rope_scaling=YARN | {"beta_fast": 0}).rope.beta_fast == 32


def test_longrope_is_read_where_one_list_serves_all_lengths():
    factors = [1 + pair / 2 for pair in range(4)]
    rope = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
    config = read(rope_scaling=rope, rope_theta=500.0)
    assert config.rope == RopeConfig("longrope", theta=500.0, factors=tuple(factors))
    assert config.max_tokens == config.max_position_embeddings
    assert config.fingerprint() != read(rope_theta=500.0).fingerprint()
    for change, reason in (
        ({"short_factor": [1, 1, 1, 1]}, "short_factor equal to long_factor"),
        ({"attention_factor": None}, "attention_factor of 1"),
        ({"long_factor": [1, 2], "short_factor": [1, 2]}, "a factor for each of 4 frequencies, not 2"),
        ({"long_factor": [0] * 4, "short_factor": [0] * 4}, "longrope factor must be positive"),
        ({"long_factor": ["1"] * 4, "short_factor": ["1"] * 4}, "longrope factor must be a number"),
    ):
        with pytest.raises(UserError, match=reason):
            read(rope_scaling=rope | change)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, 512),
        (LLAMA3 | {"original_max_position_embeddings": 64}, 512),
        ({"type": "linear", "factor": 3}, 1536),
        ({"type": "dynamic", "factor": 2}, 1024),
        (YARN, 1024),
        (YARN | {"factor": 1.5}, 512),
        ({"type": "linear", "factor": 4.35, "original_max_position_embeddings": 1000}, 4350),
    ],
)
def test_max_tokens(scaling, expected):
    assert read(rope_scaling=scaling).max_tokens == expected


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_sliding_window_counts_only_where_a_layer_slides(family):
    full = read(family)
    assert read(family, use_sliding_window=False, sliding_window=8, max_window_layers=0) == full
    assert read(family, sliding_window=8, max_window_layers=0) == full
    assert read(family, use_sliding_window=False, layer_types=["sliding_attention"] * 2) == full
    assert read(family, use_sliding_window=True, sliding_window=8, max_window_layers=2) == full
    assert read(family, use_sliding_window=True, sliding_window=8, layer_types=["full_attention"] * 2) == full
    assert read(family, use_sliding_window=True, sliding_window=None, max_window_layers=0) == full
    assert read(family, use_sliding_window=True, sliding_window=8) == full  # 28 layers come first by default

    one = refusal(family, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert "sliding_window 8 in 1 of 2 layers, from layer 1" in one
    assert "in 2 of 2" in refusal(family, use_sliding_window=True, sliding_window=8, max_window_layers=0)
    types = ["full_attention", "sliding_attention"]
    assert "in 1 of 2" in refusal(family, use_sliding_window=True, sliding_window=8, layer_types=types)
    # layer_types decide where both are given.
    full_types = ["full_attention"] * 2
    assert read(family, use_sliding_window=True, sliding_window=8, layer_types=full_types, max_window_layers=0) == full


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral' is not supported"),
        ({"model_type": "qwen3_moe"}, "mixture-of-experts"),
        ({"model_type": "mixtral"}, "mixture-of-experts"),
        ({"model_type": None}, "model_type must be a string"),
        ({"num_local_experts": 8}, "num_local_experts = 8"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config: awq"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor 0.25"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, "rope type 'longrope'"),
        ({"rope_scaling": {"type": "su"}}, "rope type 'su'"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": None}},
            "for each layer type ('full_attention')",
        ),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer type 'chunked_attention'"),
        ({"layer_types": ["full_attention"]}, "each of the 2 layers"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'"),
        ({"num_key_value_heads": 3}, "attention heads (4) must be a multiple of the number of key-value heads (3)"),
        ({"num_key_value_heads": 8}, "must be a multiple"),
        ({"num_attention_heads": 3, "num_key_value_heads": 1}, "hidden_size (32) must be a multiple of"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"hidden_size": "32"}, "hidden_size must be an integer of at least 1, not '32'"),
        ({"vocab_size": 0}, "vocab_size must be an integer of at least 1, not 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be positive"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object or null"),
        ({"rope_theta": -1.0}, "rope_theta must be positive"),
        ({"rope_theta": 1}, "rope_theta must be greater than 1"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing (linear rope needs it)"),
        ({"rope_scaling": {"type": "dynamic", "factor": None}}, "factor is missing (dynamic rope needs it)"),
        ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 64}}, "factor is missing (yarn"),
        ({"rope_scaling": {"type": "llama3", "factor": 2}}, "low_freq_factor is missing (llama3 rope needs it)"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "must be greater than low_freq_factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be positive"),
        ({"rope_scaling": YARN | {"attention_factor": -1}}, "attention_factor must be positive"),
        ({"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2}}, "dynamic rope needs a head_dim"),
    ],
)
def test_refusals_name_their_reason(changes, told):
    assert told in refusal(**changes)


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
)
def test_missing_sizes(key):
    assert refusal(without=(key,)) == f"{key} is missing"


JSON_VALUES: list[Any] = [
    None, True, "x", "", -1, 0, 1, 2.5, 10**400, math.nan, math.inf, [], ["x"], [1], {}, {"a": 1}, {"a": {}},
]  # fmt: skip


def test_any_json_value_gives_a_config_or_one_line():
    """Every key of a rich config takes every kind of JSON value: nothing but a UserError may come of it."""
    rich = TINY["qwen3"] | {
        "use_sliding_window": True,
        "sliding_window": None,
        "max_window_layers": 2,
        "layer_types": ["full_attention"] * 2,
        "original_max_position_embeddings": 64,
        "rope_theta": 1e4,
        "rope_scaling": YARN | {"beta_slow": 1, "attention_factor": 1.0, "mscale": 1.0, "truncate": True},
        "rope_parameters": dict(LLAMA3),
        "partial_rotary_factor": 1.0,
        "dtype": "float32",
        "eos_token_id": [1],
        "bos_token_id": 1,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "quantization_config": None,
    }
    read_count, messages = 0, []
    for place in (None, "rope_scaling", "rope_parameters"):
        for key in rich if place is None else rich[place]:
            for value in JSON_VALUES:
                raw = copy.deepcopy(rich)
                if place == "rope_parameters":
                    del raw["rope_scaling"]
                (raw if place is None else raw[place])[key] = value
                try:
                    ModelConfig.from_hf(raw)
                    read_count += 1
                except UserError as error:
                    messages.append(str(error))
    assert read_count > 50
    assert not [message for message in messages if not message or "\n" in message]


@pytest.mark.parametrize(
    "config",
    [
        block_fp8(128, 128),
        compressed_tensors(strategy="block", block_structure=[128, 128]) | {"sparsity_config": {"format": "dense"}},
        converted_quantization("int8", quantize_head=True),
    ],
    ids=["fp8", "compressed-tensors", "converted"],
)
def test_any_json_value_about_quantization_gives_a_config_or_one_line(config):
    """At every depth: the method's own keys, those of a group of weights, and those of its weights."""

    def places(value, path=()):
        if isinstance(value, dict):
            for key, each in value.items():
                yield (*path, key)
                yield from places(each, (*path, key))

    assert read(quantization_config=config).quantize == config.get("quantize")
    read_count, messages = 0, []
    for *path, key in places({"quantization_config": config}):
        for value in JSON_VALUES:
            changed = copy.deepcopy({"quantization_config": config})
            place = changed
            for step in path:
                place = place[step]
            place[key] = value
            try:
                read(**changed)
                read_count += 1
            except UserError as error:
                messages.append(str(error))
    assert read_count > 5
    assert not [message for message in messages if not message or "\n" in message]


def test_fingerprint():
    config = read("qwen3")
    # Head maps in people's folders hold this value: it must not change from one release to the next.
    assert config.fingerprint() == "924a6efa8cfa2e55d7a8f9f82dc196e6b306f24791c70ef7f2430908b6dbd230"
    same = dataclasses.replace(config, dtype="bfloat16", eos_token_ids=(5,), bos_token_id=3, quantize="fp8")
    assert same.fingerprint() == config.fingerprint()
    others = [
        read("qwen3", num_hidden_layers=3),
        read("qwen3", rope_theta=20000),
        read("qwen3", rope_scaling=YARN),
        read("qwen3", attention_bias=True),
        read("llama", head_dim=16),
    ]
    assert len({config.fingerprint(), *(other.fingerprint() for other in others)}) == 6


def test_config_is_hashable_and_frozen():
    config = read()
    assert hash(config) == hash(read())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_from_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_31_8B))
    assert ModelConfig.from_folder(tmp_path) == ModelConfig.from_hf(LLAMA_31_8B)
    assert ModelConfig.from_folder(str(tmp_path)) == ModelConfig.from_hf(LLAMA_31_8B)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "not a checkpoint"),
        (b"{", "config.json is not valid JSON"),
        (b"\xff\xfe", "config.json is not UTF-8 text"),
        (b"", "config.json is not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1]", "must be a JSON object, not list"),
        (b'{"model_type": "gpt2"}', "model_type 'gpt2' is not supported"),
    ],
)
def test_folders_that_hold_no_config(tmp_path, content, told):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=told) as caught:
        ModelConfig.from_folder(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        ModelConfig.from_folder(tmp_path / "nowhere")
