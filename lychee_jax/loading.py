"""A folder on disk in, a model ready to generate out: converted checkpoints, and Hugging Face's as they are."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from checkpoints_convert import store
from checkpoints_convert.convert import FORMAT
from checkpoints_convert.export import export_hugging_face
from checkpoints_convert.keys import abstract_decoder, dotted, keys
from checkpoints_convert.source import INDEX, MARKER, SINGLE, describe, first_line
from checkpoints_convert.weights import Weights, cast, check_dtype
from lychee_jax.attention.head_map import HeadMap
from lychee_jax.config import ModelConfig, token_ids
from lychee_jax.errors import UserError
from lychee_jax.llm import LLM, Generation, LoadedModel
from lychee_jax.models.decoder import Decoder

__all__ = ["BUNDLED", "LLM", "Generation", "LoadedModel", "load", "read_config", "save"]

BUNDLED = Path(__file__).parent / "bundled"
"""The model that the package brings along."""


def load(path: str | Path | None = None, dtype: str | None = None) -> LLM:
    """Load a converted folder or a Hugging Face folder (config.json and safetensors) onto the default device.

    Tensors come one at a time (of a converted folder: one layer at a time), are checked, cast and sent to the device.

    Args:
        path: the folder; None is the model that the package brings along.
        dtype: float32, bfloat16 or float16; None keeps the checkpoint's.

    Raises:
        UserError: no such folder, no checkpoint, or everything that is wrong with it, in one line.
    """
    folder = Path(path).expanduser() if path is not None else BUNDLED
    check_dtype(dtype)
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"not a checkpoint: {folder} has no config.json; looked for a converted folder "
            f"(config.json, {MARKER}, {store.WEIGHTS}) or a Hugging Face one (config.json, {SINGLE} or {INDEX})"
        )
    if (folder / MARKER).is_file():
        config = _check_converted(folder)
        dtype = dtype or config.dtype
        arrays = _converted(folder, config, dtype)
    else:
        weights = Weights(folder)
        config = weights.config
        dtype = dtype or config.dtype
        arrays = ((path, weights.read(path, dtype)) for path in weights.keys)
    heads = HeadMap.load(folder / "heads.json", config) if (folder / "heads.json").exists() else None
    eos_ids = _eos_ids(folder, config)
    config = dataclasses.replace(config, dtype=dtype)
    return LLM(folder, config, _fill(config, arrays), heads, eos_ids)


def read_config(path: str | Path) -> ModelConfig:
    """The config of a converted or a Hugging Face folder, whose weights are not loaded.

    Raises:
        UserError: no such folder, or no checkpoint that is supported.
    """
    folder = Path(path).expanduser()
    config = ModelConfig.from_folder(folder)
    shards = [folder / name for name in (SINGLE, INDEX) if (folder / name).is_file()]
    # A checkpoint that calls itself tied may hold a head of its own, and then is another model.
    return Weights(folder).config if config.tie_word_embeddings and shards else config


def save(folder: Path, config: ModelConfig, params: Mapping[str, Float[jax.Array, ...]]) -> None:
    """Write weights that were trained here as a Hugging Face checkpoint, which `load` reads.

    Args:
        folder: made if it is missing.
        config: of the Llama family, with the default rope and no biases; its dtype is the one that is written.
        params: dotted path → array, every parameter of the decoder.

    Raises:
        UserError: a config that is not written here.
    """
    export_hugging_face(folder, config, {name: np.asarray(value) for name, value in params.items()})


def _fill(config: ModelConfig, arrays: Iterator[tuple[str, Float[np.ndarray, ...]]]) -> Decoder:
    """The module around weights that go to the device as they come."""
    # Waited for, so that no queue of copies keeps tensors in the host's memory.
    weights = {path: jax.device_put(array).block_until_ready() for path, array in arrays}
    graphdef, state = nnx.split(abstract_decoder(config))
    flat = [(parts, leaf.replace(weights[dotted(parts)])) for parts, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _check_converted(folder: Path) -> ModelConfig:
    """The config of a converted folder whose weights are all there, by what their metadata say."""
    marker = _read_object(folder / MARKER)
    if marker.get("format") != FORMAT:
        raise UserError(f"{folder / MARKER} has format {marker.get('format')!r}; this version reads {FORMAT}")
    config = ModelConfig.from_folder(folder)
    wanted = {key.path: key.shape for key in keys(config)}
    try:
        found = store.shapes(folder / store.WEIGHTS)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / store.WEIGHTS} is no whole Orbax checkpoint: {first_line(error)}") from error
    problems = {
        "missing": [path for path in wanted if path not in found],
        "extra": [path for path in found if path not in wanted],
        "misshapen": [path for path in wanted if path in found and found[path][0] != wanted[path]],
    }
    if any(problems.values()):
        raise UserError(f"{folder}: {describe({kind: paths for kind, paths in problems.items() if paths})}")
    return config


def _converted(folder: Path, config: ModelConfig, dtype: str) -> Iterator[tuple[str, Float[np.ndarray, ...]]]:
    """The weights of a converted folder; a layer at a time, because each call of Orbax takes a while."""
    groups = collections.defaultdict(list)
    for key in keys(config):
        parts = key.path.split(".")
        groups[tuple(parts[: 2 if parts[0] == "layers" else 1])].append(key.path)
    for paths in groups.values():
        try:
            arrays = store.read(folder / store.WEIGHTS, paths)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / store.WEIGHTS} is damaged: {first_line(error)}") from error
        for path, array in arrays.items():
            yield path, cast(array, dtype, path)


def _eos_ids(folder: Path, config: ModelConfig) -> tuple[int, ...]:
    """generation_config.json's ids win, as checkpoints correct their config there; nothing else of it is read."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return config.eos_token_ids
    ids = _read_object(file).get("eos_token_id")
    return config.eos_token_ids if ids is None else token_ids(ids, f"{file}: eos_token_id")


def _read_object(file: Path) -> dict[str, object]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} must be a JSON object")
    return content
