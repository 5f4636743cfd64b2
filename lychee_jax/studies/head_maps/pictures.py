"""What the study found, as PNG pictures."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lychee_jax.plotting.figures import save_png
from lychee_jax.run_folder import Record
from lychee_jax.studies.head_maps.prompts import DIALOGUE
from lychee_jax.studies.head_maps.report import PICTURES, by_seed, compared, method_names, share_name
from lychee_jax.studies.head_maps.rows import COMPARED

_INK = "#33272a"
_COLOURS = ("#b3202f", "#5b6fa8", "#4f7f6b", "#d9863f", "#8a5a8f", "#7a7a7a", "#b8a14a")
_MARKERS = "osD^vP"


def draw(results: Record, folder: Path) -> list[Path]:
    """Draw what there is; returns the files."""
    drawn = []
    for name, picture in (("budgets", _budgets), ("methods", _methods), ("between", _between)):
        figure = picture(results)
        if figure is not None:
            drawn.append(folder / PICTURES[name])
            save_png(figure, drawn[-1])
    return drawn


def _budgets(results: Record) -> Figure | None:
    """A panel a task, a line a context: score over budget, mean and range of the seeds; dashes are dense."""
    rows = [
        row
        for row in results["rows"]
        if row["method"] == "hardkuma" and row["task"] != DIALOGUE and row["page_size"] == 64
        and (row["page_score"], row["rule"]) == ("max", "budget")
    ]  # fmt: skip
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    if not tasks:
        return None
    figure = _figure(2.6 * max(2, len(tasks)) + 0.6, 3.2)
    for task, axes in zip(tasks, figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0], strict=True):
        for i, context in enumerate(dict.fromkeys(row["context"] for row in rows)):
            cell = [row for row in rows if (row["task"], row["context"]) == (task, context)]
            budgets = sorted({row["budget"] for row in cell})
            seeds = [[row["score"] for row in cell if row["budget"] == budget] for budget in budgets]
            means = [statistics.fmean(scores) for scores in seeds]
            colour = _COLOURS[i % len(_COLOURS)]
            axes.plot(budgets, means, color=colour, marker=_MARKERS[i % len(_MARKERS)], label=f"{context:,} tokens",
                      markersize=4, linewidth=1.4)  # fmt: skip
            axes.fill_between(budgets, list(map(min, seeds)), list(map(max, seeds)), color=colour, alpha=0.15)
            if cell:
                axes.axhline(cell[0]["dense_score"], color=colour, linestyle="--", linewidth=0.8)
        ticks = sorted({row["budget"] for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [share_name(budget) for budget in ticks])
        axes.minorticks_off()
        axes.set_ylim(-4, 104)
        _plain(axes, task)
    return _finished(figure, "Exact answers (%) over the budget, a share of the context; dashes: dense")


def _methods(results: Record) -> Figure | None:
    """Bars: the mean over tasks and contexts of every method of choosing heads, with the range of the seeds."""
    budgets = [budget for budget in COMPARED if len(method_names(compared(results["rows"], budget))) > 1]
    if not budgets:
        return None
    figure = _figure(4.0 * max(2, len(budgets)) + 0.6, 3.6)
    for budget, axes in zip(budgets, figure.subplots(1, len(budgets), squeeze=False, sharey=True)[0], strict=True):
        rows = compared(results["rows"], budget)
        names = method_names(rows)
        scores = [by_seed(filter(of, rows)) for of in names.values()]
        means = np.asarray([statistics.fmean(each) for each in scores])
        ranges = np.asarray([[mean - min(each), max(each) - mean] for mean, each in zip(means, scores, strict=True)])
        axes.bar(range(len(names)), means, color=_COLOURS[: len(names)], width=0.7)
        axes.errorbar(range(len(names)), means, yerr=np.maximum(ranges.T, 0.0), fmt="none", ecolor=_INK, capsize=4)
        dense = statistics.fmean(by_seed(rows, "dense_score"))
        axes.axhline(dense, color=_INK, linestyle="--", linewidth=0.8, label="dense")
        for x, mean in enumerate(means):
            axes.text(x + 0.08, mean + 1.5, f"{mean:.1f}", fontsize=7, color=_INK)
        axes.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names], rotation=30, ha="right")
        axes.set_ylim(0, 110)
        _plain(axes, f"budget {share_name(budget)}")
    return _finished(figure, "Exact answers (%), mean over tasks and contexts; ranges are those of the seeds")


def _between(results: Record) -> Figure | None:
    """Lines: share of undecided gates over the steps, mean and range of the seeds."""
    if not results["between"]:
        return None
    figure = _figure(5.6, 3.2)
    axes = figure.subplots()
    for i, method in enumerate(dict.fromkeys(run["method"] for run in results["between"])):
        runs = [run for run in results["between"] if run["method"] == method]
        shares = 100 * np.asarray([run["share"] for run in runs])
        colour = _COLOURS[i % len(_COLOURS)]
        axes.plot(runs[0]["steps"], shares.mean(axis=0), color=colour, label=method, linewidth=1.4)
        axes.fill_between(runs[0]["steps"], shares.min(axis=0), shares.max(axis=0), color=colour, alpha=0.15)
    axes.set_ylim(-4, 104)
    axes.set_xlabel("step", fontsize=8, color=_INK)
    _plain(axes, "")
    return _finished(figure, "Gates with 0.05 < E[z] < 0.95 (%)")


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=140, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9, color=_INK, parse_math=False)
    axes.tick_params(labelsize=7, colors=_INK)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _finished(figure: Figure, title: str) -> Figure:
    """With a title, and one legend for all panels."""
    figure.suptitle(title, fontsize=10, color=_INK, parse_math=False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    return figure
