"""What is static about one launch of the attention kernel: tiles, the split over cores, and the memory they take."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_tpu.chip import LANES, SUBLANES
from pallas_kernels.mosaic_tpu.config import TpuConfig
from pallas_kernels.types import KVDtype, KVPages, PageScore

# Scalar memory is 1 MiB; the compiler wants some of it.
_SMEM_BYTES = 960 * 1024


@dataclasses.dataclass(frozen=True)
class Launch:
    """Everything static about one launch."""

    batch: int
    kv_heads: int
    heads: int  # that the launch computes
    groups: int
    page_size: int
    head_dim: int
    max_pages: int  # that the list of a head can have
    sparse: bool  # lists are selections, and not the page table
    cores: int
    scale: float = 1.0
    scores: PageScore | None = None
    return_lse: bool = False
    dense_rows: bool = False  # sparse only: rows may be flagged to read all of the page table
    exact: bool = False  # float32 products
    quantized: KVDtype | None = None  # pages hold words of 8-bit numbers
    prefetch_rows: bool = False  # a row's last step fetches the first of the next row, whose lists are known then
    config: TpuConfig = TpuConfig()

    @property
    def kv_splits(self) -> int:
        """Split-KV: 2 where the cores share every head's context, 1 where they share the heads."""
        return self.cores if self.heads % self.cores and not self.sparse else 1

    @property
    def core_heads(self) -> int:
        """Heads that one core computes for every row."""
        return self.heads if self.kv_splits > 1 else -(-self.heads // self.cores)

    @property
    def queries(self) -> int:
        """Query rows of a KV head, padded to whole sublanes."""
        return -(-self.groups // SUBLANES) * SUBLANES

    @property
    def width(self) -> int:
        """Lanes of a query. Where keys and values share a tile of 128, both are multiplied whole."""
        return self.head_dim if self.quantized else max(LANES, self.head_dim)

    @property
    def scaled(self) -> bool:
        """Tokens have scales."""
        return self.quantized == "int8"

    @property
    def block_tokens(self) -> int:
        """Tokens of a KV block: a power of two of lanes, no more than the longest list needs."""
        tokens, most = LANES, min(self.config.block_tokens, self.config.block_pages * self.page_size)
        while tokens < most and tokens * self.config.step_blocks < self.max_pages * self.page_size:
            tokens *= 2
        return tokens

    @property
    def block_pages(self) -> int:
        """Pages of a KV block."""
        return self.block_tokens // self.page_size

    @property
    def step_pages(self) -> int:
        """Pages of a step, which one buffer holds."""
        return self.config.step_blocks * self.block_pages

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self.step_pages * self.page_size

    @property
    def score_rows(self) -> int:
        """Rows of 128 page scores, whole steps."""
        steps = -(-self.max_pages // self.step_pages)
        return -(-steps * self.step_pages // LANES)

    @property
    def writes_lse(self) -> bool:
        """Log-sum-exps leave the kernel: for the caller, or to merge the splits by."""
        return self.return_lse or self.kv_splits > 1


def smem_words(page_table: jax.Array, num_tokens: jax.Array, selected: jax.Array | None) -> tuple[int, int]:
    """Words of scalar memory: held throughout, and for the lists of one row (which Pallas buffers twice)."""
    lists = page_table.shape[1] + (0 if selected is None else math.prod(selected.shape[1:]))
    return math.prod(num_tokens.shape), lists


def fits_smem(held: int, lists: int, buffers: int) -> bool:
    """Whether the scalar memory has room for the lists of so many rows."""
    return 4 * (held + buffers * lists) <= _SMEM_BYTES


def vmem_bytes(launch: Launch, query: jax.Array, kv: KVPages) -> int:
    """What the kernel needs of the vector memory: its buffers, its blocks (twice), and room for values in flight."""
    page = launch.page_size * max(LANES, kv.data.shape[3]) * kv.data.dtype.itemsize
    if kv.scales is not None:
        page += max(LANES, kv.scales.shape[2]) * kv.scales.dtype.itemsize
    buffers = 2 * launch.step_pages * page
    width = max(LANES, launch.width)
    blocks = launch.kv_heads * launch.queries * width * query.dtype.itemsize
    blocks += launch.core_heads * launch.queries * (width + LANES) * 4
    if launch.scores is not None:
        blocks += launch.core_heads * max(launch.score_rows, SUBLANES) * LANES * 4
    return buffers + 2 * blocks + (6 << 20)


def check(
    launch: Launch,
    q: jax.Array,
    pool: jax.Array,
    page_table: jax.Array,
    num_tokens: jax.Array,
    selected: jax.Array | None,
) -> None:
    """Refuse what the kernel does not cover, by NotImplementedError."""
    held = (jnp.uint16,) if launch.quantized else (jnp.bfloat16, jnp.float32)
    if pool.dtype not in held or q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"mosaic_tpu reads bfloat16 and float32, not {pool.dtype} with {q.dtype} queries")
    if launch.head_dim not in (64, 128):
        raise NotImplementedError(f"mosaic_tpu covers head_dim 64 and 128, not {launch.head_dim}")
    if launch.page_size not in (16, 32, 64, 128):
        raise NotImplementedError(f"mosaic_tpu covers page sizes 16, 32, 64 and 128, not {launch.page_size}")
    if launch.scaled and launch.page_size < 64:
        raise NotImplementedError(f"mosaic_tpu covers int8 caches with pages of 64 and 128, not {launch.page_size}")
    if not fits_smem(*smem_words(page_table, num_tokens, selected), buffers=2):
        raise NotImplementedError(f"page tables of {page_table.shape[1]} entries do not fit the scalar memory")
