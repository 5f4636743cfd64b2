"""Pictures, written as PNG files without a display."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Patch

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.plotting.figures import save_png

if TYPE_CHECKING:
    from lychee_jax.engine.page_trace import Reading

_RETRIEVAL, _SPARSE, _LINK, _INK = "#b3202f", "#f3dcd4", "#d98c7e", "#33272a"
_CELL = 0.34  # inches


def plot_heads(head_map: HeadMap, path: str | Path, *, sparse_share: float | None = None) -> None:
    """Draw the role of every KV head as a PNG: layers from left to right, one row for each KV head index.

    A line leads from each retrieval head to the sparse heads that read the pages it picks: those of its own index in
    the layers after it. `sparse_share` is the measured share of the cache that a sparse head reads, for the legend.
    """
    layers, heads = head_map.num_layers, head_map.num_kv_heads
    # Sides in inches that do not grow with the map: labels beside it, title above, legend below.
    left, right, top, bottom = 0.75, 0.3, 0.8, 1.15
    wide, high = _CELL * max(layers, 18), _CELL * heads  # cells of a model with few layers are broad, for the text
    figure = Figure(figsize=(left + wide + right, top + high + bottom), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, bottom / height, wide / width, high / height))
    axes.set_xlim(-0.5, layers - 0.5)
    axes.set_ylim(heads - 0.5, -0.5)

    for layer, retrieval in enumerate(head_map.retrieval):
        for head in range(heads):
            retrieves = head in retrieval
            if not retrieves:
                axes.plot([layer - 1, layer], [head, head], color=_LINK, linewidth=1.6, zorder=1)
            axes.add_patch(_cell(layer, head, retrieves))
    axes.set_xticks(range(0, layers, 1 if layers <= 40 else 4))
    axes.set_yticks(range(0, heads, 1 if heads <= 16 else 4))
    axes.tick_params(length=0, labelsize=8, colors=_INK)
    axes.set_xlabel("layer", fontsize=9, color=_INK)
    axes.set_ylabel("KV head", fontsize=9, color=_INK)
    for spine in axes.spines.values():
        spine.set_visible(False)

    total = layers * heads
    counts = f"{head_map.num_retrieval} of {total} KV heads retrieve ({head_map.num_retrieval / total:.0%})"
    subtitle = f"{head_map.model} · {counts}" if head_map.model else counts
    for line, size, weight, below_top in (("Head roles", 12, "bold", 0.32), (subtitle, 9, "normal", 0.57)):
        figure.text(
            left / width, 1 - below_top / height, line, fontsize=size, weight=weight, color=_INK, parse_math=False
        )
    reads = "reads the pages picked for it"
    if sparse_share is not None:
        reads += f" ({sparse_share:.0%} of the cache)"
    figure.legend(
        handles=[
            Patch(facecolor=_RETRIEVAL, label="retrieval head: reads the whole cache and picks pages"),
            Patch(facecolor=_SPARSE, edgecolor=_LINK, label=f"sparse head: {reads}"),
            Line2D([], [], color=_LINK, linewidth=1.6, label="where its pages come from"),
        ],
        loc="lower left", bbox_to_anchor=(left / width, 0.1 / height), frameon=False, fontsize=8, labelcolor=_INK,
        borderaxespad=0.0, borderpad=0.0, handlelength=1.4,
    )  # fmt: skip
    save_png(figure, path)


def plot_reading(reading: Reading, path: str | Path, *, marks: Mapping[str, int] | None = None) -> None:
    """Draw what every head read in one step as a PNG: a row for each KV head, layer 0 on top, pages in order.

    `marks` names token positions to be pointed at, such as where an answer stands.
    """
    layers, heads, pages = reading.pages.shape
    roles = [int(head in reading.head_map.retrieval[layer]) for layer in range(layers) for head in range(heads)]
    rows = reading.pages.reshape(layers * heads, pages).astype(int) * (1 + np.asarray(roles)[:, None])
    figure = Figure(figsize=(9.5, 1.6 + 0.085 * len(rows)), dpi=140, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow(rows, aspect="auto", interpolation="nearest", cmap=ListedColormap(["#faf7f5", _LINK, _RETRIEVAL]),
                vmin=0, vmax=2, extent=(0, pages, len(rows), 0))  # fmt: skip
    for layer in range(1, layers):
        axes.axhline(layer * heads, color=_INK, linewidth=0.4)
    axes.set_yticks([layer * heads + heads / 2 for layer in range(layers)], [str(layer) for layer in range(layers)])
    axes.set_ylabel("layer, with its KV heads", fontsize=9, color=_INK)
    axes.set_xlabel(f"page of {reading.page_size} tokens, of {reading.length:,} tokens", fontsize=9, color=_INK)
    axes.tick_params(length=0, labelsize=8, colors=_INK)
    for label, position in (marks or {}).items():
        axes.axvline(position / reading.page_size, color="#2b5d8c", linewidth=1.0, linestyle="--")
        axes.text(position / reading.page_size, -0.6, label, fontsize=8, color="#2b5d8c", ha="center", parse_math=False)
    axes.set_title(
        f"One decode step reads {reading.share:.0%} of the cache", fontsize=11, color=_INK, pad=18, loc="left"
    )
    figure.legend(
        handles=[
            Patch(facecolor=_RETRIEVAL, label="retrieval head: reads all pages and picks"),
            Patch(facecolor=_LINK, label="sparse head: reads what was picked below"),
        ],
        loc="outside lower left", ncols=2, frameon=False, fontsize=8, labelcolor=_INK,
    )  # fmt: skip
    save_png(figure, path)


def _cell(layer: int, head: int, retrieves: bool) -> FancyBboxPatch:
    size = 0.8
    return FancyBboxPatch(
        (layer - size / 2, head - size / 2), size, size, boxstyle="round,pad=0,rounding_size=0.12", linewidth=0.8,
        facecolor=_RETRIEVAL if retrieves else _SPARSE, edgecolor=_RETRIEVAL if retrieves else _LINK, zorder=2,
    )  # fmt: skip
