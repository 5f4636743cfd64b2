"""Folders with a tokenizer some of whose files begin with a byte order mark, which transformers does not take away."""

from __future__ import annotations

import codecs
import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_TEXTS = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)
_OTHERS = ("tokenizer.model",)


@contextlib.contextmanager
def without_marks(folder: Path) -> Iterator[Path]:
    """The folder itself, or, if a text in it begins with a byte order mark, a temporary copy of it without any."""
    texts = [name for name in _TEXTS if (folder / name).is_file()]
    if not any(_begins(folder / name).startswith(codecs.BOM_UTF8) for name in texts):
        yield folder
        return
    with tempfile.TemporaryDirectory() as made:
        for name in texts:
            (Path(made) / name).write_bytes((folder / name).read_bytes().removeprefix(codecs.BOM_UTF8))
        for name in _OTHERS:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, Path(made) / name)
        yield Path(made)


def _begins(file: Path) -> bytes:
    with file.open("rb") as handle:
        return handle.read(len(codecs.BOM_UTF8))
