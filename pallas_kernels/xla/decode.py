"""The decode ops in plain JAX: the meaning that kernels are held to, and the implementation wherever no kernel exists.

Shapes follow one convention: `q [B, K, G, H]`; a cache `kv` of one layer, whose `data [num_pages, K, page_size, 2H]`
has keys in `[..., :H]` and values in `[..., H:]`, or which is quantised (see `KVPages`); `page_table [B, P]` from
logical to pool pages; `lengths [B]`; `heads [R]` the KV heads to compute, −1 for none. Slots past a row's length, and
pool pages that no row owns, may hold anything, NaN included.
"""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from pallas_kernels.types import Heads, KVPages, PageScore, Selection, SelectionSpec
from pallas_kernels.xla.config import XlaConfig
from pallas_kernels.xla.quantized import keys_and_values

# Stands for −∞: finite, so that a row in which everything is masked does not become NaN.
MASKED = -1e30


def _attend(
    q: jax.Array,
    kv: KVPages,
    page_table: jax.Array,
    lengths: jax.Array,
    heads: Heads,
    pages: jax.Array | None,
    *,
    scale: float,
    page_scores: PageScore | None,
    config: XlaConfig,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Attention of the heads `heads` over `pages [B, R, M]` (None: all pages in order), a block of pages at a time.

    Output `[B, R, G, H]`, page scores `[B, R, P]` and log-sum-exp `[B, R, G]`.
    """
    batch, _, groups, head_dim = q.shape
    page_size = kv.page_size
    rows = heads.shape[0]
    capacity = page_table.shape[1] if pages is None else pages.shape[2]
    # Whatever the capacity, the same blocks: a row's sums must not depend on the longest row of its batch.
    step = max(1, config.decode_block // page_size)
    padding = -capacity % step
    # A head of −1 has no positions: nothing is read for it, and its output is zero as at length 0.
    lengths = jnp.where(heads >= 0, lengths[:, None], 0)  # [B, R]
    heads = jnp.maximum(heads, 0)
    used = (lengths + page_size - 1) // page_size
    if pages is None:
        most = jnp.max(used, initial=0)
    else:
        pages = jnp.pad(pages, ((0, 0), (0, 0), (0, padding)), constant_values=-1)
        most = jnp.max(jnp.sum((pages >= 0) & (used[..., None] > 0), axis=-1, dtype=jnp.int32), initial=0)
    query, width = q[:, heads].astype(jnp.float32) * scale, head_dim
    if kv.quantized is None:
        # A page is multiplied whole: zeros in the query meet the values, and the output's first half is thrown away.
        # That is cheaper than cutting keys from values, which copies both.
        query, width = jnp.pad(query, ((0, 0), (0, 0), (0, 0), (0, head_dim))), 2 * head_dim
    offsets = jnp.arange(page_size, dtype=jnp.int32)

    def block(i, carry):
        top, total, out, table = carry
        first = i * step
        if pages is None:
            logical = jnp.broadcast_to(first + jnp.arange(step, dtype=jnp.int32), (batch, rows, step))
        else:
            logical = jax.lax.dynamic_slice_in_dim(pages, first, step, axis=2)
        inside = (logical >= 0) & (logical < used[..., None])
        physical = jnp.take_along_axis(
            page_table[:, None, :], jnp.where(inside, logical, 0), axis=2, mode="promise_in_bounds"
        )
        where = jnp.where(inside, physical, 0), heads[None, :, None]
        tiles = kv.data.at[where].get(mode="promise_in_bounds")
        real = inside[..., None] & (logical[..., None] * page_size + offsets < lengths[..., None, None])
        tiles = jnp.where(real[..., None], tiles, jnp.zeros((), tiles.dtype))  # [B, R, step, page_size, …]
        tiles = tiles.reshape(batch, rows, step * page_size, -1)
        if kv.quantized is None:
            keys = values = tiles.astype(jnp.float32)
        else:
            keys, values = keys_and_values(tiles, kv.quantized, jnp.float32)
        # The large operand on the left: XLA's CPU backend packs the right one anew.
        scores = jnp.einsum("brsh,brgh->brsg", keys, query).swapaxes(2, 3)
        scores = scores.reshape(batch, rows, groups, step, page_size)
        scales = None
        if kv.scales is not None:
            scales = kv.scales.at[where].get(mode="promise_in_bounds")
            scales = scales.reshape(batch, rows, 1, step, 2, page_size)
            scores = scores * scales[..., 0, :]
        scores = jnp.where(real[:, :, None], scores, MASKED)
        if table is not None:
            mean = jnp.mean(scores, axis=2)
            per_page = jnp.max(mean, axis=-1) if page_scores == "max" else jax.nn.logsumexp(mean, axis=-1)
            table = jax.lax.dynamic_update_slice_in_dim(table, per_page, first, axis=2)
        new_top = jnp.maximum(top, jnp.max(scores, axis=(-2, -1)))
        weights = jnp.where(real[:, :, None], jnp.exp(scores - new_top[..., None, None]), 0.0)
        shrink = jnp.exp(top - new_top)
        total = total * shrink + jnp.sum(weights, axis=(-2, -1))
        if scales is not None:
            weights = weights * jnp.where(real[:, :, None], scales[..., 1, :], 0.0)
        weights = weights.reshape(batch, rows, groups, step * page_size)
        return new_top, total, out * shrink[..., None] + jnp.einsum("brgs,brsh->brgh", weights, values), table

    lead = (batch, rows, groups)
    start = (
        jnp.full(lead, MASKED, jnp.float32),
        jnp.zeros(lead, jnp.float32),
        jnp.zeros((*lead, width), jnp.float32),
        None if page_scores is None else jnp.full((batch, rows, capacity + padding), MASKED, jnp.float32),
    )
    top, total, out, table = jax.lax.fori_loop(0, (most + step - 1) // step, block, start)
    out = out[..., width - head_dim :] / jnp.maximum(total, 1e-30)[..., None]
    lse = jnp.where(total > 0.0, top + jnp.log(jnp.maximum(total, 1e-30)), MASKED)
    return out.astype(q.dtype), None if table is None else table[..., :capacity], lse


def dense_decode(
    q: Float[Array, "B K G H"],
    kv: KVPages,
    page_table: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    heads: Int[Heads, " R"],
    *,
    scale: float,
    page_scores: PageScore | None = None,
    return_lse: bool = False,
    config: XlaConfig = XlaConfig(),
) -> (
    tuple[Float[Array, "B R G H"], Float32[Array, "B R P"] | None]
    | tuple[Float[Array, "B R G H"], Float32[Array, "B R P"] | None, Float32[Array, "B R G"]]
):
    """Attention of KV heads `heads` over the whole cache, and in the same pass a score for every page.

    With `s_j = scale · mean_g(q_g · k_j)` (LycheeDecode, arXiv 2602.04541), a page's score is the maximum of its s_j
    ("max") or their log-sum-exp ("lse"); past the length it is unspecified. A row of length 0 gives zeros, and so does
    a head of −1. With `return_lse` also the natural log-sum-exp of every query head's scaled scores, by which the
    results of two parts of a cache are merged; `MASKED` where nothing was read.
    """
    out, scores, lse = _attend(
        q, kv, page_table, lengths, heads, None, scale=scale, page_scores=page_scores, config=config
    )
    return (out, scores, lse) if return_lse else (out, scores)


def sparse_decode(
    q: Float[Array, "B K G H"],
    kv: KVPages,
    page_table: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    selection: Selection,
    heads: Int[Heads, " R"],
    *,
    scale: float,
    return_lse: bool = False,
    config: XlaConfig = XlaConfig(),
) -> Float[Array, "B R G H"] | tuple[Float[Array, "B R G H"], Float32[Array, "B R G"]]:
    """Attention of KV heads `heads` over the positions < length of the pages selected for each of them.

    A head of −1, or without pages, gives zeros. `return_lse`: see `dense_decode`.
    """
    pages = selection.pages[:, jnp.maximum(heads, 0)]
    out, _, lse = _attend(q, kv, page_table, lengths, heads, pages, scale=scale, page_scores=None, config=config)
    return (out, lse) if return_lse else out


def page_limits(
    page_scores: Float32[Array, "B R P"],
    used: Int32[Array, " B"],
    forced: Bool[Array, "B P"],
    spec: SelectionSpec,
) -> Int32[Array, "B R"]:
    """How many pages each row may select, forced ones included: `spec.rule`, before ties and order.

    "budget": `budget_pages`; "ratio": ⌈amount · P⌉; "forced": only the forced pages; for the two rules on the softmax
    of s, `page_scores` are log-sum-exps: "top_p" counts the fewest pages (forced ones first, then by mass) that hold
    `amount` of the mass, "threshold" the forced pages and all others with a mass ≥ `amount`. Never above
    `budget_pages`, never below the number of forced pages.
    """
    batch, rows, capacity = page_scores.shape
    num_forced = jnp.sum(forced, axis=-1, dtype=jnp.int32)
    if spec.rule == "budget":
        wanted = jnp.full((batch, 1), spec.budget_pages, jnp.int32)
    elif spec.rule == "ratio":
        # Exact at every length: 0.3 · 10 must not cost a fourth page because 0.3 is not a binary fraction.
        share = Fraction(str(spec.amount))
        table = [math.ceil(share * count) for count in range(capacity + 1)]
        wanted = jnp.asarray(table, jnp.int32)[used][:, None]
    elif spec.rule == "forced":
        wanted = jnp.zeros((batch, 1), jnp.int32)
    else:
        valid = jnp.arange(capacity, dtype=jnp.int32) < used[:, None, None]
        mass = jax.nn.softmax(jnp.where(valid, page_scores, MASKED), axis=-1)
        if spec.rule == "threshold":
            wanted = num_forced[:, None] + jnp.sum(
                (mass >= spec.amount) & valid & ~forced[:, None, :], axis=-1, dtype=jnp.int32
            )
        else:
            free = jnp.where(valid & ~forced[:, None, :], mass, 0.0)
            held = jnp.sum(jnp.where(forced[:, None, :], mass, 0.0), axis=-1, keepdims=True)
            ranked = -jnp.sort(-free, axis=-1)
            before = held + jnp.cumsum(ranked, axis=-1) - ranked
            wanted = num_forced[:, None] + jnp.sum((before < spec.amount) & (ranked > 0.0), axis=-1, dtype=jnp.int32)
    limit = jnp.clip(wanted, num_forced[:, None], jnp.minimum(spec.budget_pages, used)[:, None])
    return jnp.broadcast_to(limit, (batch, rows))


def forced_pages(used: Int32[Array, " B"], capacity: int, spec: SelectionSpec) -> Bool[Array, "B P"]:
    """Which of a row's `used[b]` pages are always selected: the first `sink_pages` and the last `recent_pages`."""
    page = jnp.arange(capacity, dtype=jnp.int32)
    forced = (page < spec.sink_pages) | (page >= used[:, None] - spec.recent_pages)
    return forced & (page < used[:, None])


def select_pages(
    page_scores: Float32[Array, "B R P"],
    lengths: Int[Array, " B"],
    spec: SelectionSpec,
    *,
    page_size: int,
) -> tuple[Int32[Array, "B R M"], Int32[Array, "B R"]]:
    """Pick pages by score: `pages [B, R, M]` ascending and padded with −1, `counts [B, R]`; M = `spec.budget_pages`.

    The first `sink_pages` and last `recent_pages` pages of a row are forced; the rest of its share goes to the highest
    scores, ties to the lower page. A row whose pages all fit takes them all. The rules: see `page_limits`.
    """
    capacity = page_scores.shape[2]
    used = ((lengths + page_size - 1) // page_size).astype(jnp.int32)
    page = jnp.arange(capacity, dtype=jnp.int32)
    forced = forced_pages(used, capacity, spec)
    limits = page_limits(page_scores, used, forced, spec)
    # top_k orders −0.0 below 0.0; for the rule they tie.
    key = jnp.where(page_scores == 0.0, 0.0, page_scores)
    key = jnp.where(forced[:, None, :], jnp.inf, key)
    key = jnp.where(page < used[:, None, None], key, -jnp.inf)
    width = min(spec.budget_pages, capacity)
    _, best = jax.lax.top_k(key, width)  # equal keys: the lower page first
    kept = jnp.arange(width, dtype=jnp.int32) < limits[..., None]
    pages = jnp.sort(jnp.where(kept, best.astype(jnp.int32), capacity), axis=-1)
    pages = jnp.where(pages < capacity, pages, -1)
    pages = jnp.pad(pages, ((0, 0), (0, 0), (0, spec.budget_pages - width)), constant_values=-1)
    return pages, limits


def other_heads(heads: Int[Heads, " R"], kv_heads: int) -> Int[Heads, " rest"]:
    """The KV heads that `heads` does not name, ascending.

    Where `heads` is an array of the program its −1 entries are not known yet: K entries then, padded with −1.
    """
    if not isinstance(heads, Tracer):
        return np.setdiff1d(np.arange(kv_heads), np.asarray(heads)).astype(np.int32)
    ids = jnp.arange(kv_heads, dtype=jnp.int32)
    named = jnp.any(ids[:, None] == heads, axis=1)
    others = jnp.sort(jnp.where(named, kv_heads, ids))
    return jnp.where(others < kv_heads, others, -1)


def hybrid_decode(
    q: Float[Array, "B K G H"],
    kv: KVPages,
    page_table: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    selection: Selection,
    heads: Int[Heads, " R"],
    spec: SelectionSpec,
    *,
    scale: float,
    dense: Bool[Array, " B"] | None = None,
    config: XlaConfig = XlaConfig(),
) -> tuple[Float[Array, "B K G H"], Selection]:
    """Attention of one layer, every KV head by its role, and the selection that the layer hands up.

    The retrieval heads `heads` read all pages and replace their entry of `selection`; every other head reads the pages
    that `selection` holds for its own index and hands them on. Rows with `dense[b]` read all pages in every head: their
    output is `dense_decode`'s, bit for bit, and what they hand up is well-formed but means nothing. No row depends on
    what the others are.
    """
    kv_heads = q.shape[1]

    def put(whole: jax.Array, where: Heads, some: jax.Array) -> jax.Array:
        return whole.at[:, jnp.where(where < 0, kv_heads, where)].set(some, mode="drop")

    def attend(lengths: jax.Array, heads: Heads, pages: jax.Array | None, page_scores: PageScore | None):
        out, scores, _ = _attend(
            q, kv, page_table, lengths, heads, pages, scale=scale, page_scores=page_scores, config=config
        )
        return out, scores

    # Rows that a pass has nothing to do for have length 0 in it: a loop over pages ends with the longest row it is for.
    by_roles = lengths if dense is None else jnp.where(dense, 0, lengths)
    out = jnp.zeros_like(q)
    others = other_heads(heads, kv_heads)
    if others.shape[0] > 0:
        sparse, _ = attend(by_roles, others, selection.pages[:, jnp.maximum(others, 0)], None)
        out = put(out, others, sparse)
    if heads.shape[0] > 0:
        full, scores = attend(by_roles, heads, None, spec.page_score)
        assert scores is not None
        pages, counts = select_pages(scores, by_roles, spec, page_size=kv.page_size)
        out = put(out, heads, full)
        selection = Selection(put(selection.pages, heads, pages), put(selection.counts, heads, counts))
    if dense is not None:
        full, _ = attend(jnp.where(dense, lengths, 0), np.arange(kv_heads, dtype=np.int32), None, None)
        out = jnp.where(dense[:, None, None, None], full, out)
    return out, selection
