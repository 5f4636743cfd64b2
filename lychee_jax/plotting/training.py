"""Pictures of a run that learns heads, from its metrics alone, written as PNG files without a display."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.files import parse_json_lines, read_text
from lychee_jax.plotting.figures import save_png

_RETRIEVAL, _SPARSE, _OTHER, _INK = "#b3202f", "#d98c7e", "#2b5d8c", "#33272a"
UNDECIDED = (0.05, 0.95)
"""E[z] strictly between these is that of a gate that is still neither 0 nor 1."""


@dataclasses.dataclass(frozen=True)
class History:
    """What a run's metrics file says, a row for each line: steps, numbers by name, and E[z] above layer 0."""

    steps: Float[np.ndarray, " lines"]
    numbers: dict[str, Float[np.ndarray, " lines"]]
    expected: Float[np.ndarray, "lines above K"]

    @classmethod
    def read(cls, path: Path) -> History:
        """Read a metrics file of `learn_heads`."""
        lines = parse_json_lines(read_text(path), path)
        columns = {name: np.array([line[name] for line in lines], np.float64) for name in lines[0]}
        return cls(columns.pop("step"), columns, columns.pop("expected"))

    @property
    def undecided(self) -> Float[np.ndarray, " lines"]:
        """The share of gates with E[z] strictly between 0.05 and 0.95."""
        low, high = UNDECIDED
        return np.mean((self.expected > low) & (self.expected < high), axis=(1, 2))


def plot_training(metrics: Path, head_map: HeadMap, path: Path) -> None:
    """E[z] of every gate, density and λ, loss and kept answers, and the share of undecided gates, over the steps.

    Gates of heads that retrieve in the map are coloured.
    """
    history = History.read(metrics)
    numbers = history.numbers
    figure = Figure(figsize=(10.5, 6.6), dpi=140, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    ((gates, density), (loss, undecided)) = figure.subplots(2, 2, sharex=True)

    retrieves = np.zeros(history.expected.shape[1:], bool)
    for layer, heads in enumerate(head_map.retrieval[1:]):
        retrieves[layer, list(heads)] = True
    _draw_gates(gates, history, retrieves)

    total = head_map.num_layers * head_map.num_kv_heads
    _line(density, history, numbers["density"], "density", _RETRIEVAL)
    density.axhline(head_map.num_retrieval / total, color=_RETRIEVAL, linewidth=0.9, linestyle="--")
    density.set_ylim(0.0, 1.02)
    _title(density, "Density (mean P(z ≠ 0), dashed: its target) and its price λ")
    price = density.twinx()
    _line(price, history, numbers["multiplier"], "λ", _OTHER)
    price.set_ylim(0.0, 1.1 * float(numbers["multiplier"].max()))

    _line(loss, history, numbers["loss"], "loss", _RETRIEVAL)
    loss.set_ylim(bottom=0.0)
    _title(loss, "Loss against dense attention, and answer tokens kept")
    kept = loss.twinx()
    _line(kept, history, numbers["kept"], "kept", _OTHER)
    kept.set_ylim(0.0, 1.02)

    _line(undecided, history, history.undecided, "share of the gates", _RETRIEVAL)
    undecided.set_ylim(-0.02, 1.02)
    _title(undecided, f"Undecided gates: E[z] between {UNDECIDED[0]} and {UNDECIDED[1]}")
    for axes in (loss, undecided):
        axes.set_xlabel("step", fontsize=9, color=_INK)
    save_png(figure, path)


def _draw_gates(axes: Axes, history: History, retrieves: Bool[np.ndarray, "above K"]) -> None:
    for wanted, colour, width in ((False, _SPARSE, 0.7), (True, _RETRIEVAL, 1.1)):
        chosen = history.expected[:, retrieves == wanted]
        if chosen.size:
            axes.plot(history.steps, chosen, color=colour, linewidth=width, marker=_marker(history), markersize=2.5)
    axes.axhline(0.5, color=_INK, linewidth=0.6, linestyle=":")
    axes.set_ylim(-0.02, 1.02)
    axes.tick_params(labelsize=8, colors=_INK)
    axes.grid(alpha=0.25)
    axes.legend(
        handles=[
            Line2D([], [], color=_RETRIEVAL, label=f"retrieval in the map ({retrieves.sum()})"),
            Line2D([], [], color=_SPARSE, label=f"sparse ({(~retrieves).sum()})"),
        ],
        fontsize=8, frameon=False, labelcolor=_INK, loc="best",
    )  # fmt: skip
    _title(axes, "E[z] of every gate (layer 0 has none)")


def _line(axes: Axes, history: History, values: Float[np.ndarray, " lines"], label: str, colour: str) -> None:
    axes.plot(history.steps, values, color=colour, linewidth=1.2, marker=_marker(history), markersize=2.5)
    axes.set_ylabel(label, fontsize=9, color=colour)
    axes.tick_params(labelsize=8, colors=_INK)
    axes.tick_params(axis="y", labelcolor=colour)
    if colour == _RETRIEVAL:
        axes.grid(alpha=0.25)


def _marker(history: History) -> str:
    """Few points are to be seen as points."""
    return "o" if len(history.steps) < 30 else ""


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=9, color=_INK, loc="left", parse_math=False)
