"""What a caller may choose: about a generation, about the engine; and the numbers that a platform decides."""

import dataclasses
from typing import Literal, get_args

import jax

from lychee_jax.arguments import check_int32, settle_numbers
from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.cache.allocator import next_power_of_two, pages_for
from lychee_jax.config import ModelConfig
from lychee_jax.engine.sampling_params import SamplingParams
from lychee_jax.engine.scheduler import ChunkSizes
from lychee_jax.errors import UserError
from pallas_kernels.dispatch import available
from pallas_kernels.types import KVDtype

AttentionMode = Literal["auto", "hybrid", "dense"]

_FAR = 1 << 40  # beyond every prompt


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """What the decode steps of a request read; requests that agree in it share programs.

    `heads`: who retrieves, None: every head. `hybrid` follows the selection rule at every length, `dense` reads
    everything, `auto` is hybrid that runs dense below a measured length.
    """

    mode: AttentionMode = "auto"
    heads: HeadMap | None = None
    policy: SelectionPolicy = dataclasses.field(default_factory=SelectionPolicy)

    def takes_dense_steps(self, length: int, dense_below: int) -> bool:
        """Whether a row whose cache holds `length` tokens reads all of them; other rows do not matter."""
        if self.mode == "dense" or self.heads is None or self.heads.is_dense:
            return self.mode != "hybrid" or self.heads is None
        if self.mode == "hybrid":
            return False
        budget = self.policy.budget
        return length < max(dense_below, budget + budget // 4)


def check_kv_dtype(kv_dtype: str | None) -> None:
    """Raise UserError if no cache is quantised like this; None is one that is not quantised."""
    if kv_dtype not in (None, *get_args(KVDtype)):
        raise UserError(f"kv_dtype is {kv_dtype!r}; use {' or '.join(get_args(KVDtype))}, or none at all")


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """What all requests of an engine share.

    Attributes:
        page_size: tokens of a page.
        correct_every: new tokens after which the cache of these is rewritten densely; 0: never. Fixes the block size.
        implementation: of the attention kernels; None takes what suits the platform.
        kv_dtype: of the cache, 8 bits a number: "int8" or "fp8"; None is the dtype of the activations.
        max_num_seqs: sequences that decode together.
        max_model_len: tokens of the longest sequence; None: the model's limit.
        cache_memory: bytes of the KV cache; None: most of the free memory of an accelerator; on a CPU up to 2 GiB, and
            more for a request that needs more.
        prefix_cache: pages of prompts are kept, and used again by prompts that begin alike.
    """

    page_size: int = 64
    correct_every: int = 0
    implementation: str | None = None
    max_num_seqs: int = 16
    max_model_len: int | None = None
    cache_memory: int | None = None
    prefix_cache: bool = True
    kv_dtype: KVDtype | None = None

    def __post_init__(self) -> None:
        if self.page_size < 1:
            raise UserError(f"page size is {self.page_size}; it must be at least 1")
        if self.correct_every < 0:
            raise UserError(f"correct_every is {self.correct_every}; it must be 0 (off) or a number of tokens")
        if self.implementation is not None and self.implementation not in available("hybrid_decode"):
            names = ", ".join(available("hybrid_decode"))
            raise UserError(f"implementation {self.implementation!r} is not available; this version has {names}")
        check_kv_dtype(self.kv_dtype)
        if self.max_num_seqs < 1:
            raise UserError(f"max_num_seqs is {self.max_num_seqs}; it must be at least 1")

    @property
    def extend_implementation(self) -> str | None:
        """What reads prompts and corrects caches: named kernels are for decoding, but "xla" keeps out all of them."""
        return "xla" if self.implementation == "xla" else None


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """Everything a caller may choose for a batch of prompts; `heads=None` lets every head retrieve, `eos_ids` end a
    row.
    """

    attention: AttentionMode = "auto"
    heads: HeadMap | None = None
    policy: SelectionPolicy = dataclasses.field(default_factory=SelectionPolicy)
    page_size: int = 64
    max_new_tokens: int = 128
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    eos_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    correct_every: int = 0
    implementation: str | None = None
    kv_dtype: KVDtype | None = None

    def __post_init__(self):
        settle_numbers(self)
        check_int32(self, "page_size", "max_new_tokens", "correct_every")
        if self.attention not in get_args(AttentionMode):
            raise UserError(f"attention is {self.attention!r}; use one of {', '.join(get_args(AttentionMode))}")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        self.policy.validate(self.page_size)
        _ = self.engine  # refuses what it does not know

    @property
    def engine(self) -> EngineOptions:
        """The part that an engine is made for."""
        return EngineOptions(self.page_size, self.correct_every, self.implementation, kv_dtype=self.kv_dtype)

    @property
    def attention_options(self) -> AttentionOptions:
        """The part that decides what decode steps read."""
        return AttentionOptions(self.attention, self.heads, self.policy)


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Numbers that were measured or must hold on a platform; tests pass others.

    Attributes:
        chunk_rungs: (until, tokens): how much of a prompt one program reads, by the chunk's start position. It bounds
            temporaries, and how long a decoding row waits for a prompt that is read beside it.
        chunk_unit: tokens that every chunk but a prompt's last is a multiple of (about; whole pages).
        prefill_rows: chunks of different prompts that one program may read, where `prefill_tokens` allows.
        prefill_tokens: rows × tokens of such a program: enough to fill the device.
        min_rows: rows that a decode program has at least; the others are idle. XLA's CPU backend multiplies a single
            row by another routine than several, and a row must not come out differently when it is alone. On GPUs XLA
            makes sums of products out of the products with a single row: a step of an 8 B model took 8.8 ms, not 5.2.
        correct_rows: rows that one pass of cache correction takes; 0: all of them. On CPUs a half-precision product of
            many rows rounds otherwise than that of one.
        block_steps: decode steps that one program runs before the host hears of them.
        blocks_ahead: blocks that are sent before the oldest is read, so that the device never waits for the host.
        dense_below: tokens below which `auto` decodes densely: up to the budget both read the same, and hybrid decoding
            selects besides. Measured on CPU and GPU (docs/laboratory.md), not on TPUs.
        logit_bytes: what logits, and the temporaries made of them, may take where those of a prompt are asked for.
        table_factor, batch_factor, chunk_factor: steps between the sizes of page tables, batches and ends of prompts
            that programs are compiled for. Kernels skip what is padding; XLA's attention on CPUs does not.
        min_table: columns that a page table has at least.
    """

    chunk_rungs: tuple[tuple[int, int], ...] = ((_FAR, 512),)
    chunk_unit: int = 512
    prefill_rows: int = 1
    prefill_tokens: int = 512
    min_rows: int = 1
    correct_rows: int = 0
    block_steps: int = 8
    blocks_ahead: int = 2
    dense_below: int = 16384
    logit_bytes: int = 256 << 20
    table_factor: int = 16
    batch_factor: int = 4
    chunk_factor: int = 2
    min_table: int = 1

    @classmethod
    def of(cls, platform: str, config: ModelConfig) -> "EngineConfig":
        """The numbers of a platform: "cpu", "gpu" or "tpu"."""
        if platform == "cpu":
            # XLA of JAX before 0.12 rounds half-precision products of up to two rows otherwise than those of more.
            early = jax.__version_info__ < (0, 12) and config.dtype != "float32"
            return cls(min_rows=4 if early else 2, correct_rows=1, dense_below=1024)
        # A chunk beside decoding rows takes up to two blocks' time on an H200 at the shape of Llama-3-8B.
        rungs = ((8192, 2048), (32768, 1024), (_FAR, 512))
        # Narrow models fill the device with several prompts only. More than this would be more programs to compile.
        tokens = 4096 if config.hidden_size >= 4096 else 8192
        return cls(
            rungs, prefill_rows=16, prefill_tokens=tokens, min_rows=2 if platform == "gpu" else 1, chunk_factor=4,
            min_table=16,
        )  # fmt: skip

    def chunks(self, page_size: int) -> ChunkSizes:
        """How prompts are cut into chunks of whole pages."""
        unit = page_size * max(1, self.chunk_unit // page_size)
        rungs = tuple((until, max(unit, size)) for until, size in self.chunk_rungs)
        return ChunkSizes(page_size, unit, rungs, self.chunk_factor)

    def batch_bucket(self, rows: int, max_num_seqs: int) -> int:
        """Rows of the smallest decode program that takes `rows`."""
        size = max(self.min_rows, 1)
        while size < rows:
            size *= self.batch_factor
        return max(self.min_rows, min(size, next_power_of_two(max_num_seqs)))

    def table_bucket(self, pages: int, max_pages: int) -> int:
        """Columns of the smallest page table that takes `pages`: the largest, or a power of the factor below it."""
        size = max_pages
        while size % self.table_factor == 0 and size // self.table_factor >= max(pages, self.min_table):
            size //= self.table_factor
        return size


def max_pages(tokens: int, page_size: int) -> int:
    """Columns of the largest page table: a power of two."""
    return next_power_of_two(pages_for(tokens, page_size))
