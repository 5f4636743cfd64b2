"""Compiled programs on disk: a start that finds them there neither traces nor compiles.

JAX's own cache of compiled programs is keyed by what tracing gives, and tracing kernels takes longer than loading them.
Here the key is what decides a program: the source code of both packages, versions, flags, device, and its arguments.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import logging
import os
import pickle
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

_log = logging.getLogger(__name__)


class ExecutableCache:
    """A folder of executables. A file that cannot be read counts as absent, and one that cannot be written is not."""

    def __init__(self, folder: Path):
        self._folder = folder

    def load(self, key: Hashable, args: tuple[Any, ...], devices: Sequence[Any] | None = None) -> Any:
        """The compiled program, called with arrays like `args` on `devices` (None: the first); None if it is absent."""
        file = self._file(key, args)
        if jax.default_backend() == "gpu":
            # Executables with kernels refer to symbols of a library that this import loads.
            importlib.import_module("pallas_kernels.mosaic_gpu")
        try:
            payload, out_tree = pickle.loads(file.read_bytes())
            in_tree = jax.tree.structure((args, {}))
            return serialize_executable.deserialize_and_load(
                payload, in_tree, out_tree, execution_devices=devices or jax.devices()[:1]
            )
        except FileNotFoundError:
            return None
        except Exception as error:  # cut off, or written by a library that this one does not understand
            _log.info("%s is not used: %s", file, error)
            return None

    def save(self, key: Hashable, args: tuple[Any, ...], compiled: Any) -> None:
        """Keep a program, whole or not at all."""
        file = self._file(key, args)
        part = file.with_suffix(f".{os.getpid()}")
        try:
            payload, _, out_tree = serialize_executable.serialize(compiled)
            self._folder.mkdir(parents=True, exist_ok=True)
            part.write_bytes(pickle.dumps((payload, out_tree)))
            part.replace(file)
        except Exception as error:  # no room, or a program that cannot be written
            with contextlib.suppress(OSError):
                part.unlink()
            _log.info("%s is not kept: %s", file, error)

    def _file(self, key: Hashable, args: tuple[Any, ...]) -> Path:
        shapes = [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(args)]
        text = repr((key, shapes, str(jax.tree.structure(args)), _surroundings()))
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()}.bin"


def of_this_machine() -> ExecutableCache | None:
    """The cache beside JAX's own; None where that is off, and on CPUs, whose programs are quickly traced."""
    folder = jax.config.jax_compilation_cache_dir
    if folder is None or jax.default_backend() == "cpu":
        return None
    return ExecutableCache(Path(folder) / "executables")


@functools.cache
def _surroundings() -> tuple[str, ...]:
    """Everything but the program itself that decides what is compiled."""
    device = jax.devices()[0]
    flags = tuple(f"{name}={os.environ.get(name, '')}" for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"))
    return (
        jax.__version__, importlib.metadata.version("jaxlib"), device.device_kind, device.client.platform_version,
        *flags, _source_digest(),
    )  # fmt: skip


def _source_digest() -> str:
    import lychee_jax
    import pallas_kernels

    digest = hashlib.sha256()
    for package in (lychee_jax, pallas_kernels):
        assert package.__file__ is not None
        for file in sorted(Path(package.__file__).parent.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()
