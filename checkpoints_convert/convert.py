"""Converts a Hugging Face checkpoint or a GGUF file into an Orbax folder that appears whole or not at all."""

import contextlib
import dataclasses
import functools
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from checkpoints_convert import store
from checkpoints_convert.config import DEFAULT, ConvertConfig
from checkpoints_convert.converted import FORMAT
from checkpoints_convert.hub import locate
from checkpoints_convert.keys import Target
from checkpoints_convert.progress import Progress
from checkpoints_convert.rounding import RoundingError
from checkpoints_convert.source import MARKER
from checkpoints_convert.verify import verify as compare
from checkpoints_convert.weights import Weights, check_dtype
from lychee_jax.config import ModelConfig, Quantization
from lychee_jax.errors import UserError
from lychee_jax.files import check_tensor_path, json_text, write_text
from lychee_jax.models.quantization import check_quantization
from lychee_jax.quantization_config import converted_quantization, without_quantization
from lychee_jax.text.tokenizer import check_tokenizer


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What a conversion did; `tied` says whether one table embeds tokens and reads logits out.

    `tensors` are counted as Hugging Face has them; `quantize` is what kernels are stored as, where not in `dtype`.
    """

    path: Path
    tensors: int
    bytes: int
    dtype: str
    tied: bool
    verified: bool
    seconds: float
    quantize: Quantization | None = None

    def __str__(self) -> str:
        head = "tied to the embedding" if self.tied else "of its own"
        kernels = f" with kernels in {self.quantize}" if self.quantize else ""
        verified = ", verified" if self.verified else ""
        size = f"{self.bytes / 1e9:.2f} GB" if self.bytes >= 1e9 else f"{self.bytes / 1e6:.2f} MB"
        return (
            f"{self.path}: {self.tensors} tensors, {size} in {self.dtype}{kernels}, output head {head}"
            f"{verified}, in {self.seconds:.1f} s"
        )


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    quantize_head: bool = False,
    verify: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    config: ConvertConfig = DEFAULT,
) -> ConversionReport:
    """Convert the checkpoint `src` (a folder, a GGUF file, or a model on the Hugging Face Hub) into the folder `dst`.

    One tensor is in memory at a time. Everything is written to a folder beside `dst` that is renamed at the end and
    removed if anything goes wrong.

    Args:
        src: a Hugging Face folder with config.json and safetensors, a hub id, or a GGUF file of the architecture
            llama, qwen2 or qwen3 (of a split one any part; all lie in one folder).
        dst: the folder to make.
        dtype: float32, bfloat16 or float16; None keeps the checkpoint's, and makes bfloat16 of quantised GGUF files.
        quantize: int8 or fp8: kernels are stored in 8 bits with a scale for each output channel, rounded from the
            checkpoint's own numbers, or as they are where it stores them so; norms, biases and the embedding stay.
        quantize_head: the output head, too; of a tied embedding a copy.
        verify: read everything again before `dst` appears: it must be finite and, to the bit, what the source says, or
            what rounding makes of that.
        overwrite: replace `dst`, whatever it holds, once the new folder is whole.
        progress: told how far the work has come.
        config: how much is read and written at once.

    Raises:
        UserError: bad input, told in one line.
    """
    started = time.perf_counter()
    dst = Path(dst).expanduser().resolve()
    check_dtype(dtype)
    kind = check_quantization(quantize, quantize_head)
    _check_destination(dst, overwrite)
    source = locate(str(src), gguf=True)
    for kept in (source.resolve(), Path.cwd()):
        if kept.is_relative_to(dst):
            raise UserError(f"{dst} cannot be replaced: {kept} is in use and would go with it")
    weights = Weights(source, config)
    if source.is_dir():
        check_tokenizer(source)
    model = dataclasses.replace(
        weights.config, dtype=dtype or weights.config.dtype, quantize=kind, quantize_head=quantize_head
    )
    with _told_as_user_errors(dst), _appearing(dst, overwrite) as folder:
        _copy_files(weights, model, folder)
        size = _write_weights(weights, model, folder, progress, config)
        if verify:
            compare(weights, folder, model, progress)
    seconds = time.perf_counter() - started
    return ConversionReport(
        dst, weights.tensors, size, model.dtype, model.tie_word_embeddings, verify, seconds, model.quantize
    )


def _check_destination(dst: Path, overwrite: bool) -> None:
    check_tensor_path(dst)
    if dst.exists() and not overwrite:
        raise UserError(f"{dst} exists; choose another destination, or say --overwrite to replace it")
    if dst.exists() and not dst.is_dir():
        raise UserError(f"{dst} is a file, and only a folder can be replaced")


def _copy_files(weights: Weights, model: ModelConfig, folder: Path) -> None:
    """The marker, the config as it now is, and whatever belongs to the text side."""
    config = {key: value for key, value in without_quantization(weights.raw_config).items() if key != "torch_dtype"}
    config |= {"dtype": model.dtype, "tie_word_embeddings": model.tie_word_embeddings}
    if model.quantize is not None:
        config["quantization_config"] = converted_quantization(model.quantize, model.quantize_head)
    write_text(folder / "config.json", json_text(config, indent=2) + "\n")
    write_text(folder / MARKER, json_text({"format": FORMAT}) + "\n")
    weights.source.write_text_files(folder)


def _write_weights(
    weights: Weights, model: ModelConfig, folder: Path, progress: Progress | None, config: ConvertConfig
) -> int:
    """Returns the bytes written."""
    targets, error = weights.targets(model), RoundingError()
    done, total = 0, sum(len(target.key.parts) for target in targets)
    made: dict[str, Shaped[np.ndarray, ...]] = {}

    def read(target: Target, path: str) -> Shaped[np.ndarray, "..."]:
        nonlocal done
        if path not in made:
            if progress is not None:
                progress("convert", done, total)
            done += len(target.key.parts)
            # A kernel and its scales are made together, and written one after the other.
            made.clear()
            made.update(weights.load(target, error))
        return made.pop(path)

    tensors = {
        path: store.Unread(shape, np.dtype(dtype), functools.partial(read, target, path))
        for target in targets
        for path, (shape, dtype) in target.tensors.items()
    }
    size = sum(tensor.nbytes for tensor in tensors.values())
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(f"the weights take {size / 1e9:.1f} GB, but {folder.parent} has {free / 1e9:.1f} GB left")
    store.write(folder / store.WEIGHTS, tensors, config)
    weights.tell(error)
    if progress is not None:
        progress("convert", done, total)
    return size


@contextlib.contextmanager
def _told_as_user_errors(dst: Path) -> Iterator[None]:
    """What the system refuses (a full disk, a folder that is not ours to write to) is said in one line."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot write {dst}: {error.strerror or error}") from error
    except ValueError as error:
        # What Orbax's file layer raises; the system's own reason is a number at the end of a long message.
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise UserError(f"cannot write {dst}: {os.strerror(int(code[1]))}") from error


@contextlib.contextmanager
def _appearing(dst: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `dst` that takes its name at the end, or is removed together with everything made for it."""
    made = [parent for parent in dst.parents if not parent.exists()]
    partial = dst.with_name(f".{dst.name}.{os.getpid()}.partial")
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        _check_destination(dst, overwrite)
        _rename(partial, dst)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def _rename(partial: Path, dst: Path) -> None:
    if not dst.exists():
        partial.rename(dst)
        return
    replaced = dst.with_name(f".{dst.name}.{os.getpid()}.replaced")
    dst.rename(replaced)
    try:
        partial.rename(dst)
    except BaseException:
        replaced.rename(dst)
        raise
    shutil.rmtree(replaced)
