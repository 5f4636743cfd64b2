"""Finds a checkpoint: a folder, a GGUF file, or a model on the Hugging Face Hub, whose needed files are fetched."""

import re
from pathlib import Path

from checkpoints_convert.gguf_file import is_gguf
from checkpoints_convert.source import INDEX, SINGLE, TEXT_FILES, first_line, read_index
from lychee_jax.errors import UserError

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def locate(src: str) -> Path:
    """The local folder or GGUF file of a checkpoint; what a hub id names is downloaded (or taken from the Hub's cache).

    Raises:
        UserError: no such folder or file, or nothing that the Hub would give us.
    """
    path = Path(src).expanduser()
    if path.is_dir():
        files = [] if (path / "config.json").is_file() else sorted(path.glob("*.gguf"))
        if files:
            raise UserError(f"{src} has no config.json but GGUF files; name one of them: {files[0]}")
        return path
    if path.is_file() and is_gguf(path):
        return path
    if path.exists():
        raise UserError(f"{src} is a file; a checkpoint is a folder with config.json and safetensors, or a GGUF file")
    if path.suffix == ".gguf":
        raise UserError(f"no such file: {src}")
    if not _HUB_ID.fullmatch(src) or src.startswith("."):
        raise UserError(f"no such folder: {src}")
    snapshot = _fetch(src, ["config.json", SINGLE, INDEX, *TEXT_FILES])
    if not (snapshot / "config.json").is_file():
        raise UserError(
            f"{src} on the Hugging Face Hub has no config.json; of a model published as GGUF files, download one and "
            "name it"
        )
    if not (snapshot / SINGLE).is_file() and (snapshot / INDEX).is_file():
        shards = sorted(set(read_index(snapshot / INDEX).values()))
        snapshot = _fetch(src, ["config.json", INDEX, *TEXT_FILES, *shards])
    return snapshot


def _fetch(repository: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download  # the only place that needs a network

    try:
        return Path(snapshot_download(repository, allow_patterns=files))
    except Exception as error:  # offline, refused, unknown, gated: HTTP, OS and validation errors of several libraries
        raise UserError(
            f"{repository} is no local folder, and the Hugging Face Hub did not give it "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
