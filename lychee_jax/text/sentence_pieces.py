"""Tokenizers of which a folder has the SentencePiece model alone, `tokenizer.model`: split as SentencePiece does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lychee_jax.errors import UserError
from lychee_jax.files import read_json_object

_SPACE = "▁"
# What can differ: spaces in front, in a row and at the end, digits, letters without a piece, wide and joined forms.
_PROBES = ("a", " a", "a  b \n c ", "12 345", "é日😀", "Ａﬁ")


def read_pieces(folder: Path) -> Any | None:
    """The SentencePiece model of a folder that has no other vocabulary; None for other folders.

    Raises:
        UserError: it is no SentencePiece model, or the library is missing.
    """
    file = folder / "tokenizer.model"
    if not file.is_file() or (folder / "tokenizer.json").is_file():
        return None
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


def restore_pieces(backend: Any, pieces: Any, folder: Path) -> None:
    """Let a `transformers` tokenizer split text as SentencePiece does; its classes have their own ideas of spaces.

    Every stretch of text between special tokens is split for itself, as in Llama 2's own code and tokenizer.json.

    Raises:
        UserError: the model does something that this cannot follow, such as another normalisation.
    """
    theirs = getattr(backend, "backend_tokenizer", None)
    if theirs is None:  # a class that calls the library itself
        return
    from tokenizers import decoders, normalizers, processors

    prefix = pieces.normalize("a").startswith(_SPACE)
    replace = normalizers.Replace(" ", _SPACE)
    theirs.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
    theirs.pre_tokenizer = None
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    theirs.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    # Where nothing else is said, a text begins with BOS and does not end: so it is with Llama's own class.
    file = folder / "tokenizer_config.json"
    config = read_json_object(file) if file.is_file() else {}
    around = ["$A"]
    if config.get("add_bos_token", True) and pieces.bos_id() >= 0:
        around.insert(0, pieces.id_to_piece(pieces.bos_id()))
    if config.get("add_eos_token", False) and pieces.eos_id() >= 0:
        around.append(pieces.id_to_piece(pieces.eos_id()))
    special = [(name, pieces.piece_to_id(name)) for name in around if name != "$A"]
    theirs.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    for text in (*_PROBES, _words(pieces)):
        ids = pieces.encode(text)
        if theirs.encode(text, add_special_tokens=False).ids != ids or theirs.decode(ids) != pieces.decode(ids):
            raise UserError(
                f"it splits {text!r} in a way that only SentencePiece itself knows; save it as tokenizer.json"
            )


def _words(pieces: Any) -> str:
    """Some of the model's own words, which algorithms other than its own would split elsewhere."""
    known = (pieces.id_to_piece(index) for index in range(pieces.vocab_size()))
    words = [piece[1:] for piece in known if piece.startswith(_SPACE) and len(piece) > 3 and piece[1:].isalpha()]
    return " ".join(words[:: max(1, len(words) // 64)])
