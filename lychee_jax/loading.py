"""A folder or a hub id in, a model ready to generate out: converted checkpoints, and Hugging Face's as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Shaped

from checkpoints_convert import store
from checkpoints_convert.converted import Converted
from checkpoints_convert.export import export_hugging_face
from checkpoints_convert.hub import locate
from checkpoints_convert.source import INDEX, MARKER, SINGLE
from checkpoints_convert.weights import Weights, check_dtype
from lychee_jax.attention.head_map import HeadMap
from lychee_jax.config import ModelConfig, token_ids
from lychee_jax.errors import UserError
from lychee_jax.files import read_json_object
from lychee_jax.llm import LLM, Generation, LoadedModel, choose_heads
from lychee_jax.maps.shipped import SHIPPED, find_map
from lychee_jax.models.decoder import Decoder
from lychee_jax.models.quantization import check_quantization
from lychee_jax.models.spec import ModelSpec
from lychee_jax.parallel.layouts import Layout, layout_for
from lychee_jax.parallel.mesh import check_devices
from lychee_jax.text.tokenizer import read_eos_id

__all__ = ["BUNDLED", "LLM", "Generation", "LoadedModel", "find", "load", "read_config", "save"]

BUNDLED = Path(__file__).parent / "bundled"
"""The model that the package brings along."""


type BeforeWeights = Callable[[Path, ModelConfig, HeadMap | None, tuple[int, ...], Layout | None], None]


def find(path: str | Path | None = None) -> Path:
    """The folder of a model: the one of that name, else of a model on the Hugging Face Hub, which is downloaded.

    Args:
        path: a folder, or a hub id such as "Qwen/Qwen3-8B"; None is the model that the package brings along.

    Raises:
        UserError: no such folder, or nothing that the Hub would give us.
    """
    return BUNDLED if path is None else _locate_folder(str(path))


def _locate_folder(path: str, *, weights: bool = True) -> Path:
    found = locate(path, weights=weights)
    if found.is_file():
        raise UserError(f"{found} is a GGUF file; convert it first: lychee convert {found} FOLDER")
    return found


def load(
    path: str | Path | None = None,
    dtype: str | None = None,
    *,
    quantize: str | None = None,
    quantize_head: bool = False,
    tensor_parallel: int = 1,
    heads: str | Path | HeadMap | None = None,
    maps: Path = SHIPPED,
    before_weights: BeforeWeights | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> LLM:
    """Load a converted folder or a Hugging Face folder (config.json and safetensors) onto one device or several.

    A model on the Hugging Face Hub is downloaded first, the needed files only, or taken from the Hub's cache. Tensors
    come one at a time (of a converted folder: one layer at a time), are checked, cast and sent to their devices.

    Args:
        path: the folder, or a hub id such as "Qwen/Qwen3-8B"; None is the model that the package brings along.
        dtype: float32, bfloat16 or float16; None keeps the checkpoint's.
        quantize: int8 or fp8: kernels become 8 bits with a scale for each output channel, rounded from the checkpoint's
            own numbers, or kept where it stores them so; norms, biases and the embedding stay. None: kernels in the
            dtype, but those of a folder that was converted to 8 bits as they are.
        quantize_head: the output head, too; of a tied embedding a copy.
        tensor_parallel: devices among which heads, widths and vocabulary are divided; what does not divide is padded.
        heads: the head map for which the heads are shared out among devices, as `LLM.choose_heads` takes it; others may
            be used all the same. None: the model's own.
        maps: a folder of head maps; where the model's own folder has no heads.json, the one made for its config is
            taken. By default, the maps that the package ships.
        before_weights: called with the folder, the config, the head map, the ids that end a text and the layout on
            several devices, before the weights are read: what is compiled in the background from here on compiles while
            they come.
        on_progress: called with the bytes of weights that are on the device, and all of them.

    Raises:
        UserError: no such folder, no checkpoint, or everything that is wrong with it, in one line; or fewer devices.
    """
    check_dtype(dtype)
    check_devices(tensor_parallel)
    check_quantization(quantize)
    folder = find(path)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"not a checkpoint: {folder} has no config.json; looked for a converted folder "
            f"(config.json, {MARKER}, {store.WEIGHTS}) or a Hugging Face one (config.json, {SINGLE} or {INDEX})"
        )
    if (folder / MARKER).is_file():
        converted = Converted(folder)
        config, load_all = converted.config, converted.load_all
    else:
        weights = Weights(folder)
        config, load_all = weights.config, weights.load_all
    if config.quantize is not None and quantize not in (None, config.quantize):
        raise UserError(
            f"{folder} was converted with --quantize {config.quantize}; for {quantize}, convert the original again"
        )
    quantize_head = quantize_head or config.quantize_head
    chosen = check_quantization(quantize or config.quantize, quantize_head)
    own_heads = _own_heads(folder, config, maps)
    layout = None
    if tensor_parallel > 1:
        layout = layout_for(config, tensor_parallel, choose_heads(config, own_heads, heads).roles)
    eos_ids = _eos_ids(folder, config)
    config = dataclasses.replace(config, dtype=dtype or config.dtype, quantize=chosen, quantize_head=quantize_head)
    if before_weights is not None:
        before_weights(folder, config, own_heads, eos_ids, layout)
    return LLM(folder, config, _fill(config, layout, load_all(config), on_progress), own_heads, eos_ids)


def _own_heads(folder: Path, config: ModelConfig, maps: Path) -> HeadMap | None:
    own = folder / "heads.json"
    return HeadMap.load(own, config) if own.exists() else find_map(config, maps)


def find_heads(path: str | Path | None, config: ModelConfig) -> HeadMap | None:
    """The map in a model's folder, else the one that the package ships for its config, if there is one."""
    return _own_heads(BUNDLED if path is None else _locate_folder(str(path), weights=False), config, SHIPPED)


def read_config(path: str | Path | None) -> ModelConfig:
    """The config of a converted or a Hugging Face folder, or of a model on the Hub, whose weights are not loaded.

    Raises:
        UserError: no such folder, or no checkpoint that is supported.
    """
    folder = BUNDLED if path is None else _locate_folder(str(path), weights=False)
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
    layout: Layout | None,
    arrays: Iterable[tuple[str, Shaped[np.ndarray, ...]]],
    on_progress: Callable[[int, int], None] | None,
) -> Decoder:
    """The module around weights that go to their devices as they come."""
    spec, _ = ModelSpec.abstract(config, config.dtype, layout)
    _, shapes = ModelSpec.abstract(config, config.dtype)
    done, total = 0, sum(shape.size * shape.dtype.itemsize for shape in shapes)
    axes = dict(zip(spec.names, spec.axes, strict=True))
    weights: dict[str, jax.Array] = {}
    for path, array in arrays:
        if layout is not None:
            weights[path] = layout.place(axes[path], array, config)
        else:  # waited for, so that no queue of copies keeps tensors in the host's memory
            weights[path] = jax.device_put(array).block_until_ready()
        done += array.nbytes
        if on_progress is not None:
            on_progress(done, total)
    return spec.merge(tuple(weights[name] for name in spec.names))


def _eos_ids(folder: Path, config: ModelConfig) -> tuple[int, ...]:
    """The tokens that end a text: generation_config.json's, else the config's, and the tokenizer's own.

    The first file corrects the config (nothing else of it is read), but may know the end of a document alone where the
    tokenizer knows the end of a turn.
    """
    file = folder / "generation_config.json"
    ids = read_json_object(file).get("eos_token_id") if file.is_file() else None
    ends = config.eos_token_ids if ids is None else token_ids(ids, f"{file}: eos_token_id")
    own = read_eos_id(folder)
    return (*ends, own) if own is not None and own not in ends and own < config.vocab_size else ends
