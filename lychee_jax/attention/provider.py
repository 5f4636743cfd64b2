"""How the retrieval heads of a decode step find their pages."""

import dataclasses
from typing import Protocol, runtime_checkable

import jax

import pallas_kernels
from pallas_kernels import KVPages, Selection, SelectionSpec
from pallas_kernels.types import Heads


@runtime_checkable
class SelectionProvider(Protocol):
    """Attention of layer `index` in a decode step: `heads` select pages, all other heads read what was selected.

    The arguments are those of `pallas_kernels.hybrid_decode`, the result is its result: `out [B, K, G, H]`, and the
    selection that goes on to the next layer. `index` is there because a provider may treat layers differently.
    """

    def __call__(
        self,
        index: int,
        q: jax.Array,
        kv: KVPages,
        page_table: jax.Array,
        lengths: jax.Array,
        selection: Selection,
        heads: Heads,
        spec: SelectionSpec,
        /,
        *,
        scale: float,
        dense: jax.Array | None,
        implementation: str | None,
    ) -> tuple[jax.Array, Selection]:
        """Attend, and hand the selection on."""
        ...


@dataclasses.dataclass(frozen=True)
class FullScan:
    """Retrieval heads read the whole cache and score every page in the same pass (LycheeDecode, arXiv 2602.04541)."""

    def __call__(
        self,
        index: int,
        q: jax.Array,
        kv: KVPages,
        page_table: jax.Array,
        lengths: jax.Array,
        selection: Selection,
        heads: Heads,
        spec: SelectionSpec,
        /,
        *,
        scale: float,
        dense: jax.Array | None,
        implementation: str | None,
    ) -> tuple[jax.Array, Selection]:
        """One fused op, the same in every layer."""
        del index
        return pallas_kernels.hybrid_decode(
            q, kv, page_table, lengths, selection, heads, spec, scale=scale, dense=dense, implementation=implementation
        )
