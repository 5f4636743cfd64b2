"""The numbers to tune of the Hopper kernels; no result depends on them but by rounding."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How `attend` and `finish` use a multiprocessor.

    Args:
        compute_warpgroups: Warpgroups that compute tiles of the usual size, 1 or 2.
        tile_bytes: Shared memory for the tiles in flight.
        max_stages: How many tiles may be in flight: their page ids are held in registers.
        held_rows: Rows whose lengths a block keeps in registers, or loads at once.
        merge_warpgroups: Warpgroups of a block that merges.
        merge_least: The fewest pieces that a merging warpgroup loads at once. A load takes long, but many take hardly
            longer; with fewer the long row among short ones would wait.
        merge_most: The most, as many as registers hold.
        word_tokens: Tokens of a tile of 8-bit keys and values, unless a page has more, in multiples of 64: as many
            bytes as a tile of 16-bit ones. What a warpgroup waits for in a tile hardly depends on its size.
        inlined: 8-bit numbers become 16-bit ones by instructions of our own choice, not by the compiler's; the
            interpreter knows the latter only. Both give the same bits.
    """

    compute_warpgroups: int = 2
    tile_bytes: int = 192 * 1024
    max_stages: int = 8
    held_rows: int = 16
    merge_warpgroups: int = 4
    merge_least: int = 8
    merge_most: int = 36
    word_tokens: int = 128
    inlined: bool = True


@dataclasses.dataclass(frozen=True)
class ExtendConfig:
    """How `extend` uses a multiprocessor.

    Args:
        tile_bytes: Shared memory for the tiles in flight: three of them at head_dim 128.
        max_stages: How many tiles may be in flight.
        compute_registers: Registers of a thread that computes; 168 are there for each.
        fetch_registers: What the fetching warpgroup keeps of its own.
    """

    tile_bytes: int = 192 * 1024
    max_stages: int = 6
    compute_registers: int = 232
    fetch_registers: int = 40
