"""Folders with a SentencePiece model (`tokenizer.model`) and no `tokenizer.json`: the latter is made from the former.

transformers does so too, but by ways that differ between its classes and versions, and some need further packages.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lychee_jax.errors import UserError
from lychee_jax.files import read_json_object

_SPACE = "▁"
_BESIDE = (
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
# What can differ: spaces in front, in a row and at the end, digits, letters without a piece, wide and joined forms.
_PROBES = ("a", " a", "a  b \n c ", "12 345", "é日😀", "Ａﬁ")


@contextlib.contextmanager
def with_pipeline(folder: Path) -> Iterator[Path]:
    """The folder itself, or, if it has a SentencePiece model alone, a temporary one with a tokenizer.json made from it.

    Raises:
        UserError: it is no SentencePiece model, or one that a tokenizer.json cannot follow, or the library is missing.
    """
    model = folder / "tokenizer.model"
    if (folder / "tokenizer.json").is_file() or not model.is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory() as made:
        for name in _BESIDE:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, Path(made) / name)
        _make_pipeline(_read_pieces(model), folder).save(str(Path(made) / "tokenizer.json"))
        yield Path(made)


def _read_pieces(file: Path) -> Any:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise UserError(f"{file} needs the package sentencepiece: pip install sentencepiece") from error
    try:
        return SentencePieceProcessor(model_proto=file.read_bytes())
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{file} is no SentencePiece model (the one of Meta's own Llama 3 folders is tiktoken's, which knows no "
            "special tokens); take tokenizer.json from the model's page on the Hugging Face Hub"
        ) from error


def _make_pipeline(pieces: Any, folder: Path) -> Any:
    """A `tokenizers.Tokenizer` that splits every stretch of text between special tokens as SentencePiece does.

    So do Llama 2's own code and the tokenizer.json that it got later.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    settings = _settings(folder / "tokenizer_config.json")
    vocabulary = {pieces.id_to_piece(index): index for index in range(pieces.vocab_size())}
    unknown = pieces.id_to_piece(pieces.unk_id())
    pipeline = Tokenizer(
        models.BPE(vocabulary, _merges(vocabulary, pieces), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = pieces.normalize("a").startswith(_SPACE)
    replace = normalizers.Replace(" ", _SPACE)
    pipeline.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    pipeline.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    pipeline.post_processor = _around(pieces, settings)
    for text in (*_PROBES, _words(pieces)):
        ids = pieces.encode(text)
        if pipeline.encode(text, add_special_tokens=False).ids != ids or pipeline.decode(ids) != pieces.decode(ids):
            raise UserError(
                f"{folder / 'tokenizer.model'} splits {text!r} in a way that only SentencePiece itself knows; "
                "save the tokenizer as tokenizer.json"
            )
    pipeline.add_special_tokens([name for name, index in vocabulary.items() if _is_silent(pieces, index)])
    for index, token in _added(folder, settings):
        pipeline.add_tokens([AddedToken(**token)])
        if pipeline.token_to_id(token["content"]) != index:
            raise UserError(f"{folder}: the added token {token['content']!r} cannot have the id {index}")
    return pipeline


def _is_silent(pieces: Any, index: int) -> bool:
    return pieces.is_control(index) or pieces.is_unknown(index)


def _merges(vocabulary: Mapping[str, int], pieces: Any) -> list[tuple[str, str]]:
    """SentencePiece joins the two neighbours whose union scores highest: every way to halve a piece, best first."""
    halves = [
        (-pieces.get_score(index), index, cut, piece)
        for piece, index in vocabulary.items()
        if not (_is_silent(pieces, index) or pieces.is_byte(index))
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    return [(piece[:cut], piece[cut:]) for _, _, cut, piece in sorted(halves)]


def _around(pieces: Any, settings: Mapping[str, Any]) -> Any:
    """What stands before and after a text: where nothing else is said BOS before it, as with Llama's own class."""
    from tokenizers import processors

    template = ["$A"]
    if settings.get("add_bos_token", True) and pieces.bos_id() >= 0:
        template.insert(0, pieces.id_to_piece(pieces.bos_id()))
    if settings.get("add_eos_token", False) and pieces.eos_id() >= 0:
        template.append(pieces.id_to_piece(pieces.eos_id()))
    special = [(name, pieces.piece_to_id(name)) for name in template if name != "$A"]
    return processors.TemplateProcessing(single=template, special_tokens=special)


def _added(folder: Path, settings: Mapping[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Id and description of the tokens that were added to the model, in the order of their ids."""
    known = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    added = settings.get("added_tokens_decoder")
    if added is None:  # before it, tokens had a file of their own, which says nothing else about them
        older = _settings(folder / "added_tokens.json")
        added = {index: {"content": content, "normalized": False} for content, index in older.items()}
    by_id = {int(index): {key: token[key] for key in known if key in token} for index, token in added.items()}
    return sorted(by_id.items())


def _settings(file: Path) -> dict[str, Any]:
    return read_json_object(file) if file.is_file() else {}


def _words(pieces: Any) -> str:
    """Some of the model's own words, then all in one, which other algorithms than its own would split elsewhere."""
    known = (pieces.id_to_piece(index) for index in range(pieces.vocab_size()))
    words = [piece[1:] for piece in known if piece.startswith(_SPACE) and len(piece) > 3 and piece[1:].isalpha()]
    some = words[:: max(1, len(words) // 64)]
    return f"{' '.join(some)} {''.join(some)}"
