"""What the study found, as tables in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

from lychee_jax.run_folder import Record
from lychee_jax.studies.head_maps.prompts import DIALOGUE
from lychee_jax.studies.head_maps.rows import COMPARED, FAMILIES

PICTURES = {"budgets": "heads_budgets.png", "methods": "heads_methods.png", "between": "heads_between.png"}
_TARGET = 1.0  # points below dense that the learned map may be, at a budget of 1/8


def markdown(results: Record) -> str:
    """The whole report; what a study left out is left out here."""
    rows: list[Record] = results["rows"]
    model = rows[0]["model"] if rows else ""
    parts = [
        "# Which heads retrieve: how the maps compare",
        f"Model `{model}`; {results['device']}, JAX {results['jax']}. Scores are exact answers in %, on the same "
        "held-out prompts for all; dense attention is measured on them too.",
        f"```\n{results['command']}\n```",
    ]
    for section in (_targets, _methods, _budgets, _rules, _corrections, _between, _maps):
        parts += section(results)
    return "\n\n".join(parts) + "\n"


def share_name(budget: float) -> str:
    """1/8 for 0.125."""
    return str(Fraction(budget).limit_denominator(4096))


def method_names(rows: Iterable[Record]) -> dict[str, Callable[[Record], bool]]:
    """The methods of the comparison, by what they are called, and their rows; "none" has two."""

    def same(method: str) -> Callable[[Record], bool]:
        return lambda row: row["method"] == method

    found = {method: same(method) for method in (*FAMILIES, "layer", "random")}
    found["none"] = lambda row: row["method"] == "none" and not _fills(row)
    found["none, budget filled"] = lambda row: row["method"] == "none" and _fills(row)
    rows = list(rows)
    return {name: chosen for name, chosen in found.items() if any(map(chosen, rows))}


def _fills(row: Record) -> bool:
    return row["sink"] + row["recent"] == row["budget_tokens"]


def compared(rows: Iterable[Record], budget: float) -> list[Record]:
    """Rows of the comparison of methods at a budget: pages of 64 by their best token, or only forced ones."""
    return [
        row
        for row in rows
        if row["budget"] == budget and row["task"] != DIALOGUE and row["page_size"] == 64
        and row["page_score"] == "max" and row["rule"] == ("forced" if row["method"] == "none" else "budget")
    ]  # fmt: skip


def by_seed(rows: Iterable[Record], value: str = "score") -> list[float]:
    """For every seed, the mean over tasks and contexts."""
    seeds: dict[int, list[float]] = {}
    for row in rows:
        seeds.setdefault(row["seed"], []).append(row[value])
    return [statistics.fmean(values) for values in seeds.values()]


def _targets(results: Record) -> list[str]:
    """Whether the learned map is as good as dense at 1/8, and better than all others by more than the seeds' spread."""
    rows = results["rows"]
    lines = []
    at = [row for row in compared(rows, 1 / 8) if row["method"] == "hardkuma"]
    if at:
        below = statistics.fmean(row["dense_score"] - row["score"] for row in at)
        met = "met" if below <= _TARGET else "**not met**"
        lines.append(f"- The learned map is within 1 point of dense at a budget of 1/8: {met} ({-below:+.2f} points).")
    for budget in COMPARED:
        chosen = compared(rows, budget)
        names = method_names(chosen)
        if "hardkuma" not in names or len(names) < 2:
            continue
        scores = {name: by_seed(filter(of, chosen)) for name, of in names.items()}
        own = scores.pop("hardkuma")
        fails = []
        for name, others in scores.items():
            lead = statistics.fmean(own) - statistics.fmean(others)
            spread = max(max(own) - min(own), max(others) - min(others))
            if lead <= spread:
                fails.append(f"{name} ({lead:+.2f}, spread {spread:.2f})")
        verdict = "met" if not fails else f"**not met**: not above {', '.join(fails)}"
        lines.append(
            f"- It is above every alternative by more than the spread of the seeds at {share_name(budget)}: {verdict}."
        )
    return ["## The targets", "\n".join(lines)] if lines else []


def _methods(results: Record) -> list[str]:
    budgets = [budget for budget in COMPARED if len(method_names(compared(results["rows"], budget))) > 1]
    if not budgets:
        return []
    lines = []
    for name in method_names(row for budget in budgets for row in compared(results["rows"], budget)):
        line = [name]
        for budget in budgets:
            chosen = compared(results["rows"], budget)
            names = method_names(chosen)
            mine = list(filter(names[name], chosen)) if name in names else []
            line += [_spread(by_seed(mine)), _mean(by_seed(mine, "sparse_read"))]
        lines.append(line)
    dense = ["dense"]
    for budget in budgets:
        dense += [_mean(by_seed(compared(results["rows"], budget), "dense_score")), "100"]
    heads = ["method", *(h for b in budgets for h in (f"score at {share_name(b)}", "a sparse head reads, %"))]
    count = next(row["retrieval_heads"] for row in compared(results["rows"], budgets[0]))
    return [
        "## Ways to choose the heads",
        f"{count} retrieval heads each, layer 0 included; mean over tasks and contexts, in brackets the lowest and the "
        "highest seed. `none` has the map of `hardkuma`, but sparse heads read sink and recent tokens only.",
        f"![Methods]({PICTURES['methods']})",
        table(heads, [*lines, dense]),
    ]


def _budgets(results: Record) -> list[str]:
    rows = [
        row
        for row in results["rows"]
        if row["method"] == "hardkuma" and row["task"] != DIALOGUE and row["page_size"] == 64
        and (row["page_score"], row["rule"]) == ("max", "budget")
    ]  # fmt: skip
    budgets = sorted({row["budget"] for row in rows})
    lines = []
    for task, context in dict.fromkeys((row["task"], row["context"]) for row in rows):
        cell = [row for row in rows if (row["task"], row["context"]) == (task, context)]
        line = [task, f"{context:,}", f"{cell[0]['dense_score']:.1f}"]
        for budget in budgets:
            scores = by_seed(row for row in cell if row["budget"] == budget)
            line.append(_mean(scores))
        lines.append(line)
    if not lines:
        return []
    return [
        "## The learned map against the budget",
        "Mean over the seeds' maps. Where a budget cannot hold 128 sink and 256 recent tokens, each is at most a "
        "quarter of it.",
        f"![Scores over budgets]({PICTURES['budgets']})",
        table(["task", "context", "dense", *map(share_name, budgets)], lines),
    ]


def _rules(results: Record) -> list[str]:
    """One map, pages and rules varied; only where something varies."""
    rows = [row for row in results["rows"] if row["method"] == "hardkuma" and row["task"] != DIALOGUE]
    varied = [row for row in rows if (row["page_size"], row["page_score"], row["rule"]) != (64, "max", "budget")]
    if not varied:
        return []
    seed = varied[0]["seed"]
    rows = [row for row in rows if row["seed"] == seed and row["budget"] in COMPARED]
    lines = []
    kinds = dict.fromkeys((row["rule"], row["page_size"], row["page_score"]) for row in rows)
    for kind in sorted(kinds, key=lambda kind: (kind[0] != "budget", kind)):
        line = ["top-k" if kind[0] == "budget" else kind[0], str(kind[1]), kind[2]]
        for budget in COMPARED:
            mine = [
                row
                for row in rows
                if (row["rule"], row["page_size"], row["page_score"]) == kind and row["budget"] == budget
            ]
            amounts = sorted({row["amount"] for row in mine if row["amount"] is not None})
            line += [
                _mean([row["score"] for row in mine]),
                _mean([row["sparse_read"] for row in mine], 2),
                _range(amounts),
            ]
        lines.append(line)
    heads = [h for b in COMPARED for h in (f"score at {share_name(b)}", "a sparse head reads, %", "its number")]
    return [
        "## Pages and rules",
        f"The learned map of seed {seed}; mean over tasks and contexts. The numbers of the rules were chosen on other "
        "prompts, for each context, so that sparse heads read as much as under top-k.",
        table(["rule", "page", "page score", *heads], lines),
    ]


def _corrections(results: Record) -> list[str]:
    rows = [row for row in results["rows"] if row["task"] == DIALOGUE]
    if not rows:
        return []
    lines = [
        [share_name(row["budget"]), "yes" if row["correction"] else "no", f"{row['score']:.2f}",
         f"{row['dense_score']:.2f}", f"{row['samples']:,}"]
        for row in rows
    ]  # fmt: skip
    tokens = results["sizes"]["dialogue_tokens"]
    return [
        "## Cache correction in long generations",
        f"{tokens:,} tokens of questions and answers about one document of {rows[0]['context']:,} tokens, fed one by "
        "one through the decode path; the cache is corrected every 32 tokens.",
        table(["budget", "correction", "score", "dense", "answers"], lines),
    ]


def _between(results: Record) -> list[str]:
    between = results["between"]
    if not between:
        return []
    lines = []
    for method in dict.fromkeys(run["method"] for run in between):
        runs = [run for run in between if run["method"] == method]
        line = [method]
        for part in (0.25, 0.5, 0.75, 1.0):
            line.append(_spread([100 * run["share"][_index(run["steps"], part)] for run in runs]))
        lines.append(line)
    return [
        "## Gates that are undecided",
        "Share of gates with 0.05 < E[z] < 0.95, in %, after a part of the training; mean, lowest and highest seed.",
        f"![Undecided gates over steps]({PICTURES['between']})",
        table(["gates", "1/4", "1/2", "3/4", "end"], lines),
    ]


def _maps(results: Record) -> list[str]:
    lines = []
    for name, head_map in results["maps"].items():
        heads = "; ".join(
            f"{layer}: {' '.join(map(str, ids))}" for layer, ids in enumerate(head_map["retrieval"]) if layer and ids
        )
        lines.append([name, heads, str(head_map.get("above_half", ""))])
    return [
        "## The maps",
        "KV heads that retrieve, layer by layer, above layer 0, where all do; and how many gates end with E[z] > 1/2, "
        "layer 0 included.",
        table(["map", "layer: heads", "E[z] > 1/2"], lines),
    ]


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    text = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in text)


def _mean(values: Sequence[float], digits: int = 1) -> str:
    return f"{statistics.fmean(values):.{digits}f}" if values else ""


def _spread(values: Sequence[float]) -> str:
    return _mean(values) if len(values) < 2 else f"{_mean(values)} ({min(values):.1f}, {max(values):.1f})"


def _range(values: Sequence[float]) -> str:
    shown = list(dict.fromkeys(f"{value:.5g}" for value in values))
    return " to ".join(dict.fromkeys([shown[0], shown[-1]])) if shown else ""


def _index(steps: Sequence[int], part: float) -> int:
    """The last entry that is not after this part of the steps, or the first one."""
    return max([i for i, step in enumerate(steps) if step <= part * steps[-1]], default=0)
