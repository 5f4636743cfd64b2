"""Array ops of hybrid-head decoding (LycheeDecode, arXiv 2602.04541); they know no model, no config, no head map."""

from pallas_kernels.dispatch import (
    dense_decode,
    extend_attention,
    hybrid_decode,
    recorded,
    select_pages,
    sparse_decode,
)  # fmt: skip
from pallas_kernels.interpret import interpreted
from pallas_kernels.types import KVPages, Selection, SelectionSpec
from pallas_kernels.xla.decode import MASKED

__all__ = [
    "MASKED",
    "KVPages",
    "Selection",
    "SelectionSpec",
    "dense_decode",
    "extend_attention",
    "hybrid_decode",
    "interpreted",
    "recorded",
    "select_pages",
    "sparse_decode",
]
