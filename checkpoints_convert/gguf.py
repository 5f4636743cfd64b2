"""GGUF files of Llama and Qwen models: one more source of tensors that Hugging Face has names for.

The modules whose names begin with `gguf` are the only ones that know GGUF.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from jaxtyping import Shaped

from checkpoints_convert.config import DEFAULT, ConvertConfig
from checkpoints_convert.gguf_config import FREQUENCY_FACTORS, hugging_face_config
from checkpoints_convert.gguf_file import GGUFFile
from checkpoints_convert.gguf_tokenizer import write_text_files
from checkpoints_convert.keys import keys
from checkpoints_convert.source import Source
from lychee_jax.config import ModelConfig
from lychee_jax.errors import UserError


class GGUFSource(Source):
    """The tensors of a GGUF file, whole or split. Opening it reads headers only.

    Tensors that Hugging Face has no name for keep GGUF's.

    Attributes:
        raw_config: what Hugging Face's config.json of the model says.
        config: the same, checked.

    Raises:
        UserError: a damaged file, or a model that is not supported, by its name.
    """

    def __init__(self, path: Path, config: ConvertConfig = DEFAULT):
        self.path, self._convert_config = path, config
        file = GGUFFile(path)
        self._metadata = file.metadata
        self.raw_config: dict[str, Any] = hugging_face_config(file.metadata, file.tensors)
        try:
            self.config = ModelConfig.from_hf(self.raw_config)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        file.tensors.pop(FREQUENCY_FACTORS, None)
        names = _hugging_face_names(self.config)
        self._tensors = {names.get(name, name): each for name, each in file.tensors.items()}
        self.tensors = {**self._tensors}
        self.problems, self.lost, self.unlisted = {}, set(), {}  # what is wrong with a file is told when it is opened

    def dtype(self, name: str) -> np.dtype | None:
        """The dtype of a tensor's numbers once they are read; None for a type that is not supported."""
        return self._tensors[name].loaded_dtype

    def blocks(self, name: str) -> Iterator[tuple[int, Shaped[np.ndarray, " rows *rest"]]]:
        """A tensor in pieces of whole rows, dequantised."""
        tensor, head_dim = self._tensors[name], self.config.head_dim
        rows = tensor.shape[0]
        # Whole heads at a time, so that their rows can be put in order.
        step = max(1, self._convert_config.block_numbers // math.prod(tensor.shape[1:]) // head_dim) * head_dim
        turned = self.config.family == "llama" and any(f".{module}." in name for module in ("q_proj", "k_proj"))
        for first in range(0, rows, step):
            block = tensor.rows(first, min(first + step, rows))
            yield first, _pairs_to_halves(block, head_dim) if turned else block

    def is_quantised(self, name: str) -> bool:
        """Whether a tensor's numbers were rounded to few bits."""
        return self._tensors[name].quantised

    def write_text_files(self, folder: Path) -> None:
        """The files of the tokenizer and of the ids that end a text.

        Raises:
            UserError: a tokenizer that is not supported, by its name.
        """
        write_text_files(self._metadata, self.config, folder)


def _hugging_face_names(config: ModelConfig) -> dict[str, str]:
    """GGUF's name of every tensor of the decoder → Hugging Face's."""
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == config.family)
    theirs = gguf.get_tensor_name_map(arch, config.num_layers)
    names = {}
    for key in keys(config):
        for part in key.parts:
            name = theirs.get_name(part.name, (".weight", ".bias"))
            if name is not None:
                names[name] = part.name
    return names


def _pairs_to_halves(rows: Shaped[np.ndarray, " rows *rest"], head_dim: int) -> Shaped[np.ndarray, " rows *rest"]:
    """The rows of q and k heads in Hugging Face's order.

    In GGUF's llama files the two numbers that rotary embedding turns together are neighbours; Hugging Face has them
    half a head apart, and so have the other architectures.
    """
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
