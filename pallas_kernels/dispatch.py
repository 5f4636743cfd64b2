"""The one place where an implementation is chosen, and the only one that may fall back to another.

`implementation=None` tries what suits the platform, best first; a candidate refuses a case that it does not cover by
raising NotImplementedError, and the next one is tried. A named implementation runs or raises. ValueError means bad
input and is never swallowed.
"""

import contextlib
import contextvars
import importlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import jax
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels.types import Heads, PageScore, Rule, Selection
from pallas_kernels.xla import decode as reference

Implementation = Literal["xla", "mosaic_tpu", "mosaic_gpu"]


def _lazy(package: str, op: str) -> Callable[..., Any]:
    """An op of a package of kernels that is imported when the op first runs."""
    return lambda *args, **options: getattr(importlib.import_module(package), op)(*args, **options)


_NAMES = ("dense_decode", "sparse_decode", "select_pages", "hybrid_decode")
_OPS: dict[str, dict[str, Callable[..., Any]]] = {
    "xla": {
        "dense_decode": reference.dense_decode,
        "sparse_decode": reference.sparse_decode,
        "select_pages": reference.select_pages,
        "hybrid_decode": reference.hybrid_decode,
    },
    "mosaic_gpu": {name: _lazy("pallas_kernels.mosaic_gpu", name) for name in (*_NAMES, "extend_attention")},
    "mosaic_tpu": {name: _lazy("pallas_kernels.mosaic_tpu", name) for name in (*_NAMES, "block_attention")},
}
_PREFERENCE: dict[str, tuple[str, ...]] = {
    "tpu": ("mosaic_tpu", "xla"),
    "gpu": ("mosaic_gpu", "xla"),
    "cpu": ("xla",),
}

_record: contextvars.ContextVar[list[tuple[str, str]] | None] = contextvars.ContextVar("_record", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[str, str]]]:
    """Collect (op, implementation) for every op traced inside the block (a cached compilation traces nothing)."""
    calls: list[tuple[str, str]] = []
    token = _record.set(calls)
    try:
        yield calls
    finally:
        _record.reset(token)


def available(op: str) -> tuple[str, ...]:
    """The implementations of an op that this version has."""
    return tuple(name for name, ops in _OPS.items() if op in ops)


def _run(op: str, implementation: str | None, *args: Any, **options: Any) -> Any:
    if implementation is None:
        platform = jax.default_backend()
        candidates = [name for name in _PREFERENCE.get(platform, ("xla",)) if op in _OPS.get(name, {})]
    elif implementation not in get_args(Implementation):
        names = ", ".join(get_args(Implementation))
        raise ValueError(f"implementation {implementation!r} is unknown; use one of {names}")
    elif op not in _OPS.get(implementation, {}):
        raise NotImplementedError(f"{op} has no {implementation!r} implementation; it has {', '.join(available(op))}")
    else:
        candidates = [implementation]
    for index, name in enumerate(candidates):
        try:
            result = _OPS[name][op](*args, **options)
        except NotImplementedError:
            if index + 1 == len(candidates):
                raise
            continue
        calls = _record.get()
        if calls is not None:
            calls.append((op, name))
        return result
    raise NotImplementedError(f"{op} has no implementation for {jax.default_backend()}")


def _check_pool(q: Array, kv_pages: Array, page_table: Array, lengths: Array, heads: Heads) -> None:
    batch, kv_heads, _, head_dim = q.shape
    if kv_pages.shape[1] != kv_heads or kv_pages.shape[3] != 2 * head_dim:
        raise ValueError(
            f"kv_pages {kv_pages.shape} does not fit q {q.shape}: "
            f"expected [num_pages, {kv_heads}, page_size, {2 * head_dim}]"
        )
    if page_table.shape[0] != batch or lengths.shape[0] != batch:
        raise ValueError(
            f"q has {batch} rows, page_table {page_table.shape[0]} and lengths {lengths.shape[0]}: they must agree"
        )
    if heads.shape[0] > kv_heads:
        raise ValueError(f"{heads.shape[0]} heads were named, but there are only {kv_heads} KV heads")


def _check_budget(budget_pages: int, sink_pages: int, recent_pages: int) -> None:
    if budget_pages < 1:
        raise ValueError(f"budget_pages is {budget_pages}; it must be at least 1")
    if sink_pages < 0 or recent_pages < 0:
        raise ValueError(f"sink_pages {sink_pages} and recent_pages {recent_pages} must not be negative")
    if sink_pages + recent_pages > budget_pages:
        raise ValueError(
            f"{sink_pages} sink and {recent_pages} recent pages are forced, more than the budget of {budget_pages}"
        )


def dense_decode(
    q: Float[Array, "B K G H"],
    kv_pages: Float[Array, "num_pages K page_size HH"],
    page_table: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    heads: Int[Heads, " R"],
    *,
    scale: float,
    page_scores: PageScore | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B R G H"], Float32[Array, "B R P"] | None]:
    """Attention over the whole cache with page scores from the same pass; see `reference.dense_decode`."""
    _check_pool(q, kv_pages, page_table, lengths, heads)
    return _run(
        "dense_decode", implementation, q, kv_pages, page_table, lengths, heads, scale=scale, page_scores=page_scores
    )


def sparse_decode(
    q: Float[Array, "B K G H"],
    kv_pages: Float[Array, "num_pages K page_size HH"],
    page_table: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    selection: Selection,
    heads: Int[Heads, " R"],
    *,
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "B R G H"]:
    """Attention over the selected pages; see `reference.sparse_decode`."""
    _check_pool(q, kv_pages, page_table, lengths, heads)
    return _run("sparse_decode", implementation, q, kv_pages, page_table, lengths, selection, heads, scale=scale)


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
    implementation: str | None = None,
) -> tuple[Int32[Array, "B R M"], Int32[Array, "B R"]]:
    """Exact top pages, forced ones included, ascending; see `reference.select_pages`."""
    if page_size < 1:
        raise ValueError(f"page_size is {page_size}; it must be at least 1")
    _check_budget(budget_pages, sink_pages, recent_pages)
    return _run(
        "select_pages", implementation, page_scores, lengths, page_size=page_size, budget_pages=budget_pages,
        sink_pages=sink_pages, recent_pages=recent_pages, rule=rule, amount=amount,
    )  # fmt: skip


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
    implementation: str | None = None,
) -> tuple[Float[Array, "B K G H"], Selection]:
    """All roles of one layer, and the selection it hands up; see `reference.hybrid_decode`."""
    _check_pool(q, kv_pages, page_table, lengths, heads)
    _check_budget(budget_pages, sink_pages, recent_pages)
    if selection.pages.shape[2] != budget_pages:
        raise ValueError(
            f"the selection has room for {selection.pages.shape[2]} pages a head and budget_pages is {budget_pages}; "
            "a layer hands up as many as it gets"
        )
    return _run(
        "hybrid_decode", implementation, q, kv_pages, page_table, lengths, selection, heads, scale=scale,
        budget_pages=budget_pages, sink_pages=sink_pages, recent_pages=recent_pages, rule=rule, amount=amount,
        page_scores=page_scores,
    )  # fmt: skip


def block_attention(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    valid: Int[Array, " B"] | None,
    *,
    scale: float,
    implementation: str | None = None,
) -> tuple[Float[Array, "B K G T H"], Float32[Array, "B K G T"]]:
    """Attention of many queries over one block of keys, and its natural log-sum-exps, by which blocks are merged.

    Every query sees the first `valid[b]` keys; with None, T = S and query t sees keys 0 … t. There is no XLA form of
    it: who calls it has one (`pallas_kernels.xla.prefill`), and takes it upon NotImplementedError.
    """
    return _run("block_attention", implementation, q, k, v, valid, scale=scale)


def extend_attention(
    q: Float[Array, "B T K G H"],
    kv_pages: Float[Array, "num_pages K page_size HH"],
    page_table: Int[Array, "B P"],
    starts: Int[Array, " B"],
    counts: Int[Array, " B"],
    *,
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "B T K G H"]:
    """Causal attention of T new tokens over the pages that hold them and what came before them.

    The first `counts[b]` tokens of a row are real, their keys and values lie in the cache at `starts[b] …` already, and
    token t sees the positions 0 … `starts[b] + t`. Nothing from `starts[b] + counts[b]` on is looked at: slots there
    may hold anything, NaN included, and so may the page table's entries behind the last page that is needed. What comes
    out for tokens that are not real is finite. The XLA form is in `xla/prefill.py`.

    Raises:
        NotImplementedError: no kernel covers the case.
    """
    batch, _, kv_heads, _, head_dim = q.shape
    if kv_pages.shape[1] != kv_heads or kv_pages.shape[3] != 2 * head_dim:
        raise ValueError(
            f"kv_pages {kv_pages.shape} does not fit q {q.shape}: "
            f"expected [num_pages, {kv_heads}, page_size, {2 * head_dim}]"
        )
    if not page_table.shape[0] == starts.shape[0] == counts.shape[0] == batch:
        raise ValueError(
            f"q has {batch} rows, page_table {page_table.shape[0]}, starts {starts.shape[0]} and counts "
            f"{counts.shape[0]}: they must agree"
        )
    return _run("extend_attention", implementation, q, kv_pages, page_table, starts, counts, scale=scale)
