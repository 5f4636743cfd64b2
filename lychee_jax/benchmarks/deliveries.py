"""What a server's users notice, from the list of what was delivered when: arithmetic alone, no engine."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

Phase = Literal["reading", "decoding"]


@dataclasses.dataclass(frozen=True)
class Delivery:
    """New tokens that reached one request.

    Attributes:
        time: in seconds since the run began; what one step of the engine delivers has one time.
        request: whose.
        tokens: how many, at least one.
        phase: "reading" if a prompt is being read after that step: a request has a row and no token yet.
        host_s: seconds that the host had worked in the engine since the run began.
    """

    time: float
    request: str
    tokens: int
    phase: Phase
    host_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Spread:
    """Of several samples."""

    median: float
    p99: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread | None":
        """None where there are no samples."""
        return cls(statistics.median(samples), float(np.percentile(samples, 99))) if samples else None


@dataclasses.dataclass(frozen=True)
class Columns:
    """A row decodes from its first delivery to its last. A gap is the time between two deliveries of one row.

    A stretch of time between two deliveries of the engine is quiet if no prompt is read in it: at neither of its ends a
    request has a row and no token, and it does not end with anyone's first token. The batch is full in quiet stretches
    in which as many rows decode as ever do in one.

    Attributes:
        seconds: from the first arrival to the last delivery.
        tokens_per_s: all new tokens over these seconds.
        full_rows: rows of the full batch; 0 if no stretch was quiet.
        full_seconds: how long it was full.
        full_tokens_per_s: tokens delivered in that time, over it: the rate of decoding.
        first_token_s: from a request's arrival to its first token.
        between_tokens_s: a gap over the tokens that end it.
        block_s: the median of the gaps in which no prompt was read: the time of a usual block.
        longest_stall_s: the longest gap of all.
        stall_blocks: the longest stall in usual blocks.
        host_share: the host's work in the time of full batches, over that time.
        samples_first_token_s, samples_gap_s, samples_gap_tokens: what the numbers were made from.
    """

    seconds: float
    tokens_per_s: float
    full_rows: int
    full_seconds: float
    full_tokens_per_s: float | None
    first_token_s: Spread
    between_tokens_s: Spread | None
    block_s: float | None
    longest_stall_s: float | None
    stall_blocks: float | None
    host_share: float | None
    samples_first_token_s: list[float]
    samples_gap_s: list[float]
    samples_gap_tokens: list[int]


@dataclasses.dataclass(frozen=True)
class _Stretch:
    """The time between two deliveries of the engine."""

    seconds: float
    rows: int
    quiet: bool
    tokens: int  # that end it
    host_s: float


def columns(arrivals: Mapping[str, float], deliveries: Sequence[Delivery]) -> Columns:
    """Sum up a run.

    Args:
        arrivals: when each request arrived, on the clock of the deliveries.
        deliveries: in the order of time; each request has at least one.
    """
    rows: dict[str, list[Delivery]] = {request: [] for request in arrivals}
    for delivery in deliveries:
        rows[delivery.request].append(delivery)
    times, stretches = _stretches(rows, deliveries)
    place = {time: index for index, time in enumerate(times)}
    # How many stretches before each time were not quiet.
    disturbed = [0, *itertools.accumulate(not stretch.quiet for stretch in stretches)]
    gaps: list[float] = []
    counts: list[int] = []
    quiet_gaps: list[float] = []
    for own in rows.values():
        for before, after in itertools.pairwise(own):
            gaps.append(after.time - before.time)
            counts.append(after.tokens)
            if disturbed[place[before.time]] == disturbed[place[after.time]]:
                quiet_gaps.append(gaps[-1])
    quiet = [stretch for stretch in stretches if stretch.quiet]
    most = max((stretch.rows for stretch in quiet), default=0)
    full = [stretch for stretch in quiet if most and stretch.rows == most]
    full_seconds = math.fsum(stretch.seconds for stretch in full)
    first = [own[0].time - arrivals[request] for request, own in rows.items()]
    first_token = Spread.of(first)
    assert first_token is not None
    block = statistics.median(quiet_gaps) if quiet_gaps else None
    stall = max(gaps, default=None)
    seconds = times[-1] - min(arrivals.values())
    return Columns(
        seconds=seconds,
        tokens_per_s=sum(delivery.tokens for delivery in deliveries) / seconds,
        full_rows=most,
        full_seconds=full_seconds,
        full_tokens_per_s=sum(stretch.tokens for stretch in full) / full_seconds if full else None,
        first_token_s=first_token,
        between_tokens_s=Spread.of([gap / count for gap, count in zip(gaps, counts, strict=True)]),
        block_s=block,
        longest_stall_s=stall,
        stall_blocks=stall / block if stall is not None and block is not None else None,
        host_share=sum(stretch.host_s for stretch in full) / full_seconds if full else None,
        samples_first_token_s=first,
        samples_gap_s=gaps,
        samples_gap_tokens=counts,
    )


def _stretches(
    rows: Mapping[str, Sequence[Delivery]], deliveries: Sequence[Delivery]
) -> tuple[list[float], list[_Stretch]]:
    """The times of deliveries, and what happened between each two."""
    steps = [list(group) for _, group in itertools.groupby(deliveries, key=lambda delivery: delivery.time)]
    starts = {own[0].time for own in rows.values()}
    stretches = []
    for before, after in itertools.pairwise(steps):
        start, end = before[0].time, after[0].time
        stretches.append(
            _Stretch(
                seconds=end - start,
                rows=sum(own[0].time <= start and own[-1].time >= end for own in rows.values()),
                quiet=before[0].phase == after[0].phase == "decoding" and end not in starts,
                tokens=sum(delivery.tokens for delivery in after),
                host_s=after[0].host_s - before[0].host_s,
            )
        )
    return [step[0].time for step in steps], stretches
