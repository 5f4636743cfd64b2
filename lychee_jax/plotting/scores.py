"""Pictures of evaluations, written as PNG files without a display."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from lychee_jax.plotting.figures import save_png

_INK = "#33272a"
_COLOURS = ("#33272a", "#b3202f", "#d9863f", "#4f7f6b", "#5b6fa8", "#8a5a8f")
_MARKERS = "osD^vP"
_SCALE = "RdYlGn"

type ScoreKey = tuple[str, int, float | None, str]
"""Task, length, depth, variant."""


def plot_panels(values: Mapping[ScoreKey, float], path: Path, *, title: str, unit: str, at_most: float | None) -> None:
    """One panel a task: score over length, a line for each variant."""
    tasks, variants = _unique(values, 0), _unique(values, 3)
    columns = min(4, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = _figure(2.6 * max(columns, 2) + 0.6, 2.1 * rows + 1.1)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=at_most is not None)
    for panel, axes in enumerate(grid.flat):
        if panel >= len(tasks):
            axes.set_visible(False)
            continue
        for order, variant in enumerate(variants):
            own = {key[1]: score for key, score in values.items() if (key[0], key[3]) == (tasks[panel], variant)}
            points = sorted(own.items())
            # Lines may lie on one another: the later ones are thinner and have smaller marks.
            axes.plot(
                *zip(*points, strict=True), label=variant, color=_COLOURS[order % len(_COLOURS)],
                marker=_MARKERS[order % len(_MARKERS)], markersize=max(3, 7 - 1.5 * order),
                linewidth=max(0.9, 2.2 - 0.4 * order),
            )  # fmt: skip
        lengths = sorted({key[1] for key in values})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [_short(length) for length in lengths])
        axes.minorticks_off()
        axes.set_title(tasks[panel], fontsize=9, color=_INK, parse_math=False)
        axes.tick_params(labelsize=8, colors=_INK)
        axes.grid(alpha=0.25)
        if at_most is not None:
            axes.set_ylim(-0.04 * at_most, 1.04 * at_most)
    figure.suptitle(f"{title} ({unit}, over length in tokens)", fontsize=11, color=_INK, parse_math=False)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(variants), frameon=False, fontsize=8)
    save_png(figure, path)


def plot_heatmaps(values: Mapping[ScoreKey, float], path: Path, *, title: str, unit: str) -> None:
    """One map for each task and variant: length to the right, depth downwards; scores from 0 to 100."""
    tasks, variants = _unique(values, 0), _unique(values, 3)
    lengths = sorted({key[1] for key in values})
    depths = sorted({key[2] for key in values}, key=lambda depth: -1.0 if depth is None else depth)
    width = max(2.4, 0.62 * len(lengths) + 0.9)
    figure = _figure(width * len(variants) + 1.0, (0.34 * len(depths) + 1.1) * len(tasks) + 0.6)
    grid = figure.subplots(len(tasks), len(variants), squeeze=False)
    for i, task in enumerate(tasks):
        for j, variant in enumerate(variants):
            cells = [[values.get((task, length, depth, variant), np.nan) for length in lengths] for depth in depths]
            axes = grid[i, j]
            axes.imshow(np.asarray(cells), cmap=_SCALE, vmin=0, vmax=100, aspect="auto")
            for row, column in np.argwhere(~np.isnan(cells)):
                score = cells[row][column]
                ink = _INK if 15 < score < 85 else "white"  # the ends of the scale are dark
                axes.text(column, row, f"{score:.0f}", ha="center", va="center", fontsize=8, color=ink)
            axes.set_xticks(range(len(lengths)), [_short(length) for length in lengths])
            axes.set_yticks(range(len(depths)), ["any" if depth is None else f"{depth:.0%}" for depth in depths])
            axes.tick_params(labelsize=8, colors=_INK, length=0)
            axes.set_title(f"{task}, {variant}", fontsize=9, color=_INK, parse_math=False)
            if j == 0:
                axes.set_ylabel("depth", fontsize=8, color=_INK)
    figure.colorbar(ScalarMappable(Normalize(0, 100), _SCALE), ax=grid, fraction=0.04, label=unit)
    figure.suptitle(title, fontsize=11, color=_INK, parse_math=False)
    save_png(figure, path)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=140, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _unique(values: Mapping[ScoreKey, float], part: int) -> list[str]:
    return list(dict.fromkeys(str(key[part]) for key in values))


def _short(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)
