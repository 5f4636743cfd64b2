"""A folder on disk in, a model ready to generate out: converted checkpoints, and Hugging Face's as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from checkpoints_convert import store
from checkpoints_convert.converted import Converted
from checkpoints_convert.export import export_hugging_face
from checkpoints_convert.source import INDEX, MARKER, SINGLE
from checkpoints_convert.weights import Weights, check_dtype
from lychee_jax.attention.head_map import HeadMap
from lychee_jax.config import ModelConfig, token_ids
from lychee_jax.errors import UserError
from lychee_jax.files import read_json_object
from lychee_jax.llm import LLM, Generation, LoadedModel
from lychee_jax.models.decoder import Decoder
from lychee_jax.models.spec import ModelSpec

__all__ = ["BUNDLED", "LLM", "Generation", "LoadedModel", "load", "read_config", "save"]

BUNDLED = Path(__file__).parent / "bundled"
"""The model that the package brings along."""


type BeforeWeights = Callable[[Path, ModelConfig, HeadMap | None, tuple[int, ...]], None]


def load(
    path: str | Path | None = None,
    dtype: str | None = None,
    *,
    before_weights: BeforeWeights | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> LLM:
    """Load a converted folder or a Hugging Face folder (config.json and safetensors) onto the default device.

    Tensors come one at a time (of a converted folder: one layer at a time), are checked, cast and sent to the device.

    Args:
        path: the folder; None is the model that the package brings along.
        dtype: float32, bfloat16 or float16; None keeps the checkpoint's.
        before_weights: called with the folder, the config, the folder's head map and the ids that end a text, before
            the weights are read: what is compiled in the background from here on compiles while they come.
        on_progress: called with the bytes of weights that are on the device, and all of them.

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
        converted = Converted(folder)
        config = converted.config
        dtype = dtype or config.dtype
        arrays = converted.read(dtype)
    else:
        weights = Weights(folder)
        config = weights.config
        dtype = dtype or config.dtype
        arrays = ((path, weights.read(path, dtype)) for path in weights.keys)
    heads = HeadMap.load(folder / "heads.json", config) if (folder / "heads.json").exists() else None
    eos_ids = _eos_ids(folder, config)
    config = dataclasses.replace(config, dtype=dtype)
    if before_weights is not None:
        before_weights(folder, config, heads, eos_ids)
    return LLM(folder, config, _fill(config, arrays, on_progress), heads, eos_ids)


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


def _fill(
    config: ModelConfig,
    arrays: Iterator[tuple[str, Float[np.ndarray, ...]]],
    on_progress: Callable[[int, int], None] | None,
) -> Decoder:
    """The module around weights that go to the device as they come."""
    spec, shapes = ModelSpec.abstract(config, config.dtype)
    done, total = 0, sum(shape.size * shape.dtype.itemsize for shape in shapes)
    weights: dict[str, jax.Array] = {}
    for path, array in arrays:
        # Waited for, so that no queue of copies keeps tensors in the host's memory.
        weights[path] = jax.device_put(array).block_until_ready()
        done += array.nbytes
        if on_progress is not None:
            on_progress(done, total)
    return spec.merge(tuple(weights[name] for name in spec.names))


def _eos_ids(folder: Path, config: ModelConfig) -> tuple[int, ...]:
    """generation_config.json's ids win, as checkpoints correct their config there; nothing else of it is read."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return config.eos_token_ids
    ids = read_json_object(file).get("eos_token_id")
    return config.eos_token_ids if ids is None else token_ids(ids, f"{file}: eos_token_id")
