"""The ops as Pallas TPU kernels, for v4 and newer; imported on first use only, see `pallas_kernels.dispatch`."""

from pallas_kernels.mosaic_tpu.dense_decode import dense_decode
from pallas_kernels.mosaic_tpu.extend import extend_attention
from pallas_kernels.mosaic_tpu.hybrid_decode import hybrid_decode
from pallas_kernels.mosaic_tpu.select import select_pages
from pallas_kernels.mosaic_tpu.sparse_decode import sparse_decode

__all__ = ["dense_decode", "extend_attention", "hybrid_decode", "select_pages", "sparse_decode"]
