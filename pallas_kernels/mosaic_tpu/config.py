"""What can be tuned in the TPU kernels."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TpuConfig:
    """Sizes of the kernels' tiles and loops; results do not depend on them, but for the order of float32 sums.

    Attributes:
        block_tokens: tokens of a KV block at most, a power of two from 128 on. The schedules of v5e, v5p and v6e are
            shortest with these blocks, four to a step.
        block_pages: pages of a KV block at most: every one of them is a DMA to start, in code of its own.
        step_blocks: KV blocks of a step, each with a softmax accumulator of its own.
        dma_unroll: DMAs that a loop starts at once, where nothing else is there to do meanwhile.
        select_chunk: pages that one straight piece of `select_pages` covers, a multiple of 128.
        select_places: places of the result that one pass over the pages fills, a power of two up to 128.
        select_bits: bits of the threshold that one round decides: more candidates to count, fewer sums over lanes to
            wait for. A divisor of 32.
        prefill_query_block, prefill_key_block: tokens of a block of splash attention.
    """

    block_tokens: int = 1024
    block_pages: int = 32
    step_blocks: int = 4
    dma_unroll: int = 8
    select_chunk: int = 2048
    select_places: int = 32
    select_bits: int = 2
    prefill_query_block: int = 512
    prefill_key_block: int = 1024
