"""The tokenizer that a GGUF file describes, built with the `tokenizers` library from its metadata alone."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from checkpoints_convert.gguf_file import Metadata
from checkpoints_convert.source import first_line
from lychee_jax.config import ModelConfig
from lychee_jax.errors import UserError
from lychee_jax.files import json_text, write_text

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
"""Of `tokenizer.ggml.token_type`; 6 is a byte."""

_ENDS = frozenset(
    {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>"}
)
"""Special tokens that end a turn or a text wherever they exist: files name one eos, and models end by either."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class _Split:
    """How a byte-level tokenizer cuts a text into words, as the tokenizer.json of its models has it.

    `patterns` cut one after the other; `whole_words` are taken from the vocabulary before any merge is tried.
    """

    patterns: tuple[str, ...]
    normalizer: Callable[[], object] | None = None
    whole_words: bool = False
    add_bos: bool = False


_LLAMA3 = _Split((_GPT4 % r"\p{N}{1,3}",), whole_words=True, add_bos=True)
_DIGITS = _Split((r"\p{N}", _GPT2))
_SPLITS: Mapping[str, _Split] = {
    "default": _Split((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": _Split((_GPT2,)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _LLAMA3),
    "qwen2": _Split((_GPT4 % r"\p{N}",), normalizers.NFC),
    "deepseek-r1-qwen": _Split((_GPT4 % r"\p{N}",)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), _DIGITS),
    "tekken": _Split((_TEKKEN,), whole_words=True, add_bos=True),
    "deepseek-coder": _Split(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")
    ),
}
"""`tokenizer.ggml.pre` → how words are found."""


def special_ids(metadata: Metadata) -> tuple[int | None, tuple[int, ...]]:
    """The token that begins a text, and all that end one: eos, eot, eom and what else is known to."""
    values = metadata.values
    # What an SPM file need not say.
    bos, eos = (1, 2) if values.get("tokenizer.ggml.model") == "llama" else (None, None)
    named = [metadata.token("eos"), metadata.token("eot"), metadata.token("eom")]
    named[0] = eos if named[0] is None else named[0]
    if "tokenizer.ggml.tokens" in values:
        tokens, types = _vocabulary(metadata)
        named += [index for index, token in enumerate(tokens) if token in _ENDS and types[index] == _CONTROL]
    found = metadata.token("bos")
    return bos if found is None else found, tuple(dict.fromkeys(index for index in named if index is not None))


def write_text_files(metadata: Metadata, config: ModelConfig, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json; without a tokenizer only the last.

    Args:
        metadata: the file's.
        config: of its model.
        folder: exists.

    Raises:
        UserError: a tokenizer that is not supported, by its name, or one that contradicts itself.
    """
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids)}
    _write(folder / "generation_config.json", ids)
    if metadata.text("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
        return
    tokens, _ = _vocabulary(metadata)
    if len(tokens) > config.vocab_size:
        raise UserError(f"{metadata.path} has {len(tokens)} tokens, but embeds {config.vocab_size}")
    build_tokenizer(metadata).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    special = {"bos": config.bos_token_id, "eos": next(iter(config.eos_token_ids), None)}
    special |= {"unk": metadata.token("unknown"), "pad": metadata.token("padding")}
    for name, index in special.items():
        if index is not None:
            settings[f"{name}_token"] = _token(metadata, tokens, index)
    if "tokenizer.chat_template" in metadata.values:
        settings["chat_template"] = metadata.text("tokenizer.chat_template")
    _write(folder / "tokenizer_config.json", settings)


def build_tokenizer(metadata: Metadata) -> Tokenizer:
    """The tokenizer: byte-level BPE ("gpt2") or SentencePiece's BPE with scores ("llama").

    Raises:
        UserError: another kind, an unknown way to cut words, or a vocabulary that contradicts itself.
    """
    kind = metadata.text("tokenizer.ggml.model")
    kinds = {"gpt2": _byte_level, "llama": _sentence_piece}
    if kind not in kinds:
        raise UserError(f"{metadata.path}: tokenizer {kind!r} is not supported; supported are {', '.join(kinds)}")
    tokens, types = _vocabulary(metadata)
    used = len(types)
    while used and types[used - 1] == _UNUSED:  # rows that only fill the embedding up
        used -= 1
    vocabulary = {token: index for index, token in enumerate(tokens[:used])}
    if len(vocabulary) != used:
        twice = next(token for index, token in enumerate(tokens[:used]) if vocabulary[token] != index)
        raise UserError(f"{metadata.path} has the token {twice!r} twice")
    try:
        tokenizer, add_bos = kinds[kind](metadata, vocabulary, types)
    except UserError:
        raise
    except Exception as error:  # the Rust library raises plain Exception
        raise UserError(f"{metadata.path}: the tokenizer cannot be built: {first_line(error)}") from error
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=type_ != _USER_DEFINED)
            for token, type_ in zip(tokens[:used], types, strict=False)
            if type_ in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    tokenizer.post_processor = _around(metadata, tokens, add_bos)
    return tokenizer


def _byte_level(metadata: Metadata, vocabulary: Mapping[str, int], types: Sequence[int]) -> tuple[Tokenizer, bool]:
    name = metadata.text("tokenizer.ggml.pre")
    split = _SPLITS.get(name)
    if split is None:
        raise UserError(
            f"{metadata.path}: tokenizer.ggml.pre {name!r} is not supported; supported are {', '.join(_SPLITS)}"
        )
    # A part may begin with a space only where it is nothing else: byte-level names have none.
    merges = [
        (merge[:1] + first, second)
        for merge in metadata.array("tokenizer.ggml.merges")
        for first, _, second in (merge[1:].partition(" "),)
    ]
    tokenizer = Tokenizer(models.BPE(dict(vocabulary), merges, ignore_merges=split.whole_words))
    if split.normalizer is not None:
        tokenizer.normalizer = split.normalizer()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, split.add_bos


def _sentence_piece(metadata: Metadata, vocabulary: Mapping[str, int], types: Sequence[int]) -> tuple[Tokenizer, bool]:
    scores = metadata.array("tokenizer.ggml.scores")
    unknown = metadata.token("unknown")
    tokenizer = Tokenizer(
        models.BPE(
            dict(vocabulary),
            _merges(vocabulary, types, scores),
            byte_fallback=True,
            fuse_unk=True,
            unk_token=_token(metadata, list(vocabulary), 0 if unknown is None else unknown),
        )
    )
    space_in_front = metadata.flag("tokenizer.ggml.add_space_prefix", True)
    prefix = [normalizers.Prepend("▁")] if space_in_front else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if space_in_front else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer, True


def _merges(vocabulary: Mapping[str, int], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the two neighbours whose union scores highest: every way to halve a token, by its score."""
    normal = {token for token, index in vocabulary.items() if types[index] == _NORMAL}
    halves = [
        (-scores[vocabulary[token]], token[:cut], token[cut:])
        for token in vocabulary
        if token in normal
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]
    halves.sort(key=lambda half: half[0])
    return [(first, second) for _, first, second in halves]


def _around(metadata: Metadata, tokens: Sequence[str], add_bos: bool) -> processors.TemplateProcessing | None:
    """What stands before and after a text."""
    bos, eos = special_ids(metadata)
    single, special = ["$A"], {}
    for wanted, index, place in (
        (metadata.flag("tokenizer.ggml.add_bos_token", add_bos), bos, 0),
        (metadata.flag("tokenizer.ggml.add_eos_token", False), next(iter(eos), None), 1),
    ):
        if not wanted:
            continue
        if index is None:
            raise UserError(f"{metadata.path} wants a token around texts, and does not say which")
        token = _token(metadata, tokens, index)
        single.insert(place * len(single), token)
        special[token] = index
    return processors.TemplateProcessing(single=single, special_tokens=list(special.items())) if special else None


def _vocabulary(metadata: Metadata) -> tuple[list[str], list[int]]:
    """Every token's text and type."""
    tokens = metadata.array("tokenizer.ggml.tokens")
    types = metadata.array("tokenizer.ggml.token_type")
    if len(types) != len(tokens):
        raise UserError(f"{metadata.path} has {len(tokens)} tokens, and {len(types)} types of tokens")
    return tokens, types


def _token(metadata: Metadata, tokens: Sequence[str], index: int) -> str:
    if not 0 <= index < len(tokens):
        raise UserError(f"{metadata.path} names token {index}, but has {len(tokens)} tokens")
    return tokens[index]


def _write(path: Path, value: object) -> None:
    write_text(path, json_text(value, indent=2) + "\n")
