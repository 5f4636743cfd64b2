"""Pallas kernels for NVIDIA Hopper GPUs.

Decoding: `attend` reads, `finish` merges and selects. Prefill: `extend`.
"""

from pallas_kernels.mosaic_gpu.ops import dense_decode, extend_attention, hybrid_decode, select_pages, sparse_decode

__all__ = ["dense_decode", "extend_attention", "hybrid_decode", "select_pages", "sparse_decode"]
