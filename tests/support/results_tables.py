"""The tables of the documents, made from `docs/results/*.json`.

    PYTHONPATH=. python tests/support/results_tables.py

writes each between the marks of its name: `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lychee_jax.benchmarks.targets import read_targets
from lychee_jax.files import read_json_object, read_text
from lychee_jax.studies.real_model.report import against_others, by_budget, by_map, perplexities

DOCS = Path(__file__).parents[2] / "docs"
RESULTS = DOCS / "results"
DOCUMENTS = ("index.md", "results.md")
_PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

Report = dict[str, Any]


def filled(text: str) -> str:
    """A document's text with every table that it has a place for."""
    return _PLACE.sub(lambda place: f"{place[1]}\n{TABLES[place[2]]()}\n\n{place[3]}", text)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _sourced(table: str, report: Report, *names: str, device: str | None = None) -> str:
    """A table, and under it what was measured on and where the raw numbers are."""
    software = f", JAX {report['jax']}" if "jax" in report else ""
    raw = ", ".join(f"[`{name}`](results/{name})" for name in names)
    return f"{table}\n\n{device or report['device']}{software}. Raw: {raw}."


def _read(name: str) -> Report:
    return read_json_object(RESULTS / name)


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def _range(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def _share(part: float) -> str:
    return f"{100 * part:.0f} %"


def _beside(time: float, roofline: float) -> str:
    """Microseconds, and what the bytes allow where a time is about bytes at all."""
    return f"{time:.1f} ({roofline:.1f})" if roofline > 1 else f"{time:.1f}"


def _dense(row: Report) -> float:
    """Microseconds of the faster of the two dense steps."""
    return min(row["rivals"].values())


def _steps() -> list[Report]:
    return [row for row in _read("h200.json")["rows"] if row["name"] == "decode_step"]


def figures() -> str:
    """The three figures of the front page."""
    found = [
        row for row in _read("heads_10.json")["rows"]
        if (row["context"], row["budget"], row["seed"]) == (32768, 1 / 8, 0)
    ]  # fmt: skip
    right, dense = (_mean(row[name] for row in found) for name in ("score", "dense_score"))
    one, six = (
        next(row for row in _steps() if (row["model"], row["context"], row["batch"]) == ("llama-3-8b", 131072, batch))
        for batch in (1, 6)
    )
    (step,) = _read("train.json")["rows"]
    rows = [
        [
            "Does it still find things?",
            f"**{right:.0f} %** of {sum(row['samples'] for row in found)} questions about facts hidden in "
            f"{found[0]['context']:,} tokens (dense: {dense:.0f} %), reading "
            f"{_mean(row['cache_read'] for row in found):.0f} % of the KV cache",
            "bundled model",
        ],
        [
            "How fast is a token?",
            f"**{_dense(six) / six['us']:.1f} times** dense attention for {six['batch']} sequences of "
            f"{six['context']:,} tokens: {six['us'] / 1e3:.1f} ms instead of {_dense(six) / 1e3:.1f}; "
            f"{_dense(one) / one['us']:.1f} times for one sequence",
            "shape of Llama-3-8B",
        ],
        [
            "What does a head map cost?",
            f"**{3000 * step['seconds'] / 60:.0f} minutes** for the 3,000 steps of the paper's recipe",
            "shape of Llama-3-8B",
        ],
    ]
    lines = [["", "measured on one NVIDIA H200", "with"], ["---", "---", "---"], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def answers() -> str:
    """Passkeys, dense and hybrid."""
    report = _read("bundled.json")
    rows = {(row["length"], row["kind"], row["mode"]): row for row in report["results"]}
    cells = []
    for length, kind in sorted({key[:2] for key in rows}):
        dense, hybrid = (rows[length, kind, mode] for mode in ("dense", "hybrid"))
        cells.append([
            f"{length:,}", str(hybrid["facts"]) if kind == "passkey" else "1", str(hybrid["samples"]),
            _share(dense["exact_match"]), _share(hybrid["exact_match"]), _share(hybrid["attention"]["kv_read_share"]),
        ])  # fmt: skip
    head = ["prompt tokens", "passkeys in it", "prompts", "dense", "hybrid", "KV cache read"]
    return _sourced(_table(head, cells), report, "bundled.json")


def budgets() -> str:
    """Scores of the shipped head map, by budget."""
    report = _read("heads_10.json")
    rows = report["rows"]
    shares = sorted({row["budget"] for row in rows})
    cells = []
    for context in sorted({row["context"] for row in rows}):
        here = [row for row in rows if row["context"] == context]
        scores = [_mean(row["score"] for row in here if row["budget"] == share) for share in shares]
        cells.append([f"{context:,}", *(f"{score:.1f}" for score in [*scores, _mean(r["dense_score"] for r in here)])])
    read = [_mean(row["cache_read"] for row in rows if row["budget"] == share) for share in shares]
    cells.append(["KV cache read", *(f"{share:.0f} %" for share in read), "100 %"])
    head = ["prompt tokens", *(f"1/{1 / share:.0f}" for share in shares), "dense"]
    return _sourced(_table(head, cells), report, "heads_10.json")


def maps() -> str:
    """Head maps of equal size beside each other."""
    report = _read("heads.json")
    usual = {"budget": 1 / 8, "page_size": 64, "rule": "budget", "page_score": "max", "correction": False}
    rows = [row for row in report["rows"] if row["task"] != "dialogue" and row.items() >= usual.items()]
    names = {
        "hardkuma": "learned (`lychee train-heads`)", "layer": "whole layers", "random": "random heads",
    }  # fmt: skip
    cells = [["dense attention", f"{_mean(row['dense_score'] for row in rows):.1f}", "100 %"]]
    for method, name in names.items():
        here = [row for row in rows if row["method"] == method]
        read = _mean(row["cache_read"] for row in here)
        cells.append([name, f"{_mean(row['score'] for row in here):.1f}", f"{read:.0f} %"])
    return _sourced(
        _table(["8 of 32 heads", "right answers, %", "KV cache read"], cells), report, "heads.json", "heads.md"
    )


def perplexity() -> str:
    """Perplexity through the decode path."""
    report = _read("eval_perplexity.json")
    rows = report["results"]
    lengths = sorted({row["length"] for row in rows})
    cells = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        here = {row["length"]: row for row in rows if row["variant"] == variant}
        read = _mean(row["kv_read_share"] for row in here.values())
        cells.append([variant, *(f"{here[length]['shown']:.3f}" for length in lengths), _share(read)])
    head = ["", *(f"after {length:,} tokens" for length in lengths), "KV cache read"]
    return _sourced(_table(head, cells), report, "eval_perplexity.json", device="CPU")


def steps() -> str:
    """The whole decode step, dense and hybrid."""
    cells = [
        [
            f"`{row['model']}`", f"{row['context']:,}", str(row["batch"]),
            f"{row['us'] / 1e3:.2f} ({row['roofline_us'] / 1e3:.2f})", f"{_dense(row) / 1e3:.2f}",
            f"**{_dense(row) / row['us']:.2f}**",
        ]
        for row in sorted(_steps(), key=lambda row: (row["model"], row["context"], row["batch"]))
    ]  # fmt: skip
    head = ["shape", "cached tokens", "sequences", "hybrid, ms (the bytes allow)", "dense, ms", "times as fast"]
    return _sourced(_table(head, cells), _read("h200.json"), "h200.json")


def engine() -> str:
    """What a user of the engine waits for."""
    report = _read("engine.json")
    asked = {
        "prompt of 130,900 tokens": ("reading a prompt of 130,900 tokens", ".2f", "s"),
        "decode at 131 K tokens, batch 1, hybrid": ("a token after 131 K others, hybrid", ".2f", "ms"),
        "decode at 131 K tokens, batch 1, dense": ("a token after 131 K others, dense", ".2f", "ms"),
        "16 rows of 4,096 tokens": ("16 sequences of 4,096 tokens, hybrid", ",.0f", "tokens/s"),
        "compile, cold": ("compiling, the first time", ".0f", "s"),
        "the same programs, found on disk": ("compiling, when the programs are on disk", ".2f", "s"),
    }
    cells = []
    for start, (name, form, unit) in asked.items():
        (row,) = (row for row in report["rows"] if row["what"].startswith(start))
        cells.append([name, f"{_range(row.get('seconds') or row['samples'], form)} {unit}"])
    return _sourced(_table(["", "measured"], cells), report, "engine.json")


def prefill() -> str:
    """Reading a long prompt."""
    report = _read("prefill.json")
    cells = [
        [
            f"`{row['model']}`", f"{row['context']:,}", f"{row['seconds']:.1f} s", f"{row['tflops']:.0f} TFLOP/s",
            _share(row["share"]), f"{row['peak_bytes'] / 1e9:.1f} GB",
        ]
        for row in report["rows"]
    ]  # fmt: skip
    head = ["shape", "prompt tokens", "time", "rate", "of the tensor cores' rate", "peak memory"]
    return _sourced(_table(head, cells), report, "prefill.json")


def kernels() -> str:
    """GPU kernels of one layer."""
    report = _read("h200.json")
    rows = [row for row in report["rows"] if row["name"] != "decode_step"]
    batches = sorted({row["batch"] for row in rows})
    names = {
        ("dense_decode", 8): "`dense_decode`, 8 heads",
        ("dense_decode", 1): "`dense_decode`, 1 head",
        ("hybrid_decode", 1): "`hybrid_decode`, 1 head retrieves",
        ("sparse_decode", 0): "`sparse_decode`, 64 pages",
        ("select_pages", 8): "`select_pages`, 64 of 2,048",
    }
    rivals = {
        "torch_cudnn": "… cuDNN, from torch", "jax_cudnn": "… cuDNN, from JAX", "torch_fa2": "… FlashAttention-2",
        "xla": "… plain JAX, over pages",
    }  # fmt: skip
    cells = []
    for key, name in names.items():
        here = {row["batch"]: row for row in rows if (row["name"], row["retrieval_heads"]) == key}
        cells.append([name, *(_beside(here[batch]["us"], here[batch]["roofline_us"]) for batch in batches)])
        if key == ("dense_decode", 8):
            for rival, label in rivals.items():
                cells.append([label, *(f"{here[batch]['rivals'][rival]:.1f}" for batch in batches)])
    head = ["µs (the bytes allow)", *(f"batch {batch}" for batch in batches)]
    return _sourced(_table(head, cells), report, "h200.json")


def training() -> str:
    """A step of `lychee train-heads`."""
    report = _read("train.json")
    cells = [
        [
            f"`{row['model']}`", f"{row['context']:,}", f"{row['seconds']:.2f} s", f"{row['peak_bytes'] / 1e9:.1f} GB",
            f"{row['weight_bytes'] / 1e9:.1f} GB",
        ]
        for row in report["rows"]
    ]  # fmt: skip
    head = ["shape", "prompt tokens", "a step", "peak memory", "of it weights"]
    return _sourced(_table(head, cells), report, "train.json")


def cpu() -> str:
    """A decoded token of the bundled model on a CPU."""
    report = _read("cpu_decode.json")
    cells = [
        [mode, f"{report['step_ms'][mode]:.0f} ms", f"{report['attention_ms'][mode]:.0f} ms", _share(share)]
        for mode, share in report["kv_read_share"].items()
        if mode in report["attention_ms"]
    ]
    table = _table([f"{report['context']:,} cached tokens", "a token", "attention alone", "KV cache read"], cells)
    return _sourced(table, report, "cpu_decode.json")


def tpu() -> str:
    """What the TPU compiler's schedule predicts."""
    report = _read("tpu_schedule.json")
    usual = {"model": "llama-3-8b", "dtype": "bfloat16", "page_size": 64, "context": 131072, "heads": 8}
    usual["kv"] = "bfloat16"
    rows = [row for row in report["rows"] if row.items() >= usual.items()]
    chips = list(dict.fromkeys(row["chip"] for row in rows))
    cells = []
    for op in dict.fromkeys(row["op"] for row in rows):
        here = {row["chip"]: row for row in rows if row["op"] == op}
        cells.append([f"`{op}`", *(_beside(here[chip]["predicted_us"], here[chip]["roofline_us"]) for chip in chips)])
    return _sourced(
        _table(["µs, predicted (the bytes allow)", *chips], cells),
        report,
        "tpu_schedule.json",
        device="No TPU was used",
    )


def real() -> str:
    """A real model, beside other systems that read as much of the cache."""
    report = _read("real.json")
    return _sourced(against_others(report), report, "real.json")


def real_budgets() -> str:
    """A real model by length and budget."""
    report = _read("real.json")
    return _sourced(f"{by_budget(report)}\n\nPerplexity:\n\n{perplexities(report)}", report, "real.json")


def real_maps() -> str:
    """A real model by the way in which its heads were chosen."""
    report = _read("real.json")
    return _sourced(by_map(report), report, "real.json")


def serving() -> str:
    """An engine that serves an 8 B model."""
    report = _read("serve.json")
    cells = [
        [
            row["name"], row["attention"], f"{len(row['prompt_tokens'])} × {row['prompt_tokens'][0]:,}",
            f"{row['full_rows']}", f"{row['full_tokens_per_s']:.0f}", f"{row['tokens_per_s']:.0f}",
            f"{row['first_token_s']['median']:.2f} s", f"{1e3 * row['between_tokens_s']['median']:.1f} ms",
        ]
        for row in report["rows"]
        if row.get("model") == "llama-3-8b"
    ]  # fmt: skip
    head = [
        "", "attention", "prompts", "rows while full", "tokens/s then", "tokens/s, end to end", "first token",
        "between tokens",
    ]  # fmt: skip
    return _sourced(_table(head, cells), report, "serve.json", device="NVIDIA H200")


def missed() -> str:
    """The targets that result files list and that were not met."""
    cells = [
        [
            target.what,
            "not measured" if target.value is None else f"{target.value:g}",
            f"{'≤' if target.sense == '<=' else '≥'} {target.target:g}",
        ]
        for path in sorted(RESULTS.glob("*.json"))
        for target in read_targets(path)
        if not target.met
    ]
    return _table(["", "measured", "target"], cells)


_MAKERS = (
    figures, answers, budgets, maps, perplexity, steps, engine, serving, prefill, kernels, training, cpu, tpu,
    real, real_budgets, real_maps, missed,
)  # fmt: skip
TABLES: dict[str, Callable[[], str]] = {make.__name__: make for make in _MAKERS}


if __name__ == "__main__":
    for name in DOCUMENTS:
        (DOCS / name).write_text(filled(read_text(DOCS / name)), encoding="utf-8")
