"""Modules under their former names, for one release: notebooks and documents imported them.

An import of a former name gives a module that looks its names up in their new homes, and a DeprecationWarning.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence
from typing import Any

MOVED: dict[str, tuple[str, ...]] = {
    "lychee_jax.gates": ("lychee_jax.training.gates",),
    "lychee_jax.generate": ("lychee_jax.engine.options", "lychee_jax.engine.outputs", "lychee_jax.engine.engine"),
    "lychee_jax.heads": ("lychee_jax.attention.head_map",),
    "lychee_jax.loaded": ("lychee_jax.llm",),
    "lychee_jax.plots": ("lychee_jax.plotting.attention",),
    "lychee_jax.reading": ("lychee_jax.engine.page_trace",),
    "lychee_jax.sampling": ("lychee_jax.engine.sampling_params",),
    "lychee_jax.selection": ("lychee_jax.attention.selection",),
    "lychee_jax.training.data": ("lychee_jax.data.facts",),
    "lychee_jax.training.language": ("lychee_jax.data.language",),
    "lychee_jax.training.pictures": ("lychee_jax.plotting.training",),
    "lychee_jax.training.questions": ("lychee_jax.data.questions",),
}
"""Former name → the modules that have its names now, in the order in which they are asked."""


class _Former(types.ModuleType):
    """A module that has nothing of its own."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            for home in map(importlib.import_module, MOVED[self.__name__]):
                if hasattr(home, name):
                    return getattr(home, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Asked last, so a module that exists is never hidden."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Former(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        homes = " and ".join(MOVED[module.__name__])
        warnings.warn(f"{module.__name__} has moved to {homes}", DeprecationWarning, stacklevel=2)


def install() -> None:
    """Let former names be imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
