"""The one place where an implementation is chosen, and the only one that may fall back to another.

`implementation=None` tries what suits the platform, best first; a candidate refuses a case that it does not cover by
raising NotImplementedError, and the next one is tried. A named implementation runs or raises. ValueError means bad
input and is never swallowed.
"""

import contextlib
import contextvars
import importlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args, overload

import jax
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from pallas_kernels.types import Heads, KVPages, PageScore, Selection, SelectionSpec
from pallas_kernels.xla import decode, prefill

Implementation = Literal["xla", "mosaic_tpu", "mosaic_gpu"]


def _lazy(package: str, op: str) -> Callable[..., Any]:
    """An op of a package of kernels that is imported when the op first runs."""
    return lambda *args, **options: getattr(importlib.import_module(package), op)(*args, **options)


_NAMES = ("dense_decode", "sparse_decode", "select_pages", "hybrid_decode", "extend_attention")
_OPS: dict[str, dict[str, Callable[..., Any]]] = {
    "xla": {
        "dense_decode": decode.dense_decode,
        "sparse_decode": decode.sparse_decode,
        "select_pages": decode.select_pages,
        "hybrid_decode": decode.hybrid_decode,
        "extend_attention": prefill.extend_attention,
    },
    "mosaic_gpu": {name: _lazy("pallas_kernels.mosaic_gpu", name) for name in _NAMES},
    "mosaic_tpu": {name: _lazy("pallas_kernels.mosaic_tpu", name) for name in _NAMES},
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


def _check_cache(kv: KVPages, kv_heads: int, head_dim: int) -> None:
    if kv.kv_heads != kv_heads or kv.head_dim != head_dim:
        width = head_dim if kv.quantized else 2 * head_dim
        raise ValueError(
            f"kv.data {kv.data.shape} does not fit q: expected [num_pages, {kv_heads}, page_size, {width}]"
        )
    scales = (kv.num_pages, kv_heads, 2 * kv.page_size)
    if kv.scales is not None and (kv.quantized is None or kv.scales.shape != scales):
        raise ValueError(
            f"kv.scales {kv.scales.shape} beside kv.data of {kv.data.dtype}: only words of 8-bit numbers (uint16) have "
            f"scales, and these are {scales}"
        )


def _check_rows(batch: int, **rows: Array) -> None:
    if any(array.shape[0] != batch for array in rows.values()):
        found = ", ".join(f"{name} {array.shape[0]}" for name, array in rows.items())
        raise ValueError(f"q has {batch} rows, {found}: they must agree")


def _check_decode(q: Array, kv: KVPages, heads: Heads, **rows: Array) -> None:
    batch, kv_heads, _, head_dim = q.shape
    _check_cache(kv, kv_heads, head_dim)
    _check_rows(batch, **rows)
    if heads.shape[0] > kv_heads:
        raise ValueError(f"{heads.shape[0]} heads were named, but there are only {kv_heads} KV heads")


@overload
def dense_decode(
    q: Float[Array, "B K G H"],
    kv: KVPages,
    page_table: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    heads: Int[Heads, " R"],
    *,
    scale: float,
    page_scores: PageScore | None = None,
    return_lse: Literal[False] = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "B R G H"], Float32[Array, "B R P"] | None]: ...


@overload
def dense_decode(
    q: Float[Array, "B K G H"],
    kv: KVPages,
    page_table: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    heads: Int[Heads, " R"],
    *,
    scale: float,
    page_scores: PageScore | None = None,
    return_lse: Literal[True],
    implementation: str | None = None,
) -> tuple[Float[Array, "B R G H"], Float32[Array, "B R P"] | None, Float32[Array, "B R G"]]: ...


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
    implementation: str | None = None,
) -> (
    tuple[Float[Array, "B R G H"], Float32[Array, "B R P"] | None]
    | tuple[Float[Array, "B R G H"], Float32[Array, "B R P"] | None, Float32[Array, "B R G"]]
):
    """Attention of some KV heads over the whole cache; page scores and log-sum-exps come from the same pass.

    See `xla.decode.dense_decode`.

    Raises:
        NotImplementedError: the implementation that was asked for does not cover the case.
        ValueError: shapes that do not fit each other.
    """
    _check_decode(q, kv, heads, page_table=page_table, lengths=lengths)
    return _run(
        "dense_decode", implementation, q, kv, page_table, lengths, heads, scale=scale, page_scores=page_scores,
        return_lse=return_lse,
    )  # fmt: skip


@overload
def sparse_decode(
    q: Float[Array, "B K G H"],
    kv: KVPages,
    page_table: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    selection: Selection,
    heads: Int[Heads, " R"],
    *,
    scale: float,
    return_lse: Literal[False] = False,
    implementation: str | None = None,
) -> Float[Array, "B R G H"]: ...


@overload
def sparse_decode(
    q: Float[Array, "B K G H"],
    kv: KVPages,
    page_table: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    selection: Selection,
    heads: Int[Heads, " R"],
    *,
    scale: float,
    return_lse: Literal[True],
    implementation: str | None = None,
) -> tuple[Float[Array, "B R G H"], Float32[Array, "B R G"]]: ...


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
    implementation: str | None = None,
) -> Float[Array, "B R G H"] | tuple[Float[Array, "B R G H"], Float32[Array, "B R G"]]:
    """Attention of some KV heads over the pages selected for them; see `xla.decode.sparse_decode`.

    Raises: as `dense_decode`.
    """
    _check_decode(q, kv, heads, page_table=page_table, lengths=lengths)
    return _run(
        "sparse_decode", implementation, q, kv, page_table, lengths, selection, heads, scale=scale,
        return_lse=return_lse,
    )  # fmt: skip


def select_pages(
    page_scores: Float32[Array, "B R P"],
    lengths: Int[Array, " B"],
    spec: SelectionSpec,
    *,
    page_size: int,
    implementation: str | None = None,
) -> tuple[Int32[Array, "B R M"], Int32[Array, "B R"]]:
    """The pages that a head reads: forced ones and those of the highest scores; see `xla.decode.select_pages`.

    Raises: as `dense_decode`.
    """
    if page_size < 1:
        raise ValueError(f"page_size is {page_size}; it must be at least 1")
    return _run("select_pages", implementation, page_scores, lengths, spec, page_size=page_size)


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
    implementation: str | None = None,
) -> tuple[Float[Array, "B K G H"], Selection]:
    """One layer's attention, every KV head by its role, and the selection that it hands up.

    Retrieval heads (`heads`) read the whole cache and select pages; all others read the pages selected for their index.
    Rows with `dense[b]` read the whole cache in every head. See `xla.decode.hybrid_decode`.

    Raises: as `dense_decode`.
    """
    rows = {} if dense is None else {"dense": dense}
    _check_decode(q, kv, heads, page_table=page_table, lengths=lengths, **rows)
    if selection.pages.shape[2] != spec.budget_pages:
        raise ValueError(
            f"the selection has room for {selection.pages.shape[2]} pages a head and budget_pages is "
            f"{spec.budget_pages}; a layer hands up as many as it gets"
        )
    return _run(
        "hybrid_decode", implementation, q, kv, page_table, lengths, selection, heads, spec, scale=scale, dense=dense
    )


def extend_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    kv: KVPages,
    page_table: Int[Array, "B P"],
    starts: Int[Array, " B"],
    counts: Int[Array, " B"],
    *,
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "B T K G H"]:
    """Causal attention of a chunk of T new tokens over the cached tokens before it and over itself (chunked prefill).

    Token t of row b is at position `starts[b] + t` and sees all positions up to its own. The first `counts[b]` tokens
    are real; their keys and values are in the cache already, and once more in `k` and `v`, as the cache holds them:
    an implementation reads them where it is cheaper. Of a quantised cache the cache alone is read: a chunk attends to
    what was stored of its own tokens, too. Nothing else from `starts[b]` on is looked at: slots of the cache,
    tokens past the count and entries of the page table behind the last page needed may hold anything, NaN included.
    What comes out for tokens that are not real means nothing.

    Raises: as `dense_decode`.
    """
    batch, _, kv_heads, _, head_dim = q.shape
    _check_cache(kv, kv_heads, head_dim)
    _check_rows(batch, page_table=page_table, starts=starts, counts=counts)
    return _run("extend_attention", implementation, q, k, v, kv, page_table, starts, counts, scale=scale)
