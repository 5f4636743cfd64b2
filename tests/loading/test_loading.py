"""Loading: the same weights from either kind of folder, errors of one line, and the short Python API."""

import dataclasses
import functools
import json
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoints_convert import convert
from lychee_jax.attention.head_map import HeadMap
from lychee_jax.config import ModelConfig
from lychee_jax.errors import UserError
from lychee_jax.loading import BUNDLED, load
from lychee_jax.models.spec import ModelSpec
from lychee_jax.text.tokenizer import Tokenizer
from tests.support import first_format, tiny_checkpoints, tiny_tokenizers
from tests.support.golden import CASES, GOLDEN, golden_model

LLAMA, QWEN3 = (tiny_checkpoints.TINY[family] | {"num_hidden_layers": 2} for family in ("llama", "qwen3"))
TEXTUAL = LLAMA | {"vocab_size": 320, "eos_token_id": 1}
# One page holds every prompt, so that prompts of all lengths share their programs.
NEW: dict[str, Any] = {"page_size": 128, "max_new_tokens": 10}
TEXT = "the dog is no stop " * 4


def leaves(model):
    return {path: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}


def assert_same(one, other):
    one, other = leaves(one), leaves(other)
    assert one.keys() == other.keys()
    for path, array in one.items():
        assert (array.dtype, array.shape) == (other[path].dtype, other[path].shape)
        assert bool(jnp.array_equal(array, other[path])), path


@pytest.mark.parametrize("raw", [LLAMA | {"tie_word_embeddings": True}, QWEN3], ids=["llama-tied", "qwen3"])
@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_both_kinds_of_folder_give_the_same_model(tmp_path, raw, dtype):
    tiny_checkpoints.write_checkpoint(tmp_path / "hf", raw, dtype="bfloat16", shards=2)
    convert(tmp_path / "hf", tmp_path / "converted")
    direct, converted = load(tmp_path / "hf", dtype), load(str(tmp_path / "converted"), dtype)
    assert_same(direct.model, converted.model)
    assert direct.config == converted.config
    assert direct.config.dtype == (dtype or "bfloat16")
    assert {leaf.dtype for leaf in leaves(direct.model).values()} == {jnp.dtype(dtype or "bfloat16")}
    assert converted.path == tmp_path / "converted"


def test_casting_while_loading_is_casting_while_converting(tmp_path):
    tiny_checkpoints.write_checkpoint(tmp_path / "hf", LLAMA)
    convert(tmp_path / "hf", tmp_path / "half", dtype="bfloat16")
    convert(tmp_path / "hf", tmp_path / "full")
    half = load(tmp_path / "half")
    assert half.config.dtype == "bfloat16"
    assert_same(half.model, load(tmp_path / "full", "bfloat16").model)
    assert_same(half.model, load(tmp_path / "hf", "bfloat16").model)


@pytest.mark.parametrize("case", CASES)
def test_golden_checkpoints_load_as_they_were_placed_by_hand(tmp_path, case):
    """The model with these weights is what the golden tests compare with transformers."""
    assert_same(load(GOLDEN / case, "float32").model, golden_model(case))
    if case in ("llama-all-biases", "qwen2.5-tied-g2", "qwen3-g8"):
        convert(GOLDEN / case, tmp_path / "converted")
        assert_same(load(tmp_path / "converted", "float32").model, golden_model(case))


@pytest.mark.parametrize(
    "raw",
    [LLAMA | {"attention_bias": True, "mlp_bias": True}, tiny_checkpoints.TINY["qwen2"], QWEN3],
    ids=["llama-biases", "qwen2-tied", "qwen3"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_folders_of_the_first_format_are_still_read(tmp_path, raw, dtype):
    rng = np.random.default_rng(0)
    shapes = first_format.shapes(ModelConfig.from_hf(raw))
    weights = {path: rng.standard_normal(shape, np.float32) for path, shape in shapes.items()}
    first_format.write(tmp_path / "old", raw | {"dtype": "float32"}, weights)
    spec, found = ModelSpec.split(load(tmp_path / "old", dtype).model)
    wanted = first_format.fused(weights)
    assert set(spec.names) == set(wanted)
    for name, array in zip(spec.names, found, strict=True):
        assert array.dtype == dtype, name
        np.testing.assert_array_equal(array, wanted[name].astype(array.dtype), err_msg=name)

    shutil.rmtree(tmp_path / "old" / "weights")
    lost, strange = "layers.1.mlp.up_proj.kernel", "layers.1.mlp.gate_up_proj.kernel"
    weights[strange] = weights.pop(lost)
    first_format.write_weights(tmp_path / "old", weights)
    assert refused(tmp_path / "old") == f"{tmp_path / 'old'}: missing: {lost}; extra: {strange}"


def test_tied_with_another_head_loads_both(tmp_path):
    raw = LLAMA | {"tie_word_embeddings": True}
    tensors = tiny_checkpoints.write_checkpoint(tmp_path / "hf", raw)
    head = tensors["model.embed_tokens.weight"][::-1].copy()
    tiny_checkpoints.write_shards(tmp_path / "hf", tensors | {"lm_head.weight": head})
    convert(tmp_path / "hf", tmp_path / "converted")
    for folder in ("hf", "converted"):
        loaded = load(tmp_path / folder)
        assert not loaded.config.tie_word_embeddings
        np.testing.assert_array_equal(leaves(loaded.model)["lm_head", "kernel"], head)


def test_without_a_path_the_bundled_model_is_loaded():
    assert load().path == BUNDLED


def test_eos_ids_of_the_generation_config_win(tmp_path):
    folder = tmp_path / "hf"
    tiny_checkpoints.write_checkpoint(folder, LLAMA | {"eos_token_id": [5, 6]})
    assert load(folder).eos_ids == (5, 6)
    for content, wanted in (
        ({"eos_token_id": 7, "temperature": 0.1}, (7,)),
        ({"eos_token_id": [8, 9]}, (8, 9)),
        ({"eos_token_id": None}, (5, 6)),
        ({}, (5, 6)),
    ):
        (folder / "generation_config.json").write_text(json.dumps(content))
        assert load(folder).eos_ids == wanted
    for content in ("[]", "{", '{"eos_token_id": "x"}'):
        (folder / "generation_config.json").write_text(content)
        with pytest.raises(UserError, match=r"generation_config\.json"):
            load(folder)


def test_the_tokenizers_own_end_is_one_too(tmp_path):
    """A folder may name the end of a document alone, where the tokenizer knows the end of a turn."""
    tiny_checkpoints.write_checkpoint(tmp_path, TEXTUAL)
    tokenizer = tiny_tokenizers.chat_ml()
    end = tokenizer.token_to_id("<|im_end|>")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1}')
    for name, wanted in (
        ("<|im_end|>", (1, end)),
        ({"content": "<|im_end|>"}, (1, end)),
        ("</s>", (1,)),
        (None, (1,)),
        ("gone", (1,)),
    ):
        tiny_tokenizers.write_tokenizer(tmp_path, tokenizer, eos_token=name)
        assert load(tmp_path).eos_ids == wanted
    tiny_checkpoints.write_checkpoint(tmp_path, TEXTUAL | {"vocab_size": end})
    tiny_tokenizers.write_tokenizer(tmp_path, tokenizer, eos_token="<|im_end|>")
    assert load(tmp_path).eos_ids == (1,)


def test_the_folders_head_map_is_checked(tmp_path):
    tiny_checkpoints.write_checkpoint(tmp_path / "hf", LLAMA)
    loaded = load(tmp_path / "hf")
    assert loaded.heads is None
    HeadMap.none(loaded.config).save(tmp_path / "hf" / "heads.json")
    convert(tmp_path / "hf", tmp_path / "converted", dtype="bfloat16")
    for folder in ("hf", "converted"):
        assert load(tmp_path / folder).heads == HeadMap.none(loaded.config)
    (tmp_path / "hf" / "heads.json").write_text("{}")
    with pytest.raises(UserError, match="head map"):
        load(tmp_path / "hf")


def refused(folder, dtype=None):
    with pytest.raises(UserError) as error:
        load(folder, dtype)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_folders_that_cannot_be_loaded(tmp_path):
    assert "no such folder" in refused(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    message = refused(tmp_path / "empty")
    for name in ("config.json", "lychee.json", "model.safetensors"):
        assert name in message
    tiny_checkpoints.write_checkpoint(tmp_path / "hf", LLAMA)
    assert "float32, bfloat16, float16" in refused(tmp_path / "hf", "int8")
    weights = tmp_path / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "truncated" in refused(tmp_path / "hf")
    weights.unlink()
    assert "not a checkpoint" in refused(tmp_path / "hf")


def test_damaged_converted_folders(tmp_path):
    tiny_checkpoints.write_checkpoint(tmp_path / "hf", LLAMA)
    convert(tmp_path / "hf", tmp_path / "whole")

    def copy(name):
        return shutil.copytree(tmp_path / "whole", tmp_path / name)

    folder = copy("format")
    (folder / "lychee.json").write_text('{"format": "lychee-checkpoint/9"}')
    assert "this version reads lychee-checkpoint/1 and lychee-checkpoint/2" in refused(folder)
    (folder / "lychee.json").write_text("nonsense")
    assert "is not valid JSON" in refused(folder)

    folder = copy("no weights")
    shutil.rmtree(folder / "weights")
    assert "no whole Orbax checkpoint" in refused(folder)

    folder = copy("other config")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "intermediate_size": 47}))
    message = refused(folder)
    assert "missing: layers.2" in message
    assert "misshapen: layers.0.mlp.down_proj.kernel" in message
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    assert "extra: layers.1" in refused(folder)

    folder = copy("lost")
    shutil.rmtree(folder / "weights" / "layers.1.mlp.gate_up_proj.kernel")
    assert "no whole Orbax checkpoint" in refused(folder)
    folder = copy("lost numbers")
    shutil.rmtree(folder / "weights" / "layers.1.mlp.gate_up_proj.kernel" / "c")
    assert "is damaged" in refused(folder)
    folder = copy("changed")
    chunk = next(file for file in (folder / "weights" / "norm.scale" / "c").rglob("*") if file.is_file())
    chunk.write_bytes(bytes(len(chunk.read_bytes())))
    assert "is damaged" in refused(folder)


@pytest.mark.parametrize("converted", [False, True])
def test_loading_tells_how_far_it_is(tmp_path, converted):
    tiny_checkpoints.write_checkpoint(folder := tmp_path / "model", TEXTUAL)
    if converted:
        convert(folder, folder := tmp_path / "converted")
    told: list[tuple[int, int]] = []
    model = load(folder, "bfloat16", on_progress=lambda *at: told.append(at))
    total = sum(array.nbytes for array in model.weights)
    assert [all_bytes for _, all_bytes in told] == [total] * len(model.weights)
    done = [done for done, _ in told]
    assert done == sorted(set(done))
    assert done[-1] == total


@pytest.fixture(scope="module")
def textual(tmp_path_factory):
    folder = tmp_path_factory.mktemp("textual")
    tiny_checkpoints.write_checkpoint(folder, TEXTUAL)
    tiny_tokenizers.write_tokenizer(folder, tiny_tokenizers.byte_level(), chat_template=tiny_tokenizers.CHAT_TEMPLATE)
    return load(folder)


def test_generate_takes_texts_and_ids(textual):
    ids = textual.tokenizer.encode(TEXT)
    one = textual.generate(TEXT, **NEW)
    assert one.prompt_tokens == [len(ids)]
    assert 0 < len(one.tokens[0]) == len(one.logprobs[0]) <= 10
    assert one.text == [textual.tokenizer.decode(one.tokens[0])]
    assert one.timing.prefill_s > 0
    assert one.attention.mode == one.attention["mode"] == "auto"
    assert (one.attention.retrieval_heads, one.attention.kv_read_share) == (4, 1.0)
    with pytest.raises(KeyError, match="modes"):
        one.attention["modes"]
    (usage,) = one.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), len(one.tokens[0]))
    assert usage.total_tokens == len(ids) + len(one.tokens[0])
    assert one.finish_reason == ["length" if len(one.tokens[0]) == 10 else "stop"]
    several = textual.generate([ids, "the dog"], **NEW)
    assert several.tokens[0] == one.tokens[0]
    assert several.prompt_tokens == [len(ids), len(textual.tokenizer.encode("the dog"))]
    chat = textual.generate("the dog", chat=True, **NEW)
    assert chat.tokens == textual.generate([textual.tokenizer.encode_messages("the dog")], **NEW).tokens


def test_stream_yields_the_text_of_generate(textual):
    whole = textual.generate(TEXT, **NEW)
    pieces = list(textual.stream(TEXT, **NEW))
    assert "".join(pieces) == whole.text[0]
    assert "" not in pieces
    assert "".join(textual.stream(textual.tokenizer.encode(TEXT), **NEW)) == whole.text[0]


@pytest.mark.usefixtures("without_type_checks")
def test_arguments_are_taken_as_people_mean_them_or_refused_in_one_line(textual):
    ids = textual.tokenizer.encode(TEXT)
    whole = textual.generate(TEXT, **NEW)
    loose = NEW | {"max_new_tokens": float(NEW["max_new_tokens"]), "top_k": None, "seed": None}
    assert textual.generate(ids, stop=None, **loose).tokens == whole.tokens
    free = textual.generate(TEXT, ignore_eos=True, **NEW)
    stop = free.text[0][2:4]
    assert textual.generate(TEXT, ignore_eos=True, stop=stop, **NEW).text == [free.text[0].split(stop)[0]]
    for arguments, culprit in (
        (((5,), {}), "prompt is 5"),
        ((([1, None],), {}), "token ids are whole numbers"),
        ((("a",), {"heads": 5}), "heads is 5"),
        ((("a",), {"budget": 2**31}), "budget is 2147483648"),
        ((("a",), {"max_new_tokens": "4"}), "max_new_tokens is '4'"),
        ((("a",), {"stop": 5}), "stop is 5"),
        (((), {}), "no prompt"),
        ((("a",), {"messages": [{"role": "user", "content": "a"}]}), "not both"),
    ):
        with pytest.raises(UserError, match=culprit):
            textual.generate(*arguments[0], **arguments[1])
    with pytest.raises(UserError, match="only one can be streamed"):
        textual.stream(["a", "b"], **NEW)
    messages = [{"role": "user", "content": "the dog"}]
    assert textual.generate(messages=messages, **NEW).tokens == textual.generate("the dog", chat=True, **NEW).tokens


def test_the_token_that_ends_a_text_is_not_in_it(textual):
    """Whether or not the tokenizer calls it special; with ignore_eos it ends nothing, and shows."""
    ids = [textual.tokenizer.encode(TEXT)]
    told = textual.generate(ids, ignore_eos=True, **NEW).tokens[0]
    count = next(n for n, token in enumerate(told) if n and token not in [*told[:n], *textual.tokenizer.special_ids])
    ends = dataclasses.replace(textual, eos_ids=(told[count],))
    found = ends.generate(ids, **NEW)
    assert (found.tokens, found.finish_reason) == ([told[: count + 1]], ["stop"])
    assert found.text == ["".join(ends.stream(ids[0], **NEW))] == [textual.tokenizer.decode(told[:count])]
    assert ends.generate(ids, ignore_eos=True, **NEW).text == [textual.tokenizer.decode(told)]


def test_stop_texts_end_their_row_alone(textual):
    whole = textual.generate([TEXT, "the dog"], ignore_eos=True, **NEW)
    stop = next(text for text in whole.text[0] if text not in whole.text[1])
    cut = textual.generate([TEXT, "the dog"], ignore_eos=True, stop=[stop], **NEW)
    assert cut.text == [whole.text[0].split(stop)[0], whole.text[1]]
    assert len(cut.tokens[0]) < 10
    assert cut.tokens[1] == whole.tokens[1]
    assert "".join(textual.stream(TEXT, ignore_eos=True, stop=[stop], **NEW)) == cut.text[0]


def test_options_reach_the_engine(textual, tmp_path):
    file = tmp_path / "map.json"
    HeadMap.none(textual.config).save(file)
    options = textual.options(attention="hybrid", heads=file, top_p=0.5, top_p_mass=0.25, budget=640, seed=3)
    assert options.heads == HeadMap.none(textual.config)
    assert (options.sampling.top_p, options.policy.top_p) == (0.5, 0.25)
    assert (options.policy.budget, options.sampling.seed, options.attention) == (640, 3, "hybrid")
    assert options.eos_ids == (1,)
    every = HeadMap.all(textual.config)
    assert textual.options().heads == textual.options(heads="all").heads == textual.options(heads=every).heads == every
    assert textual.options(heads="none").heads.num_retrieval == 2
    with pytest.raises(UserError, match="budget"):
        textual.options(budget=100)
    with pytest.raises(UserError, match="cannot be read"):
        textual.options(heads="some")
    for ask in (textual.options, functools.partial(textual.generate, TEXT), functools.partial(textual.stream, TEXT)):
        with pytest.raises(TypeError, match="no option 'max_tokens'; did you mean max_new_tokens"):
            ask(max_tokens=1)


def test_text_needs_a_tokenizer(textual, tmp_path):
    bare = dataclasses.replace(textual, path=tmp_path)
    assert bare.tokenizer is None
    generation = bare.generate([textual.tokenizer.encode(TEXT)], **NEW)
    assert generation.text is None
    assert generation.tokens == textual.generate(TEXT, **NEW).tokens
    for ask in (
        lambda: bare.generate("text"),
        lambda: bare.generate([[1, 2]], stop=["x"]),
        lambda: bare.generate([[1, 2]], chat=True),
        lambda: bare.stream([1, 2]),
    ):
        with pytest.raises(UserError, match=r"tokenizer|text"):
            ask()


def test_a_converted_folder_keeps_its_tokenizer(textual, tmp_path):
    convert(textual.path, tmp_path / "converted")
    tokenizer = Tokenizer.from_folder(tmp_path / "converted")
    assert tokenizer is not None
    assert tokenizer.encode_messages("the dog") == textual.tokenizer.encode_messages("the dog")
