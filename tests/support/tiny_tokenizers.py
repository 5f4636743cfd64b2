"""Small tokenizers of the kinds that Llama and Qwen checkpoints bring, made without a download."""

import io
import json
import random
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WORDS = ("the", "dog", "is", "stop", "no")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('only user and assistant speak here') }}{% endif %}"
    "{{ message.role }} {{ message.content }} {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)

THINKING_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% else %}<think>\n{% endif %}{% endif %}"
)
"""As Qwen's reasoning models: the template opens the thoughts, or closes them at once."""


def _bpe(vocabulary: list[str], words: list[str], **options: Any) -> models.BPE:
    """A BPE model whose merges spell out `words` letter by letter."""
    vocab = {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}
    merges = []
    for word in words:
        for length in range(2, len(word) + 1):
            merge = (word[: length - 1], word[length - 1])
            if vocab.setdefault(word[:length], len(vocab)) is not None and merge not in merges:
                merges.append(merge)
    return models.BPE(vocab=vocab, merges=merges, **options)


def byte_level() -> Tokenizer:
    """As Qwen and Llama 3: every character of a token's name is a byte, so that a token may hold half a letter."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # half of an emoji, and a letter joined to the first byte of "é"
    halves = ["ðŁ", "aÃ"]
    tokenizer = Tokenizer(_bpe(["<s>", "</s>", *alphabet], [*_WORDS, *("Ġ" + word for word in _WORDS), *halves]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("→✓", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def chat_ml() -> Tokenizer:
    """As Qwen: byte level, with special tokens around every message, and an eot that is not flagged special."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<|eot|>", normalized=False)])
    return tokenizer


def llama2() -> Tokenizer:
    """As Llama 2: ▁ for a space, one put in front of the text, and a token for every byte of unknown letters."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *_LETTERS, ".", "é"]
    tokenizer = Tokenizer(_bpe(tokens, ["▁" + word for word in _WORDS], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def metaspace() -> Tokenizer:
    """Byte fallback with the Metaspace decoder, which drops the first token's space by itself."""
    tokenizer = llama2()
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


def words() -> Tokenizer:
    """Whole words without any decoder: they are joined by spaces."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "c": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def sentence_pieces(**options: Any) -> bytes:
    """A `tokenizer.model`, of Llama 2's kind unless `options` of SentencePiece's trainer say otherwise."""
    rng, model = random.Random(0), io.BytesIO()
    words = (*_WORDS, "and", "cat", "river", "old", "fox", "ran", "to", "we", "saw", "birds", "many", "days")
    texts = [" ".join(rng.choices(words, k=12)) for _ in range(300)]
    likeness = {
        "model_type": "bpe", "vocab_size": 340, "byte_fallback": True, "split_digits": True, "pad_id": -1,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "hard_vocab_limit": False,
        "minloglevel": 2,
    }  # fmt: skip
    trainer = sentencepiece.SentencePieceTrainer
    trainer.train(sentence_iterator=iter(texts), model_writer=model, **{**likeness, **options})
    return model.getvalue()


def write_tokenizer(folder: Path, tokenizer: Tokenizer, *, chat_template: str | None = None, **settings: Any) -> Path:
    """Save the files that a checkpoint's folder has of its tokenizer; `settings` go to tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 16}
    for name, token in (("bos_token", "<s>"), ("eos_token", "</s>")):
        if tokenizer.token_to_id(token) is not None:
            config[name] = token
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings))
    return folder
