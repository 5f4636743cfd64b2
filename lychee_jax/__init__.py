"""lychee-jax: long-context decoding in which attention heads have roles (LycheeDecode, arXiv 2602.04541)."""

import logging
from typing import TYPE_CHECKING, Any

from lychee_jax import _moved

if TYPE_CHECKING:
    from lychee_jax.attention.head_map import HeadMap
    from lychee_jax.attention.selection import SelectionPolicy
    from lychee_jax.engine.options import GenerateOptions
    from lychee_jax.llm import LLM, LoadedModel
    from lychee_jax.loading import load

__all__ = ["LLM", "GenerateOptions", "HeadMap", "LoadedModel", "SelectionPolicy", "load"]

_HOMES = {
    "GenerateOptions": "lychee_jax.engine.options",
    "HeadMap": "lychee_jax.attention.head_map",
    "LLM": "lychee_jax.llm",
    "LoadedModel": "lychee_jax.llm",
    "SelectionPolicy": "lychee_jax.attention.selection",
    "load": "lychee_jax.loading",
}

# What the library has to say goes where the program that uses it wants it; by default, nowhere.
logging.getLogger(__name__).addHandler(logging.NullHandler())
_moved.install()


def __getattr__(name: str) -> Any:
    """Import at first use: `import lychee_jax` alone, and with it `lychee --help`, must not wait for JAX."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
