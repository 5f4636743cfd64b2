"""Tokenizers from the metadata of GGUF files give the ids of the tokenizers that the files were made from."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from checkpoints_convert.gguf_file import Metadata
from checkpoints_convert.gguf_tokenizer import build_tokenizer, special_ids, write_text_files
from lychee_jax.config import ModelConfig
from lychee_jax.errors import UserError
from lychee_jax.text.tokenizer import Tokenizer as TextTokenizer
from tests.support import tiny_checkpoints, tiny_tokenizers
from tests.support.tiny_gguf import bpe, spm

TEXTS = (
    "the dog is no stop",
    "In 1984, 12345 dogs; 7 stop 2,000 times",
    " the  dog   is\n\n  no\tstop  \n",
    "it's the dog's: we'll, I'd, don't, YOU'RE, they've, I'm",
    "héllo Straße é 你好 🍒 e\u0301",
    "a<think>the dog</think>→✓ is<|im_end|> no",
    "<s>[INST] the dog [/INST]</s>there",
    "",
)
CONFIG = ModelConfig.from_hf(
    tiny_checkpoints.TINY["llama"] | {"vocab_size": 1000, "bos_token_id": 0, "eos_token_id": 1}
)


def metadata(values):
    return Metadata(Path("m.gguf"), values)


def converted(folder, values, config=CONFIG):
    write_text_files(metadata(values), config, folder)
    tokenizer = TextTokenizer.from_folder(folder)
    assert tokenizer is not None
    return tokenizer


def test_byte_level_ids_are_the_originals(tmp_path):
    original = tiny_tokenizers.chat_ml()
    tokenizer = converted(tmp_path, bpe(original, "gpt-2", bos_token_id=0, eos_token_id=1, add_bos_token=True))
    theirs = TextTokenizer.from_folder(tiny_tokenizers.write_tokenizer(tmp_path / "original", original))
    assert theirs is not None
    for text in TEXTS:
        ids = original.encode(text).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.encode_plain(text) == ids[1:]
        assert tokenizer.decode(ids) == theirs.decode(ids)
    assert tokenizer.special_ids == theirs.special_ids


def test_bos_and_eos_stand_around_texts_where_the_file_wants_them():
    original = tiny_tokenizers.byte_level()
    for settings, front, back in (
        ({}, [], []),
        ({"add_bos_token": True}, [0], []),
        ({"add_bos_token": True, "add_eos_token": True}, [0], [1]),
        ({"add_eos_token": True}, [], [1]),
    ):
        tokenizer = build_tokenizer(metadata(bpe(original, "gpt-2", bos_token_id=0, eos_token_id=1, **settings)))
        plain = tokenizer.encode("the dog", add_special_tokens=False).ids
        assert tokenizer.encode("the dog").ids == [*front, *plain, *back]
    # Llama 3's files need not say it.
    assert build_tokenizer(metadata(bpe(original, "llama-bpe", bos_token_id=0))).encode("the").ids[0] == 0
    with pytest.raises(UserError, match="wants a token around texts"):
        build_tokenizer(metadata(bpe(original, "gpt-2", add_bos_token=True)))


TEXT = "I'll PAY 12345 don't\n\n  x9 HTTPServer, ok"
PIECES = {
    "gpt-2": "I 'll ĠPAY Ġ12345 Ġdon 't ĊĊĠ Ġx 9 ĠHTTPServer , Ġok",
    "smollm": "I 'll ĠPAY Ġ 1 2 3 4 5 Ġdon 't ĊĊĠ Ġx 9 ĠHTTPServer , Ġok",
    "llama-bpe": "I 'll ĠPAY Ġ 123 45 Ġdon 't ĊĊ Ġ Ġx 9 ĠHTTPServer , Ġok",
    "qwen2": "I 'll ĠPAY Ġ 1 2 3 4 5 Ġdon 't ĊĊ Ġ Ġx 9 ĠHTTPServer , Ġok",
    "tekken": "I 'll ĠPAY Ġ 1 2 3 4 5 Ġdon 't ĊĊ Ġ Ġx 9 ĠHTTPServer , Ġok",
    "deepseek-coder": "I ' ll ĠPAY Ġ 1 2 3 4 5 Ġdon ' t Ċ Ċ Ġ Ġx 9 ĠHTTPServer , Ġok",
    "default": "I ' ll ĠPAY Ġ 123 45 Ġdon ' t ĊĊĠ Ġx 9 ĠHTTPServer , Ġok",
}


@pytest.mark.parametrize("pre", PIECES)
def test_words_are_cut_as_the_files_pre_tokenizer_cuts_them(pre):
    tokenizer = build_tokenizer(metadata(bpe(tiny_tokenizers.byte_level(), pre, bos_token_id=0)))
    assert tokenizer.pre_tokenizer is not None
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)] == PIECES[pre].split()


def test_qwens_ids_are_those_of_the_class_in_transformers():
    """The library builds this tokenizer, cutting and normal form included, from vocabulary and merges alone."""
    from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

    original = tiny_tokenizers.byte_level()
    model = json.loads(original.to_str())["model"]
    merges: Any = [tuple(merge) for merge in model["merges"]]
    theirs = Qwen2Tokenizer(vocab=model["vocab"], merges=merges, unk_token="<s>", eos_token="</s>", pad_token="</s>")
    ours = build_tokenizer(metadata(bpe(original, "qwen2")))
    for text in TEXTS[:5]:
        assert ours.encode(text).ids == theirs.encode(text)


def test_llama_3_takes_whole_words_from_the_vocabulary():
    """ "hello" has no merges that lead to it: Llama 3 finds it all the same, GPT-2 does not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "hello"])}
    original = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    for pre, count in (("llama-bpe", 1), ("gpt-2", 5)):
        tokenizer = build_tokenizer(metadata(bpe(original, pre, add_bos_token=False)))
        assert len(tokenizer.encode("hello").ids) == count


def test_rows_that_only_fill_the_embedding_up_are_no_tokens(tmp_path):
    values = bpe(tiny_tokenizers.byte_level(), "gpt-2", bos_token_id=0, eos_token_id=1)
    count = len(values["tokenizer.ggml.tokens"])
    values["tokenizer.ggml.tokens"] += ["[PAD0]", "[PAD1]"]
    values["tokenizer.ggml.token_type"] += [5, 5]
    tokenizer = converted(tmp_path, values)
    assert tokenizer.is_silent(count)
    assert not tokenizer.is_silent(count - 1)


@pytest.fixture(scope="module")
def sentences():
    """A SentencePiece model as Llama 2's: BPE, bytes for unknown letters, digits one by one."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS, "the dog stops there and then", "no dog is in the house"] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def test_sentence_piece_ids_are_the_originals(tmp_path, sentences):
    tokenizer = converted(tmp_path, spm(sentences, bos_token_id=1, eos_token_id=2, unknown_token_id=0))
    for text in (*TEXTS[:5], "x", "the dog stops 12 times"):
        ids = sentences.encode(text)
        assert tokenizer.encode(text) == [1, *ids]
        assert tokenizer.decode(ids) == text
    # Special tokens in a text are special, and a text begins anew behind one.
    assert tokenizer.encode("the</s>dog") == [1, *sentences.encode("the"), 2, *sentences.encode("dog")]
    assert special_ids(metadata(spm(sentences))) == (1, (2,))


def test_sentence_piece_without_a_space_in_front(sentences):
    tokenizer = build_tokenizer(metadata(spm(sentences, add_space_prefix=False, add_bos_token=False)))
    ids = tokenizer.encode("the dog").ids
    assert tokenizer.decode(ids) == "the dog"
    assert str(tokenizer.id_to_token(ids[0])).startswith("t")


def test_every_token_that_ends_a_turn_or_a_text_ends():
    original = tiny_tokenizers.byte_level()
    original.add_special_tokens(["<|im_end|>", "<|endoftext|>", "<|eom|>"])
    original.add_tokens([AddedToken("<|end|>", normalized=False)])  # no control token: a word like any other
    turn, text, eom = (original.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>", "<|eom|>"))
    values = bpe(original, "gpt-2", eos_token_id=text)
    assert special_ids(metadata(values)) == (None, (text, turn))
    values |= {
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": turn,
        "tokenizer.ggml.eom_token_id": eom,
    }
    assert special_ids(metadata(values)) == (None, (1, turn, eom, text))


def test_the_folder_has_what_others_have(tmp_path):
    original = tiny_tokenizers.chat_ml()
    template = tiny_tokenizers.CHAT_TEMPLATE
    values = bpe(original, "gpt-2", bos_token_id=0, eos_token_id=1, unknown_token_id=0, padding_token_id=1)
    tokenizer = converted(tmp_path, values | {"tokenizer.chat_template": template})
    assert {file.name for file in tmp_path.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    }
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"bos_token_id": 0, "eos_token_id": [1]}
    folder = tiny_tokenizers.write_tokenizer(tmp_path / "original", original, chat_template=template)
    theirs = TextTokenizer.from_folder(folder)
    assert theirs is not None
    assert tokenizer.encode_messages("the dog") == theirs.encode_messages("the dog")


def test_without_a_tokenizer_there_are_only_ids(tmp_path):
    write_text_files(metadata({"tokenizer.ggml.model": "none"}), CONFIG, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["generation_config.json"]


def test_tokenizers_that_are_refused(tmp_path, sentences):
    byte_level, pieces = bpe(tiny_tokenizers.byte_level(), "gpt-2"), spm(sentences)
    key = "tokenizer.ggml"
    for values, reason in (
        (
            byte_level | {f"{key}.pre": "bloom"},
            "tokenizer.ggml.pre 'bloom' is not supported; supported are default, gpt-2",
        ),
        ({name: each for name, each in byte_level.items() if name != f"{key}.pre"}, "has no tokenizer.ggml.pre"),
        (byte_level | {f"{key}.model": "bert"}, "tokenizer 'bert' is not supported; supported are gpt2, llama"),
        (byte_level | {f"{key}.merges": ["q zz"]}, "the tokenizer cannot be built"),
        (byte_level | {f"{key}.eos_token_id": 5000}, "names token 5000, but has"),
        (byte_level | {f"{key}.token_type": [1]}, "types of tokens"),
        (pieces | {f"{key}.tokens": ["▁the"] * 400}, "has the token '▁the' twice"),
        ({name: each for name, each in pieces.items() if name != f"{key}.scores"}, "has no tokenizer.ggml.scores"),
    ):
        eos = values.get(f"{key}.eos_token_id", 1)
        config = dataclasses.replace(CONFIG, eos_token_ids=(eos,))
        with pytest.raises(UserError) as error:
            write_text_files(metadata(values), config, tmp_path)
        assert reason in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="tokens, but embeds 96"):
        write_text_files(metadata(byte_level), ModelConfig.from_hf(tiny_checkpoints.TINY["llama"]), tmp_path)
