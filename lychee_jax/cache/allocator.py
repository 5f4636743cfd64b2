"""Who owns which page of the pool: host only, no JAX."""

import dataclasses

import numpy as np


def pages_for(tokens: int, page_size: int) -> int:
    """Pages that hold `tokens` positions."""
    return -(-tokens // page_size)


def next_power_of_two(n: int) -> int:
    """The least power of two ≥ n (≥ 1)."""
    return 1 << max(0, n - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """Which pool pages every row owns: `page_table [B, P]`, and the size of the pools.

    P is a power of two, and the pool grows in eighths of one as long as these are at most 128 pages, later in steps of
    128 pages or a 64th: prompts of similar length share one compiled program, and a large pool wastes little.
    """

    page_table: np.ndarray
    num_pages: int

    @classmethod
    def plan(cls, tokens: list[int], page_size: int, *, shared: int = 0) -> "CacheLayout":
        """Give row b pages for `tokens[b]` positions; the first `shared` pages of all rows are the same ones."""
        needs = [pages_for(n, page_size) for n in tokens]
        capacity = next_power_of_two(max(needs))
        total = shared + sum(n - shared for n in needs)
        power = next_power_of_two(total)
        grain = max(1, min(power // 8, max(128, power // 64)))
        # Entries past a row's need are never followed; page 0 keeps them inside the pool all the same.
        table = np.zeros((len(needs), capacity), np.int32)
        free = shared
        for row, need in enumerate(needs):
            table[row, :shared] = np.arange(shared)
            table[row, shared:need] = np.arange(free, free + need - shared)
            free += need - shared
        return cls(table, -(-total // grain) * grain + len(needs))
