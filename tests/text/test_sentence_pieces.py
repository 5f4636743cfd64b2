"""Folders with `tokenizer.model` alone: ids and text are those of SentencePiece, or the folder is refused."""

import json
import sys

import pytest
from sentencepiece import SentencePieceProcessor

from checkpoints_convert import convert
from lychee_jax.errors import UserError
from lychee_jax.text.tokenizer import Tokenizer
from tests.support import tiny_checkpoints, tiny_tokenizers

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TEXTS = ("hi", " hi", "the dog is", "  the  dog ", "a\nb", "é 日本😀 123 45", "", " ", "old fox ran to the river")
IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


@pytest.fixture(scope="module")
def model():
    return tiny_tokenizers.sentence_pieces()


@pytest.fixture
def folder(tmp_path):
    """Writes a folder as Llama 2's were at first."""

    def write(model, settings=None):
        (tmp_path / "config.json").write_text(json.dumps(tiny_checkpoints.TINY["llama"]))
        (tmp_path / "tokenizer.model").write_bytes(model)
        if settings is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return tmp_path

    return write


def refused(folder):
    with pytest.raises(UserError) as error:
        Tokenizer.from_folder(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("settings", "begins", "ends"),
    [
        (None, True, False),
        ({"tokenizer_class": "LlamaTokenizer", **NAMES}, True, False),
        ({"tokenizer_class": "LlamaTokenizer", **NAMES, "legacy": False, "add_bos_token": True}, True, False),
        ({"tokenizer_class": "LlamaTokenizerFast", **NAMES, "add_bos_token": False}, False, False),
        ({"tokenizer_class": "LlamaTokenizer", **NAMES, "add_eos_token": True}, True, True),
    ],
    ids=["unlabelled", "llama", "not legacy", "no bos", "eos"],
)
def test_ids_are_those_of_sentencepiece(folder, model, settings, begins, ends):
    pieces = SentencePieceProcessor(model_proto=model)
    tokenizer = Tokenizer.from_folder(folder(model, settings))
    assert tokenizer is not None
    for text in TEXTS:
        ids = pieces.encode(text)
        assert tokenizer.encode_plain(text) == ids
        assert tokenizer.encode(text) == [1] * begins + ids + [2] * ends
        assert tokenizer.decode([1, *ids, 2]) == pieces.decode(ids) == text
    both = [*pieces.encode("the fox"), 2, *pieces.encode("ran")]
    assert tokenizer.encode_plain("the fox</s>ran") == both


def test_a_model_that_puts_no_space_in_front(folder):
    model = tiny_tokenizers.sentence_pieces(add_dummy_prefix=False)
    tokenizer, pieces = Tokenizer.from_folder(folder(model)), SentencePieceProcessor(model_proto=model)
    assert tokenizer is not None
    for text in TEXTS:
        assert tokenizer.encode_plain(text) == pieces.encode(text)
        assert tokenizer.decode(pieces.encode(text)) == text


@pytest.mark.parametrize(
    "options",
    [{"model_type": "unigram"}, {"normalization_rule_name": "nmt_nfkc"}, {"remove_extra_whitespaces": True}],
    ids=["unigram", "nfkc", "spaces"],
)
def test_models_that_split_otherwise_are_refused(folder, options):
    model, llama = tiny_tokenizers.sentence_pieces(**options), {"tokenizer_class": "LlamaTokenizer", **NAMES}
    assert "in a way that only SentencePiece itself knows" in refused(folder(model, llama))


def test_added_tokens_and_the_chat_template_come_along(folder, model):
    llama = {"tokenizer_class": "LlamaTokenizer", **NAMES, "chat_template": tiny_tokenizers.CHAT_TEMPLATE}
    end, shown = {"content": "<|im_end|>", "special": True}, {"content": "<think>", "special": False}
    where = folder(model, llama | {"added_tokens_decoder": {"340": end, "341": shown | {"normalized": False}}})
    tokenizer = Tokenizer.from_folder(where)
    assert tokenizer is not None
    assert tokenizer.encode_plain("<|im_end|><think>") == [340, 341]
    assert tokenizer.decode([340, 341]) == "<think>"
    assert tokenizer.encode_messages("hi") == tokenizer.encode("user hi assistant ")
    folder(model, llama)
    (where / "added_tokens.json").write_text(json.dumps({"<think>": 340}))
    tokenizer = Tokenizer.from_folder(where)
    assert tokenizer is not None
    dog = tokenizer.encode_plain("dog")
    assert tokenizer.encode_plain("dog<think>dog") == [*dog, 340, *dog]
    (where / "added_tokens.json").write_text(json.dumps({"<think>": 341}))
    assert "'<think>' cannot have the id 341" in refused(where)


def test_other_formats_and_a_missing_library_are_told_when_the_checkpoint_is_converted(folder, model, monkeypatch):
    tiktoken = folder(b"AA== 0\nAQ== 1\n")
    tiny_checkpoints.write_checkpoint(tiktoken, tiny_checkpoints.TINY["llama"])
    assert "tokenizer.model is no SentencePiece model" in refused(tiktoken)
    with pytest.raises(UserError, match=r"take tokenizer\.json"):
        convert(tiktoken, tiktoken / "out")
    (tiktoken / "tokenizer.model").write_bytes(model)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match="needs the package sentencepiece: pip install sentencepiece"):
        convert(tiktoken, tiktoken / "out")
    assert not (tiktoken / "out").exists()
    monkeypatch.undo()
    convert(tiktoken, tiktoken / "out")
    tokenizer = Tokenizer.from_folder(tiktoken / "out")
    assert tokenizer is not None
    assert tokenizer.encode("hi") == [1, *SentencePieceProcessor(model_proto=model).encode("hi")]
