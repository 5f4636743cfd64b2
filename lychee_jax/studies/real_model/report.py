"""What the study found, as tables in Markdown; differences are paired, prompt by prompt."""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from lychee_jax.run_folder import Record, read_lines
from lychee_jax.studies.head_maps.report import table
from lychee_jax.studies.real_model.prompts import PERPLEXITY

LEAST_DENSE = 60.0
"""Cells in which dense attention answers less, in per cent, are shown and not counted."""
_TARGET = 1.0
_NONE = "layer 0 alone"
"""How the map "none" is called in tables."""


def paired_interval(ours: Sequence[int], theirs: Sequence[int]) -> tuple[float, float, float]:
    """Difference of two shares on the same prompts in points, and its 95 % interval.

    Wald's interval with half a prompt added to each of the four outcomes (Agresti and Min 2005), so that it does not
    vanish where no prompt differs.
    """
    count = len(ours)
    gained = sum(a > b for a, b in zip(ours, theirs, strict=True))
    lost = sum(a < b for a, b in zip(ours, theirs, strict=True))
    n, b, c = count + 2, gained + 0.5, lost + 0.5
    middle, half = (b - c) / n, 1.96 * math.sqrt(max(0.0, b + c - (b - c) ** 2 / n)) / n
    return 100 * (gained - lost) / count, 100 * (middle - half), 100 * (middle + half)


def read_rivals(file: Path, references: Mapping[tuple[str, int, int], str]) -> list[Record]:
    """Answers of other systems: by system, task and length, whether each prompt's was right, and what was read.

    An answer is right if it begins with the hidden number, as ours must. What was read is unknown (None) of answers
    that their first token ended.

    Args:
        file: a line for each answer.
        references: the hidden number, by task, length and index; answers to other prompts are left out.
    """
    found: dict[tuple[str, str, int], dict[int, int]] = collections.defaultdict(dict)
    shares: dict[tuple[str, str, int], list[float]] = collections.defaultdict(list)
    for line in read_lines(file):
        key = line["task"], line["length"], line["index"]
        if key in references:
            system = line["rival"] if line["share"] == 1.0 else f"{line['rival']} at {line['share']:.3g}"
            cell = system, line["task"], line["length"]
            found[cell][line["index"]] = int(line["answer"].strip().startswith(references[key]))
            if line["kv_read_share"] is not None:
                shares[cell].append(line["kv_read_share"])
    return [
        {
            "system": system, "task": task, "length": length, "right": marks(right),
            "kv_read_share": statistics.fmean(shares[cell]) if (cell := (system, task, length)) in shares else None,
        }
        for (system, task, length), right in sorted(found.items())
    ]  # fmt: skip


def marks(right: Mapping[int, int]) -> str:
    """Right (1) or not (0) of the prompts 0, 1, 2 … as one string; "-" where there is no answer."""
    return "".join(str(right.get(index, "-")) for index in range(max(right, default=-1) + 1))


def unmarked(text: str) -> dict[int, int]:
    """What `marks` wrote."""
    return {index: int(mark) for index, mark in enumerate(text) if mark != "-"}


class Cells:
    """The scored cells by variant, task and length."""

    def __init__(self, results: Record) -> None:
        self._cells = {(cell["variant"], cell["task"], cell["length"]): cell for cell in results["cells"]}
        self.variants = list(dict.fromkeys(cell["variant"] for cell in results["cells"]))
        self.tasks = list(dict.fromkeys(cell["task"] for cell in results["cells"]))
        self.lengths = sorted({cell["length"] for cell in results["cells"]})

    def has(self, variant: str, task: str, length: int) -> bool:
        """Whether it was scored."""
        return (variant, task, length) in self._cells

    def right(self, variant: str, task: str, length: int) -> list[int]:
        """Of every prompt, whether the answer was right."""
        return list(unmarked(self._cells[variant, task, length]["right"]).values())

    def score(self, variant: str, task: str, length: int) -> float:
        """Per cent of the answers; of perplexity, the exponential of the mean loss."""
        cell = self._cells[variant, task, length]
        if task == PERPLEXITY:
            return math.exp(statistics.fmean(cell["losses"]))
        return 100 * statistics.fmean(self.right(variant, task, length))

    def read(self, variant: str, task: str, length: int) -> float:
        """Per cent of the cache that was read."""
        cell = self._cells[variant, task, length]
        return 100 * cell["read"] / cell["held"]

    def counted(self) -> list[tuple[str, int]]:
        """Cells of answers where dense attention is good enough."""
        return [
            (task, length)
            for task in self.tasks
            for length in self.lengths
            if task != PERPLEXITY and self.has("dense", task, length) and self._counts(task, length)
        ]

    def shown(self, score: str, task: str, length: int) -> str:
        """The score, in brackets where the cell is not counted."""
        return score if self._counts(task, length) else f"({score})"

    def _counts(self, task: str, length: int) -> bool:
        return self.score("dense", task, length) >= LEAST_DENSE


def targets(results: Record) -> list[Record]:
    """What was to be reached by the main variant on the counted cells of the longest length."""
    cells = Cells(results)
    main, length = results["main"], cells.lengths[-1]
    found = []
    for task in (task for task, at in cells.counted() if at == length):
        ours, dense = cells.score(main, task, length), cells.score("dense", task, length)
        where = f"{task} at {length:,} tokens"
        found.append({"what": f"points below dense, {where}", "value": dense - ours, "target": _TARGET, "sense": "<="})
        others = [
            100 * statistics.fmean(unmarked(rival["right"]).values())
            for rival in results.get("rivals", ())
            if rival["system"] != "dense" and (rival["task"], rival["length"]) == (task, length)
        ]
        if others:
            what = f"points above the best other system that reads as much, {where}"
            found.append({"what": what, "value": ours - max(others), "target": 0.0, "sense": ">="})
    return found


def markdown(results: Record) -> str:
    """The whole report."""
    parts = [
        f"Model `{results['model']}` ({results['kv_heads']} KV heads), {results['device']}, JAX {results['jax']}. "
        f"An answer is right if greedy decoding writes the hidden number at once. Cells in which dense attention "
        f"answers less than {LEAST_DENSE:.0f} % are in brackets and not counted.",
        "### Against dense attention and against other systems, same prompts",
        against_others(results),
        "### Lengths and budgets",
        by_budget(results),
        "### Perplexity",
        perplexities(results),
        "### How heads are chosen",
        by_map(results),
    ]
    if results["answers"]:
        parts += ["### The same from the engine", from_engine(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _difference(ours: Sequence[int], theirs: Sequence[int]) -> str:
    middle, low, high = paired_interval(ours, theirs)
    return f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]"


def against_others(results: Record) -> str:
    """The main variant and other systems on the same prompts: a table for each length at which others were asked."""
    cells = Cells(results)
    asked = {rival["length"] for rival in results.get("rivals", ())} | {cells.lengths[-1]}
    return "\n\n".join(_against_others(results, cells, length) for length in cells.lengths if length in asked)


def _against_others(results: Record, cells: Cells, length: int) -> str:
    main = results["main"]
    tasks = [task for task in cells.tasks if task != PERPLEXITY and cells.has("dense", task, length)]
    lines = []
    variants = ["dense", *(v for v in cells.variants if v in (main, main.replace("learned", "window")))]
    for variant in variants:
        line = [f"this package, {variant}", f"{cells.read(variant, tasks[0], length):.1f}"]
        for task in tasks:
            score = f"{cells.score(variant, task, length):.1f}"
            if variant != "dense":
                score += " · " + _difference(cells.right(variant, task, length), cells.right("dense", task, length))
            line.append(cells.shown(score, task, length))
        lines.append(line)
    others: dict[str, dict[str, Record]] = collections.defaultdict(dict)
    for rival in results.get("rivals", ()):
        if rival["length"] == length:
            others[rival["system"]][rival["task"]] = rival
    for system, answered in others.items():
        read = [share for rival in answered.values() if (share := rival["kv_read_share"]) is not None]
        line = [system, f"{100 * statistics.fmean(read):.1f}" if read else "–"]
        for task in tasks:
            if task not in answered:
                line.append("–")
                continue
            rows = unmarked(answered[task]["right"])
            dense = cells.right("dense", task, length)
            score = f"{100 * statistics.fmean(rows.values()):.1f}"
            score += " · " + _difference(list(rows.values()), [dense[index] for index in rows])
            line.append(cells.shown(score, task, length))
        lines.append(line)
    count = len(cells.right("dense", tasks[0], length))
    return (
        f"{count} prompts of {length:,} tokens for each task: per cent right · points above dense [95 % interval].\n\n"
        + table(["system", "cache read, %", *tasks], lines)
    )


def by_budget(results: Record) -> str:
    """Right answers of the main map by length and budget, and by both page scores."""
    cells = Cells(results)
    name = results["main"].partition("@")[0]
    variants = ["dense", *(v for v in cells.variants if v.partition("@")[0] == name)]
    lines = [
        [
            task,
            f"{length:,}",
            *(
                cells.shown(f"{cells.score(v, task, length):.1f}", task, length) if cells.has(v, task, length) else "–"
                for v in variants
            ),
        ]
        for task in cells.tasks
        if task != PERPLEXITY
        for length in cells.lengths
    ]
    return table(["task", "length", *(v.removeprefix(f"{name}@") for v in variants)], lines)


def perplexities(results: Record) -> str:
    """Perplexity of the main map by length and budget."""
    cells = Cells(results)
    name = results["main"].partition("@")[0]
    variants = [
        "dense",
        *(v for v in cells.variants if v.partition("@")[0] in (name, name.replace("learned", "window"))),
    ]
    lines = [
        [f"{length:,}", *(f"{cells.score(variant, PERPLEXITY, length):.3f}" for variant in variants)]
        for length in cells.lengths
        if cells.has("dense", PERPLEXITY, length)
    ]
    return table(["length", *(v.removeprefix(f"{name}@") for v in variants)], lines) if lines else ""


def by_map(results: Record) -> str:
    """At the budget of the main variant, over the counted cells; seeds together, with the lowest and the highest."""
    cells = Cells(results)
    budget = results["main"].partition("@")[2]
    counted = cells.counted()
    if not counted:
        return f"Dense attention answers {LEAST_DENSE:.0f} % in no cell: nothing is compared."
    kinds: dict[str, list[str]] = {}
    for variant in cells.variants:
        name, _, asked = variant.partition("@")
        if asked == budget and all(cells.has(variant, *cell) for cell in counted):
            kind = name if name.startswith("layers") else name.rpartition("-")[0] or _NONE
            kinds.setdefault(kind, []).append(variant)
    lines = []
    for kind, variants in kinds.items():
        scores = [statistics.fmean(cells.score(v, task, length) for task, length in counted) for v in variants]
        spread = f" ({min(scores):.1f}–{max(scores):.1f})" if len(scores) > 1 else ""
        perplexities = [
            cells.score(v, PERPLEXITY, length) / cells.score("dense", PERPLEXITY, length) - 1
            for v in variants
            for length in cells.lengths
            if cells.has(v, PERPLEXITY, length)
        ]
        lines.append([
            kind, f"{statistics.fmean(scores):.1f}{spread}",
            f"{100 * statistics.fmean(perplexities):+.2f} %" if perplexities else "–",
        ])  # fmt: skip
    dense = statistics.fmean(cells.score("dense", task, length) for task, length in counted)
    lines.append(["dense", f"{dense:.1f}", ""])
    return (
        f"A budget of {budget} tokens, mean over {len(counted)} counted cells; the number in a name is that of "
        "retrieval heads.\n\n" + table(["map", "right, % (seeds)", "perplexity above dense"], lines)
    )


def from_engine(results: Record) -> str:
    """Answers that the engine generated, and how many agree with the scores."""
    cells = Cells(results)
    length, lines = cells.lengths[-1], []
    for answered in results["answers"]:
        task, variant, rows = answered["task"], answered["variant"], unmarked(answered["right"])
        if not cells.has(variant, task, length):
            continue
        scored = cells.right(variant, task, length)
        same = sum(right == scored[index] for index, right in rows.items())
        right, read = 100 * statistics.fmean(rows.values()), 100 * answered["kv_read_share"]
        lines.append([task, variant, f"{right:.1f}", f"{read:.1f}", f"{same} of {len(rows)}"])
    return "Answers that the engine generated with its kernels, and how many agree with the scores above.\n\n" + table(
        ["task", "variant", "right, %", "cache read, %", "agree"], lines
    )
