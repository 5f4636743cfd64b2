"""What was counted so far, row by row, on disk: an interrupted study resumes where it was."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path

from lychee_jax.run_folder import append_lines, read_lines
from lychee_jax.studies.head_maps.rows import Row

JOURNAL = "scores.jsonl"


@dataclasses.dataclass(frozen=True)
class Count:
    """Right answers of `total`; pages that were read, and that were in the cache, over all heads and steps."""

    right: int
    total: int
    read: int
    held: int

    def __add__(self, other: Count) -> Count:
        return Count(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


class Tally:
    """`scores.jsonl` in a folder: a line for every row and chunk of prompts, named by its first prompt."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / JOURNAL
        self._counts: dict[str, dict[int, Count]] = collections.defaultdict(dict)
        for line in read_lines(self._file):
            self._counts[Row(**line["row"]).key][line["first"]] = Count(**line["count"])

    def has(self, row: Row, first: int) -> bool:
        """Whether this chunk of the row was counted."""
        return first in self._counts[row.key]

    def add(self, row: Row, first: int, count: Count) -> None:
        """Keep a count, on the disk when this returns."""
        fields = dataclasses.asdict
        append_lines(self._file, [{"row": fields(row), "first": first, "count": fields(count)}])
        self._counts[row.key][first] = count

    def total(self, row: Row) -> Count:
        """All chunks of a row together."""
        return sum(self._counts[row.key].values(), Count(0, 0, 0, 0))
