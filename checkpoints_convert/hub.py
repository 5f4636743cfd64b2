"""Finds a checkpoint: a folder, a GGUF file, or a model on the Hugging Face Hub, whose needed files are fetched."""

import re
from pathlib import Path

from checkpoints_convert.gguf_file import is_gguf
from checkpoints_convert.source import INDEX, SINGLE, TEXT_FILES, first_line, read_index
from lychee_jax.errors import UserError

_AGAIN = "try again with a network, and without HF_HUB_OFFLINE"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def locate(src: str, *, weights: bool = True, gguf: bool = False) -> Path:
    """The local folder or GGUF file of a checkpoint; what a hub id names is downloaded, or taken from the Hub's cache.

    A folder of that name comes first. Downloads show their progress on stderr where that is a terminal, and go on
    where an earlier one broke off.

    Args:
        src: a folder, a model's id on the Hub (owner/name), or a GGUF file.
        weights: False: of a model on the Hub, fetch the config alone.
        gguf: whether a GGUF file will do.

    Raises:
        UserError: no such folder or file, or nothing that the Hub would give us.
    """
    path = Path(src).expanduser()
    if path.is_dir():
        files = [] if (path / "config.json").is_file() else sorted(path.glob("*.gguf"))
        if files:
            raise UserError(f"{src} has no config.json but GGUF files; convert one: lychee convert {files[0]} FOLDER")
        return path
    if path.is_file() and is_gguf(path):
        if not gguf:
            raise UserError(f"{src} is a GGUF file; convert it first: lychee convert {src} FOLDER")
        return path
    if path.exists():
        raise UserError(f"{src} is a file; a checkpoint is a folder with config.json and safetensors, or a GGUF file")
    if path.suffix == ".gguf":
        raise UserError(f"no such file: {src}")
    if not _HUB_ID.fullmatch(src) or src.startswith("."):
        raise UserError(f"no such folder: {src} (a model on the Hugging Face Hub is named owner/name)")
    if not weights:
        return _fetch(src, ["config.json"])
    snapshot = _fetch(src, ["config.json", SINGLE, INDEX, *TEXT_FILES])
    if not (snapshot / "config.json").is_file():
        raise UserError(
            f"{src} on the Hugging Face Hub has no config.json; of a model published as GGUF files, download one and "
            "name it"
        )
    if (snapshot / SINGLE).is_file():
        return snapshot
    if not (snapshot / INDEX).is_file():
        raise UserError(f"{src} gave neither {SINGLE} nor {INDEX}; of a model on the Hub only safetensors are read")
    shards = sorted(set(read_index(snapshot / INDEX).values()))
    snapshot = _fetch(src, ["config.json", INDEX, *TEXT_FILES, *shards])
    if missing := [shard for shard in shards if not (snapshot / shard).is_file()]:
        raise UserError(f"{src}: the Hub's cache has no {', '.join(missing)}; {_AGAIN}")
    return snapshot


def _fetch(repository: str, files: list[str]) -> Path:
    """The snapshot in the Hub's cache, with these files if the model has them."""
    from huggingface_hub import snapshot_download  # the only place that needs a network
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(repository, allow_patterns=files))
    except GatedRepoError as error:
        raise UserError(
            f"{repository} is gated: accept its terms at https://huggingface.co/{repository}, then log in "
            "(hf auth login, or a token in HF_TOKEN)"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"there is no folder {repository}, and no such model on the Hugging Face Hub, or a private one: "
            "then log in first (hf auth login, or a token in HF_TOKEN)"
        ) from error
    except Exception as error:  # HTTP, OS and validation errors of several libraries
        # Not in the cache, that is; but the cause may be an answer, such as a refused file.
        absent = isinstance(error, LocalEntryNotFoundError)
        if absent and not isinstance(error.__cause__, HfHubHTTPError):
            raise UserError(
                f"there is no folder {repository}, the Hugging Face Hub cannot be reached, and its cache does not "
                f"have the whole model; {_AGAIN}"
            ) from error
        answer = error.__cause__ if absent and error.__cause__ else error
        raise UserError(
            f"there is no folder {repository}, and the Hugging Face Hub did not give it "
            f"({type(answer).__name__}: {first_line(answer)}); the next try goes on from what has come"
        ) from error
