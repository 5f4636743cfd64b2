"""How long the TPU kernels take by the compiler's own schedule, for chips that are not here.

The TPU compiler decides which instructions issue in which cycle, and can be made to print it. This counts the cycles
of a kernel's main loop and sets them against the bytes that an iteration fetches meanwhile.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from lychee_jax.benchmarks import tpu_compiler
from lychee_jax.benchmarks.shapes import MODELS
from lychee_jax.benchmarks.tpu_compiler import CHIPS, Chip
from lychee_jax.errors import UserError
from lychee_jax.files import json_text, parse_json
from pallas_kernels.types import KVDtype

ASSUMPTIONS = (
    "From the schedule after register allocation; no TPU was used and nothing was timed. Assumed: clocks of "
    + ", ".join(f"{chip.clock_ghz:g} GHz ({chip.name})" for chip in CHIPS.values())
    + "; memory bandwidths of "
    + ", ".join(f"{chip.bandwidth / 1e9:g} GB/s ({chip.name})" for chip in CHIPS.values())
    + ", never short of it; no stalls: no latency of the first copy, no waits of the launch, none of XLA's own small "
    "operations around a kernel. All of v5p is per core: one of two that share the work."
)
MODELS_SHOWN = ("llama-3-8b", "qwen2.5-7b", "qwen2.5-3b", "bundled")
_CONTEXT = 131072
_PAGE_SIZE = 64
_BUDGET = 4096
# Bundles after a branch that run whether it is taken or not.
_DELAY = 4


@dataclasses.dataclass(frozen=True)
class ScheduleRow:
    """One op on one chip.

    Attributes:
        heads: KV heads that the op computes.
        cycles: of one iteration of the main loop, its longest path; what runs only in partial steps is left out.
        bytes: fetched by an iteration.
        issue_ns: `cycles` at the chip's clock.
        dma_ns: `bytes` at the chip's bandwidth.
        predicted_us: the whole kernel, what runs before and after the loop included.
        roofline_us: everything that must be read, at the chip's bandwidth.
        ratio: predicted over roofline.
        bound: which of issue and DMA takes longer in the loop.
        kv: what the cache holds: numbers of `dtype`, or of 8 bits.
    """

    chip: str
    op: str
    model: str
    dtype: str
    page_size: int
    context: int
    heads: int
    cycles: int
    bytes: int
    issue_ns: float
    dma_ns: float
    predicted_us: float
    roofline_us: float
    ratio: float
    bound: str
    kv: str


@dataclasses.dataclass(frozen=True)
class ScheduleReport:
    """The rows, and what they assume."""

    assumptions: str
    rows: list[ScheduleRow]

    def __str__(self) -> str:
        table = Table(
            "chip", "op", "model", "dtype", "cache", "cycles", "issue", "DMA", "issue ÷ DMA", "predicted", "roofline",
            "ratio", "bound", title=f"A layer's kernels at {_CONTEXT:,} tokens, pages of {_PAGE_SIZE}",
            title_justify="left",
        )  # fmt: skip
        for row in self.rows:
            table.add_row(
                row.chip, row.op, row.model, row.dtype, row.kv, f"{row.cycles:,}", f"{row.issue_ns:,.0f} ns",
                f"{row.dma_ns:,.0f} ns", f"{row.issue_ns / row.dma_ns:.2f}", f"{row.predicted_us:,.1f} µs",
                f"{row.roofline_us:,.1f} µs", f"{row.ratio:.2f}", row.bound,
            )  # fmt: skip
        console = Console(width=140)
        with console.capture() as capture:
            console.print(table)
            console.print(self.assumptions)
        return capture.get()


class Schedule:
    """Bundles of a kernel in order, and where its branches lead: what `*-packed-bundles-post-ra.txt` says."""

    _BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|\d+)\s+(?:LH|LB|LE|PB|PF|CT)?\s*:[ >]*\{", re.MULTILINE)
    _BRANCH = re.compile(r"sbr\.rel(?: \((!?%p\w+)\))? target bundleno = (\d+)")

    def __init__(self, text: str):
        starts = list(self._BUNDLE.finditer(text))
        if not starts:
            raise ValueError("no bundles in the schedule")
        ends = [match.start() for match in starts[1:]] + [len(text)]
        self.bundles = {int(m[1], 0): text[m.end() : end] for m, end in zip(starts, ends, strict=True)}
        self.length = max(self.bundles) + 1
        self.branches: dict[int, tuple[bool, int]] = {}
        for number, bundle in self.bundles.items():
            if found := self._BRANCH.search(bundle):
                self.branches[number] = (found[1] is not None, int(found[2]))
        # A loop: from the target of a branch backwards to the last bundle of that branch.
        self.loops = sorted((to, at + _DELAY) for at, (_, to) in self.branches.items() if to <= at)

    def inner(self, loop: tuple[int, int]) -> list[tuple[int, int]]:
        """Loops inside another."""
        return [other for other in self.loops if other != loop and loop[0] <= other[0] and other[1] <= loop[1]]

    def has(self, instruction: str, loop: tuple[int, int]) -> int:
        """How often an instruction occurs in a loop."""
        return sum(self.bundles.get(n, "").count(instruction) for n in range(loop[0], loop[1] + 1))

    def longest(self, first: int, last: int, without: Callable[[int], bool] = lambda _: False) -> int:
        """Bundles on the longest path from `first` to `last` without going backwards and without those of `without`."""
        reach = {first: 1}
        best = 0
        for number in range(first, last + 1):
            length = reach.get(number)
            if length is None or without(number):
                continue
            if number == last:
                best = length
            came = self.branches.get(number - _DELAY)
            following = []
            if came is None or came[0] or came[1] <= number:
                following.append(number + 1)
            if came is not None and number < came[1] <= last:
                following.append(came[1])
            for to in following:
                reach[to] = max(reach.get(to, 0), length + 1)
        if best == 0:
            raise ValueError(f"no path from bundle {first} to bundle {last}")
        return best


def attention_cycles(schedule: Schedule, step_pages: int, group: int) -> tuple[int, int]:
    """(cycles of an iteration, cycles before and after the loop) of a kernel that streams pages.

    The loop has a turn for each of two buffers, of which an iteration runs one. Loops inside it run in partial steps
    only; ends of items, which run once for each, are counted into every iteration.
    """
    main = max(schedule.loops, key=lambda loop: loop[1] - loop[0])
    inside = schedule.inner(main)
    fetches = [n for n in range(main[0], main[1] + 1) if "dma.hbm_to_vmem" in schedule.bundles.get(n, "")]
    straight = [n for n in fetches if not any(a <= n <= b for a, b in inside)]
    if len(straight) < 2 * step_pages // 2:
        raise ValueError("the main loop has fewer fetches than two turns of a step should")
    count = len(straight) // 2
    turns = [(straight[0], straight[count - 1]), (straight[count], straight[-1])]

    def cycles(turn: tuple[int, int], other: tuple[int, int]) -> int:
        def avoided(number: int) -> bool:
            return other[0] <= number <= other[1] or any(a <= number <= b for a, b in inside)

        del turn
        return schedule.longest(main[0], main[1], avoided)

    iteration = max(cycles(turns[0], turns[1]), cycles(turns[1], turns[0]))
    outside = (main[0], schedule.length - 1 - main[1])
    before = sum(outside)
    for loop in schedule.loops:
        if loop[1] < main[0]:  # starts the first step, `group` pages a turn
            before += (loop[1] - loop[0] + 1) * (-(-step_pages // group) - 1)
    return iteration, before


def select_cycles(schedule: Schedule, trips: list[int]) -> tuple[int, int]:
    """(cycles of the first loop, cycles of the whole kernel); loops run `trips` times each, in their order."""
    if len(schedule.loops) != len(trips):
        raise ValueError(f"the kernel has {len(schedule.loops)} loops, not {len(trips)}")
    lengths = [end - start + 1 for start, end in schedule.loops]
    total = schedule.length + sum(n * (trip - 1) for n, trip in zip(lengths, trips, strict=True))
    return lengths[0], total


def run(
    chips: list[str], models: tuple[str, ...] = MODELS_SHOWN, on_row: Callable[[int, int], None] | None = None
) -> ScheduleReport:
    """Compile every op for `chips` in a process of its own, where the compiler prints; `on_row(done, total)`.

    Raises:
        UserError: libtpu is not installed, or its output is not understood.
    """
    if not tpu_compiler.installed():
        raise UserError("the TPU compiler is not installed; pip install libtpu brings it")
    cases = list(_cases(chips, models))
    rows: list[ScheduleRow] = []
    with tempfile.TemporaryDirectory(prefix="lychee-tpu-") as folder:
        environment = os.environ | {
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "false",
        }
        command = [
            sys.executable,
            "-m",
            "lychee_jax.benchmarks.tpu_schedule",
            folder,
            ",".join(chips),
            ",".join(models),
        ]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            for line in process.stdout:
                if line.startswith('{"chip"'):
                    rows.append(ScheduleRow(**parse_json(line, "a row")))
                    if on_row:
                        on_row(len(rows), len(cases))
            problem = process.stderr.read().strip().splitlines()
        if process.returncode:
            reason = problem[-1] if problem else f"exit status {process.returncode}"
            raise UserError(f"the TPU compiler's schedule could not be read: {reason}")
    return ScheduleReport(ASSUMPTIONS, rows)


def _cases(chips: list[str], models: tuple[str, ...]) -> Iterator[tuple[Chip, str, str, str, KVDtype | None]]:
    for chip in chips:
        for model in models:
            for dtype in ("bfloat16", "float32") if model == MODELS_SHOWN[0] else ("bfloat16",):
                for op in ("dense_decode", "sparse_decode"):
                    yield CHIPS[chip], model, dtype, op, None
            for kv_dtype in get_args(KVDtype) if model == MODELS_SHOWN[0] else ():
                for op in ("dense_decode", "sparse_decode"):
                    yield CHIPS[chip], model, "bfloat16", op, kv_dtype
            yield CHIPS[chip], model, "bfloat16", "select_pages", None


def _work(folder: Path, chips: list[str], models: tuple[str, ...]) -> None:
    """The process in which the compiler prints: compile, read, forget, case after case."""
    for chip, model, dtype, op, kv_dtype in _cases(chips, models):
        for old in folder.iterdir():
            old.unlink()
        row = _measure(chip, model, dtype, op, kv_dtype, lambda op=op: _printed(folder, op))
        print(json_text(dataclasses.asdict(row)), flush=True)


def _printed(folder: Path, op: str) -> Schedule:
    files = [path for path in folder.glob(f"*-{op}*packed-bundles-post-ra.txt") if "schedule-analysis" not in path.name]
    if len(files) != 1:
        raise UserError(f"{len(files)} schedules of {op} were printed, not one")
    return Schedule(files[0].read_text())


def _measure(
    chip: Chip, model: str, dtype: str, op: str, kv_dtype: KVDtype | None, printed: Callable[[], Schedule]
) -> ScheduleRow:
    import jax
    import jax.numpy as jnp

    import pallas_kernels
    from lychee_jax.cache.pages import make_pools
    from pallas_kernels import Selection, SelectionSpec
    from pallas_kernels.mosaic_tpu import select
    from pallas_kernels.mosaic_tpu.launch import Launch

    config = MODELS[model]
    context = min(_CONTEXT, config.max_position_embeddings)
    heads, head_dim = config.num_kv_heads, config.head_dim
    pages, budget = context // _PAGE_SIZE, _BUDGET // _PAGE_SIZE
    sparse = op == "sparse_decode"

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    kv = jax.eval_shape(lambda: make_pools(config, pages + 1, _PAGE_SIZE, dtype, kv_dtype)[0])

    def call(q: Any, kv: Any, table: Any, lengths: Any, ids: Any, chosen: Any, counted: Any, scores: Any) -> Any:
        name, scale = "mosaic_tpu", head_dim**-0.5
        if op == "select_pages":
            return pallas_kernels.select_pages(
                scores, lengths, SelectionSpec(budget, 2, 4), page_size=_PAGE_SIZE, implementation=name
            )
        if sparse:
            selection = Selection(chosen, counted)
            return pallas_kernels.sparse_decode(q, kv, table, lengths, selection, ids, scale=scale, implementation=name)
        return pallas_kernels.dense_decode(
            q, kv, table, lengths, ids, scale=scale, page_scores="max", implementation=name
        )

    tpu_compiler.compile_for(
        chip, jax.jit(call), array(1, heads, config.groups, head_dim, dtype=dtype),
        kv, array(1, pages), array(1), array(heads), array(1, heads, budget), array(1, heads),
        array(1, heads, pages, dtype=jnp.float32),
    )  # fmt: skip
    schedule, per_us = printed(), chip.clock_ghz * 1e3
    if op == "select_pages":
        cycles, total = select_cycles(schedule, select.trips(budget))
        size = heads * pages * 4
        predicted, needed = total / per_us, size
    else:
        launch = Launch(
            batch=1, kv_heads=heads, heads=heads, groups=config.groups, page_size=_PAGE_SIZE, head_dim=head_dim,
            max_pages=budget if sparse else pages, sparse=sparse, cores=chip.cores,
        )  # fmt: skip
        cycles, around = attention_cycles(schedule, launch.step_pages, launch.config.dma_unroll)
        page_bytes = sum(leaf.dtype.itemsize * leaf.size for leaf in jax.tree.leaves(kv)) // ((pages + 1) * heads)
        size = launch.step_pages * page_bytes
        share = (budget if sparse else pages) / launch.kv_splits
        steps = launch.core_heads * -(-int(share) // launch.step_pages)
        issue, dma = cycles / per_us, size / chip.bandwidth * 1e6
        # The first step's copy and the last step's work have nothing beside them.
        predicted = around / per_us + dma + (steps - 1) * max(issue, dma) + issue
        needed = heads / chip.cores * (budget if sparse else pages) * page_bytes
    issue_ns, dma_ns = cycles / chip.clock_ghz, size / chip.bandwidth * 1e9
    roofline = needed / chip.bandwidth * 1e6
    return ScheduleRow(
        chip.name, op, model, dtype, _PAGE_SIZE, context, heads, cycles, size, round(issue_ns, 1), round(dma_ns, 1),
        round(predicted, 2), round(roofline, 2), round(predicted / roofline, 3),
        "issue" if op == "select_pages" or issue_ns > dma_ns else "DMA", kv_dtype or dtype,
    )  # fmt: skip


if __name__ == "__main__":
    _work(Path(sys.argv[1]), sys.argv[2].split(","), tuple(sys.argv[3].split(",")))
