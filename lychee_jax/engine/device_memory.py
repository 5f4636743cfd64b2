"""How much memory a cache may take."""

from typing import Any

import jax

from lychee_jax.parallel.layouts import bytes_on_a_device

ACCELERATOR_SHARE = 0.85
"""Of the memory that weights leave on an accelerator, what the cache takes by default."""


def free_memory(weights: tuple[Any, ...]) -> int:
    """Bytes that a cache may take on each accelerator: most of what weights leave, which need not be there yet."""
    stats = jax.local_devices()[0].memory_stats() or {}
    used = max(stats.get("bytes_in_use", 0), sum(map(bytes_on_a_device, weights)))
    # In whole GiB, so that the little that is in use besides makes no other programs.
    return int(ACCELERATOR_SHARE * (stats.get("bytes_limit", 0) - used)) >> 30 << 30
