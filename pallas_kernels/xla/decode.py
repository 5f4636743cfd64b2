"""Every op in plain JAX: the meaning that kernels are held to, and the implementation wherever no kernel exists.

Shapes follow one convention: `q [B, K, G, H]`, a pool `kv_pages [num_pages, K, page_size, 2H]` with keys in `[..., :H]`
and values in `[..., H:]`, `page_table [B, P]` from logical to pool pages, `lengths [B]`, `heads [R]` the KV heads to
compute. Slots past a row's length, and pool pages that no row owns, may hold anything, NaN included.
"""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels.types import Heads, PageScore, Rule, Selection

# Stands for −∞: finite, so that a row in which everything is masked does not become NaN.
MASKED = -1e30

# Positions that one step of the loop over pages covers: bounds the temporaries, whatever the length.
_BLOCK_POSITIONS = 1024


def _attend(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    heads: Heads,
    pages: jax.Array | None,
    *,
    scale: float,
    page_scores: PageScore | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Attention of the heads `heads` over `pages [B, R, M]` (None: all pages in order), a block of pages at a time."""
    batch, _, groups, head_dim = q.shape
    page_size = kv_pages.shape[2]
    rows = heads.shape[0]
    capacity = page_table.shape[1] if pages is None else pages.shape[2]
    # Whatever the capacity, the same blocks: a row's sums must not depend on the longest row of its batch.
    step = max(1, _BLOCK_POSITIONS // page_size)
    padding = -capacity % step
    if pages is not None:
        pages = jnp.pad(pages, ((0, 0), (0, 0), (0, padding)), constant_values=-1)
    used = (lengths + page_size - 1) // page_size
    most = jnp.max(used) if pages is None else jnp.max(jnp.sum(pages >= 0, axis=-1, dtype=jnp.int32))
    # A page is multiplied whole: zeros in the query meet the values, and the output's first half is thrown away. That
    # is cheaper than cutting keys from values, which copies both.
    query = jnp.pad(q[:, heads].astype(jnp.float32) * scale, ((0, 0), (0, 0), (0, 0), (0, head_dim)))
    offsets = jnp.arange(page_size, dtype=jnp.int32)

    def block(i, carry):
        top, total, out, table = carry
        first = i * step
        if pages is None:
            logical = jnp.broadcast_to(first + jnp.arange(step, dtype=jnp.int32), (batch, rows, step))
        else:
            logical = jax.lax.dynamic_slice_in_dim(pages, first, step, axis=2)
        inside = (logical >= 0) & (logical < used[:, None, None])
        physical = jnp.take_along_axis(
            page_table[:, None, :], jnp.where(inside, logical, 0), axis=2, mode="promise_in_bounds"
        )
        tiles = kv_pages.at[jnp.where(inside, physical, 0), heads[None, :, None]].get(mode="promise_in_bounds")
        real = inside[..., None] & (logical[..., None] * page_size + offsets < lengths[:, None, None, None])
        tiles = jnp.where(real[..., None], tiles.astype(jnp.float32), 0.0)  # [B, R, step, page_size, 2H]
        tiles = tiles.reshape(batch, rows, step * page_size, 2 * head_dim)
        # The large operand on the left: XLA's CPU backend packs the right one anew.
        scores = jnp.einsum("brsh,brgh->brsg", tiles, query).swapaxes(2, 3)
        scores = scores.reshape(batch, rows, groups, step, page_size)
        scores = jnp.where(real[:, :, None], scores, MASKED)
        if table is not None:
            mean = jnp.mean(scores, axis=2)
            per_page = jnp.max(mean, axis=-1) if page_scores == "max" else jax.nn.logsumexp(mean, axis=-1)
            table = jax.lax.dynamic_update_slice_in_dim(table, per_page, first, axis=2)
        new_top = jnp.maximum(top, jnp.max(scores, axis=(-2, -1)))
        weights = jnp.where(real[:, :, None], jnp.exp(scores - new_top[..., None, None]), 0.0)
        shrink = jnp.exp(top - new_top)
        total = total * shrink + jnp.sum(weights, axis=(-2, -1))
        weights = weights.reshape(batch, rows, groups, step * page_size)
        return new_top, total, out * shrink[..., None] + jnp.einsum("brgs,brsh->brgh", weights, tiles), table

    lead = (batch, rows, groups)
    start = (
        jnp.full(lead, MASKED, jnp.float32),
        jnp.zeros(lead, jnp.float32),
        jnp.zeros((*lead, 2 * head_dim), jnp.float32),
        None if page_scores is None else jnp.full((batch, rows, capacity + padding), MASKED, jnp.float32),
    )
    _, total, out, table = jax.lax.fori_loop(0, (most + step - 1) // step, block, start)
    out = out[..., head_dim:] / jnp.maximum(total, 1e-30)[..., None]
    return out.astype(q.dtype), None if table is None else table[..., :capacity]


def dense_decode(
    q: Float[Array, "B K G H"],
    kv_pages: Float[Array, "num_pages K page_size HH"],
    page_table: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    heads: Int[Heads, " R"],
    *,
    scale: float,
    page_scores: PageScore | None = None,
) -> tuple[Float[Array, "B R G H"], Float32[Array, "B R P"] | None]:
    """Attention of KV heads `heads` over the whole cache, and in the same pass a score for every page.

    With `s_j = scale · mean_g(q_g · k_j)` (LycheeDecode, arXiv 2602.04541), a page's score is the maximum of its s_j
    ("max") or their log-sum-exp ("lse"); past the length it is unspecified. A row of length 0 gives zeros.
    """
    return _attend(q, kv_pages, page_table, lengths, heads, None, scale=scale, page_scores=page_scores)


def sparse_decode(
    q: Float[Array, "B K G H"],
    kv_pages: Float[Array, "num_pages K page_size HH"],
    page_table: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    selection: Selection,
    heads: Int[Heads, " R"],
    *,
    scale: float,
) -> Float[Array, "B R G H"]:
    """Attention of KV heads `heads` over the positions < length of the pages selected for each of them."""
    pages = selection.pages[:, heads]
    return _attend(q, kv_pages, page_table, lengths, heads, pages, scale=scale, page_scores=None)[0]


def page_limits(
    page_scores: Float32[Array, "B R P"],
    used: Int32[Array, " B"],
    forced: Array,
    *,
    budget_pages: int,
    rule: Rule,
    amount: float,
) -> Int32[Array, "B R"]:
    """How many pages each row may select, forced ones included: the rule, before ties and order.

    "budget": `budget_pages`; "ratio": ⌈amount · P⌉; "forced": only the forced pages; for the two rules on the softmax
    of s, `page_scores` are log-sum-exps: "top_p" counts the fewest pages (forced ones first, then by mass) that hold
    `amount` of the mass, "threshold" the forced pages and all others with a mass ≥ `amount`. Never above
    `budget_pages`, never below the number of forced pages.
    """
    batch, rows, capacity = page_scores.shape
    num_forced = jnp.sum(forced, axis=-1, dtype=jnp.int32)
    if rule == "budget":
        wanted = jnp.full((batch, 1), budget_pages, jnp.int32)
    elif rule == "ratio":
        # Exact at every length: 0.3 · 10 must not cost a fourth page because 0.3 is not a binary fraction.
        share = Fraction(str(amount))
        table = [math.ceil(share * count) for count in range(capacity + 1)]
        wanted = jnp.asarray(table, jnp.int32)[used][:, None]
    elif rule == "forced":
        wanted = jnp.zeros((batch, 1), jnp.int32)
    else:
        valid = jnp.arange(capacity, dtype=jnp.int32) < used[:, None, None]
        mass = jax.nn.softmax(jnp.where(valid, page_scores, MASKED), axis=-1)
        if rule == "threshold":
            wanted = num_forced[:, None] + jnp.sum(
                (mass >= amount) & valid & ~forced[:, None, :], axis=-1, dtype=jnp.int32
            )
        else:
            free = jnp.where(valid & ~forced[:, None, :], mass, 0.0)
            held = jnp.sum(jnp.where(forced[:, None, :], mass, 0.0), axis=-1, keepdims=True)
            ranked = -jnp.sort(-free, axis=-1)
            before = held + jnp.cumsum(ranked, axis=-1) - ranked
            wanted = num_forced[:, None] + jnp.sum((before < amount) & (ranked > 0.0), axis=-1, dtype=jnp.int32)
    limit = jnp.clip(wanted, num_forced[:, None], jnp.minimum(budget_pages, used)[:, None])
    return jnp.broadcast_to(limit, (batch, rows))


def select_pages(
    page_scores: Float32[Array, "B R P"],
    lengths: Int[Array, " B"],
    *,
    page_size: int,
    budget_pages: int,
    sink_pages: int,
    recent_pages: int,
    rule: Rule = "budget",
    amount: float = 0.0,
) -> tuple[Int32[Array, "B R M"], Int32[Array, "B R"]]:
    """Pick pages by score: `pages [B, R, M]` ascending and padded with −1, `counts [B, R]`; M = `budget_pages`.

    The first `sink_pages` and last `recent_pages` pages of a row are forced; the rest of its share goes to the highest
    scores, ties to the lower page. A row whose pages all fit takes them all. `rule` and `amount`: see `page_limits`.
    """
    capacity = page_scores.shape[2]
    used = ((lengths + page_size - 1) // page_size).astype(jnp.int32)
    page = jnp.arange(capacity, dtype=jnp.int32)
    forced = (page < sink_pages) | (page >= used[:, None] - recent_pages)
    forced = forced & (page < used[:, None])
    limits = page_limits(page_scores, used, forced, budget_pages=budget_pages, rule=rule, amount=amount)
    # top_k orders −0.0 below 0.0; for the rule they tie.
    key = jnp.where(page_scores == 0.0, 0.0, page_scores)
    key = jnp.where(forced[:, None, :], jnp.inf, key)
    key = jnp.where(page < used[:, None, None], key, -jnp.inf)
    width = min(budget_pages, capacity)
    _, best = jax.lax.top_k(key, width)  # equal keys: the lower page first
    kept = jnp.arange(width, dtype=jnp.int32) < limits[..., None]
    pages = jnp.sort(jnp.where(kept, best.astype(jnp.int32), capacity), axis=-1)
    pages = jnp.where(pages < capacity, pages, -1)
    pages = jnp.pad(pages, ((0, 0), (0, 0), (0, budget_pages - width)), constant_values=-1)
    return pages, limits


def other_heads(heads: Int[Heads, " R"], kv_heads: int) -> Int32[Array, " rest"]:
    """The KV heads that `heads` does not name, ascending."""
    named = jnp.zeros((kv_heads,), jnp.int32).at[heads].set(1)
    return jnp.argsort(named, stable=True)[: kv_heads - heads.shape[0]].astype(jnp.int32)


def hybrid_decode(
    q: Float[Array, "B K G H"],
    kv_pages: Float[Array, "num_pages K page_size HH"],
    page_table: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    selection: Selection,
    heads: Int[Heads, " R"],
    *,
    scale: float,
    budget_pages: int,
    sink_pages: int,
    recent_pages: int,
    rule: Rule = "budget",
    amount: float = 0.0,
    page_scores: PageScore = "max",
) -> tuple[Float[Array, "B K G H"], Selection]:
    """One layer's attention: `heads` retrieve and replace their entry of the selection, all others read the pages
    that `selection` holds for their own index and hand them on.
    """
    kv_heads = q.shape[1]
    out = jnp.zeros_like(q)
    if heads.shape[0] < kv_heads:
        sparse = other_heads(heads, kv_heads)
        out = out.at[:, sparse].set(sparse_decode(q, kv_pages, page_table, lengths, selection, sparse, scale=scale))
    if heads.shape[0] > 0:
        dense, scores = dense_decode(q, kv_pages, page_table, lengths, heads, scale=scale, page_scores=page_scores)
        assert scores is not None
        pages, counts = select_pages(
            scores, lengths, page_size=kv_pages.shape[2], budget_pages=budget_pages, sink_pages=sink_pages,
            recent_pages=recent_pages, rule=rule, amount=amount,
        )  # fmt: skip
        out = out.at[:, heads].set(dense)
        selection = Selection(selection.pages.at[:, heads].set(pages), selection.counts.at[:, heads].set(counts))
    return out, selection
