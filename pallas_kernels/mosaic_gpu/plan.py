"""How the tiles of all rows and heads are dealt out to the blocks of one launch.

The work of a call is one list of tiles: row after row, in each row head after head, in each head tile after tile. Every
block takes an equal share of consecutive tiles, whatever head they belong to, so that one head with a long cache keeps
the whole chip busy. The part of a block's share that lies in one head is a *piece*; a later launch merges the pieces.
Head `j` of row `b` is segment `s = b · heads + j`, and the piece of block `c` in it has the number `s + c`: both only
grow along the list and one of them grows at every new piece, so that no two pieces share a number.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Tokens of a tile, unless a page has more: 32 KiB at head_dim 128. Blocks differ by at most one tile.
TILE_TOKENS = 64
# Rows whose lengths a block keeps in registers, or loads at once.
_HELD_ROWS = 16


@dataclasses.dataclass(frozen=True)
class Tiling:
    """What is static about a call: `dense` heads that read everything and `sparse` ones that read `selected` pages.

    A tile is what one step of a block reads: some whole pages. `kv_heads` counts all heads of the pool.
    """

    batch: int
    kv_heads: int
    dense: int
    sparse: int
    selected: int
    page_size: int
    blocks: int

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile."""
        return max(TILE_TOKENS, self.page_size)

    @property
    def pages_per_tile(self) -> int:
        """Pages of a tile."""
        return self.tile_tokens // self.page_size

    @property
    def heads(self) -> int:
        """KV heads that the call computes."""
        return self.dense + self.sparse

    @property
    def pieces(self) -> int:
        """A bound on the numbers of pieces."""
        return self.batch * self.heads + self.blocks

    def pieces_of(self, dense: bool) -> int:
        """A bound on the pieces of a dense or of a sparse head if all rows are equally long."""
        # No head has more than its share of the tiles of the heads that are at least as long.
        as_long = self.batch * (self.dense if dense else self.heads) or 1
        return min(-(-self.blocks // as_long) + 1, self.blocks)

    def dense_tiles(self, length: jax.Array) -> jax.Array:
        """Tiles of a dense head over `length` tokens."""
        return (length + self.tile_tokens - 1) // self.tile_tokens

    def sparse_tiles(self, length: jax.Array) -> jax.Array:
        """Tiles set aside for a sparse head of a row of `length` tokens; it may have selected fewer pages."""
        used = (length + self.page_size - 1) // self.page_size
        return (jnp.minimum(used, self.selected) + self.pages_per_tile - 1) // self.pages_per_tile


class Rows:
    """Where the rows' tiles lie in the list of all tiles; every block works it out for itself from the lengths."""

    def __init__(self, tiling: Tiling, lengths: Any):
        self.tiling, self.lengths = tiling, lengths
        self.held = [lengths[b] for b in range(tiling.batch)] if tiling.batch <= _HELD_ROWS else None
        total = self._fold(lambda b, length, sum: sum + self.tiles(length), jnp.int32(0))
        self.share = jnp.maximum((total + tiling.blocks - 1) // tiling.blocks, 1)
        self.total = total

    def tiles(self, length: jax.Array) -> jax.Array:
        """Tiles of a row."""
        tiling = self.tiling
        return tiling.dense * tiling.dense_tiles(length) + tiling.sparse * tiling.sparse_tiles(length)

    def _fold(self, fold: Callable[[Any, jax.Array, Any], Any], state: Any) -> Any:
        """Fold `fold(row, length, state)` over all rows."""
        if self.held is not None:
            for b, length in enumerate(self.held):
                state = fold(jnp.int32(b), length, state)
            return state

        def several(i: jax.Array, state: Any) -> Any:
            # Many loads at once take hardly longer than one.
            rows = [i * _HELD_ROWS + u for u in range(_HELD_ROWS)]
            lengths = [self.lengths[jnp.minimum(b, self.tiling.batch - 1)] for b in rows]
            for b, length in zip(rows, lengths, strict=True):
                state = fold(b, jnp.where(b < self.tiling.batch, length, 0), state)
            return state

        return jax.lax.fori_loop(0, -(-self.tiling.batch // _HELD_ROWS), several, state)

    def locate(self, tile: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The row of a tile, the row's first tile, and its length."""

        def fold(b: Any, length: jax.Array, state: Any) -> Any:
            start, found = state
            mine = (tile >= start) & (length > 0)
            found = tuple(jnp.where(mine, new, old) for new, old in zip((b, start, length), found, strict=True))
            return start + self.tiles(length), found

        return self._fold(fold, (jnp.int32(0), (jnp.int32(0),) * 3))[1]

    def start(self, row: jax.Array) -> jax.Array:
        """The first tile of a row."""
        return self._fold(lambda b, length, sum: sum + jnp.where(b < row, self.tiles(length), 0), jnp.int32(0))
