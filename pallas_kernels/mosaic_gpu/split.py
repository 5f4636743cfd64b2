"""Split-KV: how the tiles of all rows and heads are dealt out to the blocks of one launch.

The work of a call is one list of tiles: row after row, in each row head after head, in each head tile after tile. Every
block takes an equal share of consecutive tiles, whatever head they belong to, so that one head with a long cache keeps
the whole chip busy. The part of a block's share that lies in one head is a *piece*; a later launch merges the pieces.
Head `j` of row `b` is segment `s = b · heads + j`, and the piece of block `c` in it has the number `s + c`: both only
grow along the list and one of them grows at every new piece, so that no two pieces share a number.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu.common import Refs, quotient_up
from pallas_kernels.mosaic_gpu.config import DecodeConfig

# Tokens of a tile, unless a page has more: 32 KiB at head_dim 128. Blocks differ by at most one tile.
TILE_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class SplitPlan:
    """What is static about a call: `dense_heads` that read all pages and `sparse_heads` that read `selected` ones.

    A tile is what one step of a block reads: some whole pages, `least_tokens` or more. `kv_heads` counts all heads of
    the pool. `padded`: only the device knows how many of the heads that the call names there are; they come first, and
    these numbers bound them.
    """

    batch: int
    kv_heads: int
    dense_heads: int
    sparse_heads: int
    selected: int
    page_size: int
    blocks: int
    config: DecodeConfig
    padded: bool = False
    least_tokens: int = TILE_TOKENS

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile."""
        return max(self.least_tokens, self.page_size)

    @property
    def pages_per_tile(self) -> int:
        """Pages of a tile."""
        return self.tile_tokens // self.page_size

    @property
    def heads(self) -> int:
        """KV heads that the call computes."""
        return self.dense_heads + self.sparse_heads

    @property
    def selective(self) -> bool:
        """Whether any head may read selected pages."""
        return self.sparse_heads > 0 or (self.padded and self.selected > 0)

    @property
    def pieces(self) -> int:
        """A bound on the numbers of pieces."""
        return self.batch * self.heads + self.blocks

    def pieces_of(self, dense: bool) -> int:
        """A bound on the pieces of a dense or of a sparse head if all rows are equally long."""
        # No head has more than its share of the tiles of the heads that are at least as long.
        as_long = self.batch * (self.dense_heads if dense else self.heads) or 1
        return min(-(-self.blocks // as_long) + 1, self.blocks)

    def dense_tiles(self, length: jax.Array) -> jax.Array:
        """Tiles of a head that reads all pages of `length` tokens."""
        return quotient_up(length, self.tile_tokens)

    def sparse_tiles(self, length: jax.Array) -> jax.Array:
        """Tiles set aside for a sparse head of a row of `length` tokens; it may have selected fewer pages."""
        used = quotient_up(length, self.page_size)
        return quotient_up(jnp.minimum(used, self.selected), self.pages_per_tile)


class Row(NamedTuple):
    """A row in the list of tiles: its number, its first tile, its length, and how many of its heads read all pages.

    `flag`: whether it is a dense row; None where the call has none.
    """

    number: jax.Array
    start: jax.Array
    length: jax.Array
    dense_heads: int | jax.Array
    flag: jax.Array | None


class TileList:
    """The list of all tiles; every block works it out for itself.

    Reads `lengths [B]`; `dense_rows [B]` if there are any: not 0 for the rows all of whose heads read all pages; and
    `named [1]`, the number of heads that a padded call names.
    """

    def __init__(self, plan: SplitPlan, refs: Refs):
        self.plan, self.lengths = plan, refs.lengths
        self.flags = refs.dense_rows if hasattr(refs, "dense_rows") else None
        self.dense_heads: int | jax.Array = plan.dense_heads
        self.sparse_heads: int | jax.Array = plan.sparse_heads
        if plan.padded:
            named = refs.named[0]
            self.dense_heads, self.sparse_heads = (named, plan.heads - named) if plan.dense_heads else (0, named)
        held = plan.batch <= plan.config.held_rows
        self.held = [self._load(b) for b in range(plan.batch)] if held else None
        total = self._fold(lambda b, row, sum: sum + self._tiles(row), jnp.int32(0))
        self.share = jnp.maximum(quotient_up(total, plan.blocks), 1)
        self.total = total

    def _load(self, row: Any) -> jax.Array:
        """The length of a row, its complement if the row is dense: one register for both."""
        length = self.lengths[row]
        return length if self.flags is None else jnp.where(self.flags[row] != 0, ~length, length)

    def _length(self, held: jax.Array) -> jax.Array:
        return held if self.flags is None else held ^ (held >> 31)

    def _tiles(self, held: jax.Array) -> jax.Array:
        plan, length = self.plan, self._length(held)
        dense_tiles = plan.dense_tiles(length)
        tiles = self.dense_heads * dense_tiles + self.sparse_heads * plan.sparse_tiles(length)
        return tiles if self.flags is None else jnp.where(held < 0, plan.heads * dense_tiles, tiles)

    def _fold(self, fold: Callable[[Any, jax.Array, Any], Any], state: Any) -> Any:
        """Fold `fold(row, what is held of it, state)` over all rows."""
        if self.held is not None:
            for b, held in enumerate(self.held):
                state = fold(jnp.int32(b), held, state)
            return state
        batch, at_once = self.plan.batch, self.plan.config.held_rows

        def several(i: jax.Array, state: Any) -> Any:
            # Many loads at once take hardly longer than one.
            rows = [i * at_once + u for u in range(at_once)]
            loaded = [self._load(jnp.minimum(b, batch - 1)) for b in rows]
            for b, held in zip(rows, loaded, strict=True):
                state = fold(b, jnp.where(b < batch, held, 0), state)
            return state

        return jax.lax.fori_loop(0, -(-batch // at_once), several, state)

    def locate(self, tile: jax.Array) -> Row:
        """The row of a tile."""

        def fold(b: Any, held: jax.Array, state: Any) -> Any:
            start, found = state
            mine = (tile >= start) & (self._length(held) > 0)
            found = tuple(jnp.where(mine, new, old) for new, old in zip((b, start, held), found, strict=True))
            return start + self._tiles(held), found

        row, start, held = self._fold(fold, (jnp.int32(0), (jnp.int32(0),) * 3))[1]
        return Row(row, start, self._length(held), *self._roles(held))

    def row(self, number: jax.Array) -> Row:
        """A row by its number."""
        held = self._load(number)
        start = self._fold(lambda b, held, sum: sum + jnp.where(b < number, self._tiles(held), 0), jnp.int32(0))
        return Row(number, start, self._length(held), *self._roles(held))

    def _roles(self, held: jax.Array) -> tuple[int | jax.Array, jax.Array | None]:
        if self.flags is None:
            return self.dense_heads, None
        flag = held < 0
        return jnp.where(flag, jnp.int32(self.plan.heads), jnp.int32(self.dense_heads)), flag
