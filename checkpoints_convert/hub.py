"""Finds a checkpoint: a folder, or a model on the Hugging Face Hub of which only the needed files are fetched."""

import re
from pathlib import Path

from checkpoints_convert.source import INDEX, SINGLE, first_line, read_index
from lychee_jax.errors import UserError

TEXT_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "heads.json",
)
"""Beside config and weights: what a converted checkpoint keeps, where it is there."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def locate(src: str) -> Path:
    """The local folder of a checkpoint; what a hub id names is downloaded (or taken from the Hub's cache).

    Raises:
        UserError: no such folder, or nothing that the Hub would give us.
    """
    folder = Path(src).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{src} is a file; a checkpoint is a folder with config.json and safetensors")
    if not _HUB_ID.fullmatch(src) or src.startswith("."):
        raise UserError(f"no such folder: {src}")
    snapshot = _fetch(src, ["config.json", SINGLE, INDEX, *TEXT_FILES])
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
