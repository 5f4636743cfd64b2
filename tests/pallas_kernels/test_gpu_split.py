"""Split-KV of the GPU kernels in plain numbers: every tile once, every piece a number of its own, pages of the pool."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mosaic_gpu import attend
from pallas_kernels.mosaic_gpu.common import Refs
from pallas_kernels.mosaic_gpu.config import DecodeConfig
from pallas_kernels.mosaic_gpu.merge import find_pieces
from pallas_kernels.mosaic_gpu.split import SplitPlan, TileList
from pallas_kernels.mosaic_gpu.walk import Fetch, Piece


@pytest.mark.parametrize("groups", range(1, 9))
def test_the_queries_of_a_head_lie_in_one_tile_of_eight_rows(groups: int) -> None:
    """A copy of eight rows brings zeros for those past the tile that it begins in; the interpreter brings the rows."""
    q = np.random.default_rng(groups).standard_normal((2, 3, groups, 64)).astype(np.float32)
    rows, stride = attend.query_rows(jnp.asarray(q))
    assert rows.shape[0] % 8 == 0
    for number, head in enumerate(q.reshape(6, groups, 64)):
        first = number * stride
        end = first // 8 * 8 + 8
        np.testing.assert_array_equal(np.asarray(rows)[first : min(first + 8, end)][:groups], head)


@pytest.mark.parametrize(
    ("batch", "call"),
    [(1, "hybrid"), (5, "hybrid"), (20, "dense rows"), (9, "dense rows"), (5, "dense"), (5, "sparse")],
)
def test_pieces_cover_every_tile_once_and_have_numbers_of_their_own(batch: int, call: str) -> None:
    """The walk of all blocks, in plain numbers: five of eight heads are named where not all are known."""
    rng = np.random.default_rng(batch)
    lengths = rng.integers(0, 5000, batch)
    flags = rng.integers(0, 2, batch) if call == "dense rows" else np.zeros(batch, int)
    slots, selected = {"dense": ((8, 0), 0), "sparse": ((0, 8), 12)}.get(call, ((2, 6), 12))
    plan = SplitPlan(batch, 8, *slots, selected, 64, 13, DecodeConfig(), padded=call in ("dense", "sparse"))
    given = {"lengths": jnp.asarray(lengths, jnp.int32)}
    if call == "dense rows":
        given["dense_rows"] = jnp.asarray(flags, jnp.int32)
    if plan.padded:
        given["named"] = jnp.array([5], jnp.int32)

    @jax.jit
    def facts(given: dict[str, jax.Array]) -> Any:
        tiles = TileList(plan, Refs(given))
        every = jnp.arange(batch, dtype=jnp.int32)
        starts = jax.vmap(lambda b: tiles.row(b).start)(every)
        found = jax.vmap(lambda tile: tiles.locate(tile)[:4])(jnp.arange(0, 4000, 7, dtype=jnp.int32))
        pieces = jax.vmap(lambda b: jax.vmap(lambda j: pieces_of(b, j))(jnp.arange(8)))(every)
        return tiles.share, tiles.total, starts, found, pieces

    def pieces_of(row: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = find_pieces(plan, Refs(given), row, index.astype(jnp.int32))
        return found.first, found.count

    share, total, starts, located, pieces = jax.tree.map(np.asarray, facts(given))
    assert share * plan.blocks >= total > share * (plan.blocks - 1) - plan.blocks
    dense_heads = np.where(flags, 8, {"dense": 5, "sparse": 0}.get(call, 2))
    per_head = [
        [
            -(-length // 64) if head < reading else 0 if call != "hybrid" and plan.padded and head >= 5
            else min(-(-length // 64), selected)
            for head in range(8)
        ]
        for length, reading in zip(lengths.tolist(), dense_heads.tolist(), strict=True)
    ]  # fmt: skip
    ends = np.cumsum([sum(row) for row in per_head])
    assert starts.tolist() == [0, *ends[:-1]]
    for tile, row, start, length, reading in zip(range(0, 4000, 7), *located, strict=True):
        if tile < total:
            assert starts[row] == start <= tile < ends[row]
            assert (length, reading) == (lengths[row], dense_heads[row])
    numbers: set[int] = set()
    end = 0
    for b, row in enumerate(per_head):
        for head, tiles in enumerate(row):
            blocks = sorted({tile // share for tile in range(end, end + tiles)})
            end += tiles
            own = [b * 8 + head + block for block in blocks]
            assert not numbers.intersection(own)
            numbers.update(own)
            assert pieces[1][b, head] == len(own)
            assert not own or (pieces[0][b, head] == own[0] and own[-1] < plan.pieces)
    assert end == total


@pytest.mark.parametrize(
    ("batch", "dense", "sparse", "pages"), [(1, 1, 7, 2048), (1, 8, 0, 2048), (4, 2, 6, 900), (8, 0, 8, 2048)]
)
def test_rows_of_one_length_have_no_more_pieces_than_are_merged_at_once(
    batch: int, dense: int, sparse: int, pages: int
) -> None:
    plan = SplitPlan(batch, 8, dense, sparse, 64, 64, 132, DecodeConfig())
    most = {True: 0, False: 0}
    for used in [*range(1, 140), *range(pages - 9, pages)]:
        length = jnp.int32(64 * used)
        heads = [int(plan.dense_tiles(length))] * dense + [int(plan.sparse_tiles(length))] * sparse
        ends = np.cumsum(heads * batch)
        share = -(-int(ends[-1]) // plan.blocks)
        pieces = (ends - 1) // share - (ends - heads * batch) // share + 1
        for number, found in enumerate(pieces):
            is_dense = number % plan.heads < dense
            most[is_dense] = max(most[is_dense], found)
    for is_dense, found in most.items():
        assert found <= plan.pieces_of(is_dense)
        if found and (is_dense or not dense):  # beside dense heads, sparse ones have fewer tiles than the bound thinks
            assert found >= 0.75 * plan.pieces_of(is_dense), "no bound to load by"


def test_wrong_page_ids_are_never_followed() -> None:
    """What the interpreter would hide: every page that is fetched lies inside the pool, whatever the table says."""
    wrong = jnp.array([[-1, 9, 2**31 - 1, -(2**31), 3, 8]], jnp.int32)
    selected = jnp.array([[[-1, 2, 5, 7, 2**31 - 1, -(2**31)]]], jnp.int32)
    refs = Refs({"page_table": wrong, "pages": selected})
    for sparse in (0, 1):
        fetch = Fetch(SplitPlan(1, 1, 1 - sparse, sparse, 6, 64, 4, DecodeConfig()), refs, 9, 6, 2)
        number = jnp.int32(0)
        for length in (1, 64 * 6):
            dense = jnp.bool_(not sparse)
            piece = Piece(number, number, number, dense, dense, number, number, jnp.int32(length), number)
            logical = [fetch.logical(piece, jnp.int32(tile)) for tile in range(6)]
            assert all(0 <= int(page) < 9 for pages in logical for page in fetch.physical(piece, pages))
            if sparse:  # none of the wrong ones counts as a page, not even one whose first token is beyond int32
                real = [int(page) for (page,) in logical if int(page) >= 0]
                assert real == ([2, 5] if length > 64 else [])
