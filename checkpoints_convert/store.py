"""The weights of a converted folder: one ordinary Orbax checkpoint, written and read with one tensor in memory.

`orbax.checkpoint.StandardCheckpointer().restore(folder / "weights")` reads it too: a nested dictionary, named as the
modules are (`layers` → `0` → `attention` → `qkv_proj` → `kernel`).
"""

import concurrent.futures
import contextlib
import dataclasses
import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Shaped

from checkpoints_convert.config import DEFAULT, ConvertConfig

WEIGHTS = "weights"

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Unread:
    """A tensor that is read only when Orbax comes to write it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], Shaped[np.ndarray, "..."]]

    @property
    def size(self) -> int:
        """How many numbers; some versions of Orbax ask for it."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes."""
        return self.size * self.dtype.itemsize


class _Lent(np.ndarray):
    """An array that Orbax may use as it is: it takes deep copies of arrays that someone could still write to."""

    def __deepcopy__(self, memo: dict[int, Any] | None, /) -> "_Lent":
        return self


class _Stopped(Exception):
    """The writer was told to stop."""


class _OneByOne(ocp.type_handlers.NumpyHandler):
    """Writes tensors as NumPy arrays, each read, written and forgotten before the next.

    The peak is the largest tensor, in the dtype that it is written in, and some 130 MB for the blocks it is read in.
    """

    def __init__(self, stop: threading.Event):
        super().__init__()
        self._stop = stop

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
        """Write to the end, so that there is nothing left to wait for."""
        for value, info, arg in zip(values, infos, args, strict=True):
            if self._stop.is_set():
                raise _Stopped
            for future in await super().serialize([value.read().view(_Lent)], [info], [arg]):
                future.result()
        return []


def write(folder: Path, tensors: Mapping[str, Unread], config: ConvertConfig = DEFAULT) -> None:
    """Write tensors, by dotted path, to `folder`, which must not exist.

    When this returns or raises, also after Ctrl-C, nothing is being written any more: Python interrupts only the main
    thread, so the writing is done in another one, which ends between two tensors.
    """
    stop = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            pool.submit(_write, folder, tensors, config, stop).result()
        finally:
            stop.set()


def _write(folder: Path, tensors: Mapping[str, Unread], config: ConvertConfig, stop: threading.Event) -> None:
    registry = ocp.type_handlers.create_type_handler_registry((Unread, _OneByOne(stop)))
    chunks = {path: ocp.SaveArgs(chunk_byte_size=config.chunk_bytes) for path in tensors}
    with _quiet(), _checkpointer(type_handler_registry=registry) as checkpointer:
        args = ocp.args.PyTreeSave(_nest(tensors), save_args=_nest(chunks))
        checkpointer.save(folder.absolute(), args=args)


def shapes(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Dotted path → shape and dtype of every tensor of a written checkpoint.

    Raises:
        OSError, ValueError: there is none, or none that Orbax can read.
    """
    with _quiet(), _checkpointer() as checkpointer:
        metadata = checkpointer.metadata(folder.absolute()).item_metadata
    if metadata is None:
        raise FileNotFoundError("metadata or tensors are missing")
    return {path: (tuple(leaf.shape), np.dtype(leaf.dtype).name) for path, leaf in _flatten(metadata.tree)}


def read(folder: Path, paths: Iterable[str]) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Some tensors of a written checkpoint, by dotted path.

    Raises:
        OSError, ValueError: a file is missing or damaged (each has a checksum).
    """
    args = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in paths}
    with _quiet(), _checkpointer() as checkpointer:
        tree = checkpointer.restore(
            folder.absolute(),
            args=ocp.args.PyTreeRestore(
                item=_nest(dict.fromkeys(args, 0)), restore_args=_nest(args), partial_restore=True
            ),
        )
    return dict(_flatten(tree))


def _checkpointer(**options: Any) -> ocp.Checkpointer:
    # Plain Zarr, one folder for each tensor: with one writer, OCDBT's shared files only take time and memory.
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True, use_compression=False, **options)
    )


def _nest(leaves: Mapping[str, Any]) -> Tree:
    tree: Tree = {}
    for path, leaf in leaves.items():
        *parts, last = path.split(".")
        node = tree
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, node in tree.items():
        if isinstance(node, Mapping):
            yield from _flatten(node, f"{prefix}{name}.")
        else:
            yield prefix + name, node


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No log lines from Orbax about how it works inside; its failures are exceptions."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)  # it logs the traceback of what it also raises
    try:
        yield
    finally:
        logger.setLevel(before)
