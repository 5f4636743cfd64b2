"""lychee-jax: long-context decoding in which attention heads have roles (LycheeDecode, arXiv 2602.04541)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lychee_jax.attention.head_map import HeadMap
    from lychee_jax.attention.selection import SelectionPolicy
    from lychee_jax.engine.options import GenerateOptions
    from lychee_jax.loading import LoadedModel, load

__all__ = ["GenerateOptions", "HeadMap", "LoadedModel", "SelectionPolicy", "load"]

_HOMES = {
    "GenerateOptions": "lychee_jax.engine.engine",
    "HeadMap": "lychee_jax.attention.head_map",
    "LoadedModel": "lychee_jax.loading",
    "SelectionPolicy": "lychee_jax.attention.selection",
    "load": "lychee_jax.loading",
}


def __getattr__(name: str) -> Any:
    """Import at first use: `import lychee_jax` alone, and with it `lychee --help`, must not wait for JAX."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
