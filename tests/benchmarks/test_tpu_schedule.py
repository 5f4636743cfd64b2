"""What is read out of the TPU compiler's schedule, and that it meets the targets."""

import json
from pathlib import Path

import pytest

from lychee_jax.benchmarks import tpu_compiler, tpu_schedule, tpu_step
from lychee_jax.benchmarks.tpu_schedule import Schedule, ScheduleRow

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "tpu_schedule.json"
# Issue time over DMA time of dense and of sparse decoding, and predicted over roofline, for a layer of Llama-3-8B.
TARGETS = {"v5e": (0.7, 0.5, 1.25), "v5p": (0.9, 0.6, 1.25), "v6e": (1.0, 0.85, 1.3)}

# Ten bundles of prologue, a loop of two ways and an inner loop, as the compiler prints them.
PRINTED = """
= control target key start
LH: loop header
= control target key end

     0   :  { %s1 = smov 0  ;;  %s2 = inlined_call_operand.hbm [shape: s32[8]] }
   0x1   :  {} /* Start region 1 */
   0x2 LB: > { %p1 = scmp.eq.s32.totalorder %s1, 0
note: a bundle may span lines */ }
   0x3   : > { %5 = sbr.rel (%p1) target bundleno = 13 (0xd), region = 3 }
   0x4   : > {}
   0x5   : > {}
   0x6   : > {}
   0x7   : > {}
   0x8   : > { %7 = dma.hbm_to_vmem [thread:$0] }
   0x9   : > { %8 = dma.hbm_to_vmem [thread:$0] }
   0xa   : > { %v1 = vadd.f32 }
   0xb   : > { %v2 = vadd.f32 }
   0xc   : > { %v3 = vadd.f32 }
   0xd PF: > { %9 = sbr.rel (!%p1) target bundleno = 21 (0x15), region = 4 }
   0xe   : > {}
   0xf   : > {}
  0x10   : > {}
  0x11   : > {}
  0x12   : > { %7 = dma.hbm_to_vmem [thread:$0] }
  0x13   : > { %8 = dma.hbm_to_vmem [thread:$0] }
  0x14   : > { %v1 = vadd.f32 }
  0x15 PF: > { %p2 = scmp.ge.s32.totalorder %s1, 8 }
  0x16   : > { %11 = sbr.rel (!%p2) target bundleno = 2 (0x2), region = 9 }
  0x17   :  {}
  0x18   :  {}
  0x19   :  {}
  0x1a   :  {}
  0x1b   :  { %12 = vsyncadd }
"""


def test_bundles_branches_and_loops_are_found() -> None:
    schedule = Schedule(PRINTED)
    assert schedule.length == 28
    assert schedule.branches == {3: (True, 13), 13: (True, 21), 22: (True, 2)}
    assert schedule.loops == [(2, 26)]
    with pytest.raises(ValueError, match="bundles"):
        Schedule("nothing")


def test_an_iteration_takes_one_of_the_two_turns() -> None:
    """All 25 bundles of the loop, delay slots included, but the other turn's fetches and what follows them."""
    cycles, around = tpu_schedule.attention_cycles(Schedule(PRINTED), step_pages=2, group=8)
    assert cycles == 25 - 3
    assert around == 2 + 1
    with pytest.raises(ValueError, match="fetches"):
        tpu_schedule.attention_cycles(Schedule(PRINTED), step_pages=64, group=8)


def test_a_loop_counts_as_often_as_it_runs() -> None:
    assert tpu_schedule.select_cycles(Schedule(PRINTED), [3]) == (25, 28 + 2 * 25)
    with pytest.raises(ValueError, match="loops"):
        tpu_schedule.select_cycles(Schedule(PRINTED), [3, 4])


def check_targets(rows: list[ScheduleRow]) -> None:
    for row in rows:
        dense, sparse, ratio = TARGETS[row.chip]
        if row.op == "select_pages":
            assert row.predicted_us <= 6.0
            continue
        assert row.issue_ns / row.dma_ns <= (dense if row.op == "dense_decode" else sparse), row
        assert row.ratio <= ratio, row


def of_target(row: ScheduleRow) -> bool:
    found = (row.model, row.dtype, row.kv, row.page_size, row.context)
    return found == ("llama-3-8b", "bfloat16", "bfloat16", 64, 131072)


def test_the_published_schedules_meet_the_targets() -> None:
    rows = [ScheduleRow(**row) for row in json.loads(RESULTS.read_text())["rows"]]
    shown = [row for row in rows if of_target(row)]
    assert {(row.chip, row.op) for row in shown} == {
        (chip, op) for chip in TARGETS for op in ("dense_decode", "sparse_decode", "select_pages")
    }
    check_targets(shown)


@pytest.mark.slow
@pytest.mark.libtpu
@pytest.mark.skipif(not tpu_compiler.installed(), reason="libtpu, the TPU compiler, is not installed here")
def test_todays_compiler_still_meets_them() -> None:
    seen = []
    report = tpu_schedule.run(["v5e"], ("llama-3-8b",), lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, len(report.rows)) for i in range(len(report.rows))]
    shown = [row for row in report.rows if of_target(row)]
    assert len(shown) == 3
    check_targets(shown)
    assert {(step.weights, step.kv) for step in report.steps} == set(tpu_step.STORED)
    assert "no TPU was used" in str(report)
