"""What an evaluation found: one JSON file, one Markdown table, one picture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lychee_jax.files import json_text, write_text
from lychee_jax.plotting.scores import plot_heatmaps, plot_panels
from lychee_jax.run_folder import Record

Column = Literal["task", "depth", "length"]

RESULTS, TABLE, PICTURE = "results.json", "results.md", "results.png"


@dataclasses.dataclass(frozen=True)
class Style:
    """How a benchmark shows its scores.

    Attributes:
        name: of the benchmark.
        unit: of a shown score.
        columns: what the table spreads over its columns.
        average: whether a row ends with the mean of its columns.
        shown: from the mean of the scores to what is shown.
        digits: decimals of what is shown.
    """

    name: str
    unit: str
    columns: Column
    average: bool = False
    shown: Callable[[float], float] = lambda score: 100 * score
    digits: int = 1


@dataclasses.dataclass(frozen=True)
class CellScore:
    """One cell in one variant: the mean score of its samples, its standard error, and the share of the cache read."""

    task: str
    length: int
    depth: float | None
    variant: str
    samples: int
    score: float
    stderr: float
    kv_read_share: float


@dataclasses.dataclass(frozen=True)
class EvaluationReport:
    """All results of a folder; `about` says which model, which settings, which machine."""

    style: Style
    about: Record
    results: list[CellScore]

    @classmethod
    def of(cls, style: Style, about: Record, records: Sequence[Record]) -> EvaluationReport:
        """Sum up the records, in the order in which cells and variants first came."""
        groups: dict[tuple[Any, ...], list[Record]] = {}
        for record in records:
            groups.setdefault((record["task"], record["length"], record["depth"], record["variant"]), []).append(record)
        results = []
        for (task, length, depth, variant), group in groups.items():
            scores = np.asarray([record["score"] for record in group], np.float64)
            stderr = float(scores.std(ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else math.nan
            shares = [record["kv_read_share"] for record in group]
            results.append(
                CellScore(
                    task, length, depth, variant, len(group), float(scores.mean()), stderr, float(np.mean(shares))
                )
            )
        return cls(style, about, results)

    def to_json(self) -> Record:
        """As plain data; a standard error of one sample is null."""
        rows = []
        for result in self.results:
            row = dataclasses.asdict(result)
            row["stderr"] = None if math.isnan(result.stderr) else result.stderr
            rows.append({**row, "shown": self.style.shown(result.score)})
        return {"benchmark": self.style.name, "unit": self.style.unit, **self.about, "results": rows}

    def markdown(self) -> str:
        """The table, with a line above it that says what the numbers are."""
        style = self.style
        names = [name for name in ("task", "length", "depth", "variant") if name != style.columns]
        names = [name for name in names if any(getattr(each, name) is not None for each in self.results)]
        columns = list(dict.fromkeys(getattr(each, style.columns) for each in self.results))
        if style.columns != "task":
            columns.sort(key=lambda value: -1.0 if value is None else value)
        rows: dict[tuple[Any, ...], dict[Any, CellScore]] = {}
        for result in self.results:
            row = tuple(getattr(result, name) for name in names)
            rows.setdefault(row, {})[getattr(result, style.columns)] = result
        heads = [*names, *[_text(style.columns, value) for value in columns], *(["mean"] if style.average else [])]
        lines = [[*heads, "KV cache read", "samples"]]
        for row, cells in rows.items():
            shown = [f"{style.shown(cells[c].score):.{style.digits}f}" if c in cells else "" for c in columns]
            if style.average:
                mean = np.mean([style.shown(each.score) for each in cells.values()])
                shown.append(f"{mean:.{style.digits}f}" if len(cells) == len(columns) else "")
            share = np.average([each.kv_read_share for each in cells.values()])
            counts = sorted({each.samples for each in cells.values()})
            samples = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
            named = [_text(name, value) for name, value in zip(names, row, strict=True)]
            lines.append([*named, *shown, f"{share:.0%}", samples])
        table = [f"| {' | '.join(line)} |" for line in lines]
        aligned = ["---" if head in names else "---:" for head in lines[0]]
        table.insert(1, f"| {' | '.join(aligned)} |")
        return "\n".join([f"{style.name}, {style.unit}; model {self.about.get('model', '')}", "", *table])

    def save(self, folder: Path) -> None:
        """Write `results.json`, `results.md` and `results.png`."""
        content = json_text(self.to_json(), indent=1)
        write_text(folder / RESULTS, content + "\n")
        write_text(folder / TABLE, self.markdown() + "\n")
        values = {(r.task, r.length, r.depth, r.variant): self.style.shown(r.score) for r in self.results}
        title = f"{self.style.name} · {self.about.get('model', '')}"
        if self.style.columns == "depth":
            plot_heatmaps(values, folder / PICTURE, title=title, unit=self.style.unit)
        else:
            at_most = 100.0 if self.style.unit.startswith("%") else None
            plot_panels(values, folder / PICTURE, title=title, unit=self.style.unit, at_most=at_most)


Report = EvaluationReport
"""The former name, for one release."""


def _text(name: str, value: Any) -> str:
    if value is None:
        return "any"
    if name == "length":
        return f"{value:,}"
    return f"{value:g}" if name == "depth" else str(value)
