"""Pallas kernels for NVIDIA Hopper GPUs and newer: `attend` reads, `finish` merges and selects."""

from pallas_kernels.mosaic_gpu.ops import dense_decode, hybrid_decode, select_pages, sparse_decode

__all__ = ["dense_decode", "hybrid_decode", "select_pages", "sparse_decode"]
