"""The folder of an evaluation: results line by line as they come, so that an interrupted run goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lychee_jax.evaluation.cases import Case, Cell
from lychee_jax.run_folder import Record, append_lines, claim, read_lines

SETTINGS, ANSWERS, PROMPTS = "settings.json", "answers.jsonl", "prompts.jsonl"


class Journal:
    """`settings.json`, `answers.jsonl` (a line for each prompt and variant) and `prompts.jsonl` in one folder.

    Other files in the folder are left alone. What a case is called: task, length, depth, index.
    """

    def __init__(self, folder: Path, settings: Record) -> None:
        """Open a folder, or make it.

        Raises:
            UserError: the folder is a file, or holds a run with other settings.
        """
        claim(folder, settings, SETTINGS)
        self.folder = folder
        self.records = read_lines(folder / ANSWERS)
        self._done = {(*_name(record), record["variant"]) for record in self.records}
        self._kept = {_name(record) for record in read_lines(folder / PROMPTS)}

    def has(self, cell: Cell, index: int, variant: str) -> bool:
        """Whether this answer is there already."""
        return (*cell.key, index, variant) in self._done

    def keep_prompt(self, cell: Cell, index: int, case: Case) -> None:
        """Keep what was asked, once for all variants."""
        name = (*cell.key, index)
        if name not in self._kept:
            self._kept.add(name)
            append_lines(self.folder / PROMPTS, [{**_fields(cell, index), "prompt": case.prompt}])

    def add(self, cell: Cell, variant: str, answers: list[tuple[int, Record]]) -> None:
        """Keep the answers of a batch, on the disk when this returns."""
        records = [{**_fields(cell, index), "variant": variant, **answer} for index, answer in answers]
        append_lines(self.folder / ANSWERS, records)
        self.records += records
        self._done |= {(*_name(record), variant) for record in records}


def _fields(cell: Cell, index: int) -> Record:
    task, length, depth = cell.key
    return {"task": task, "length": length, "depth": depth, "index": index}


def _name(record: Record) -> tuple[Any, ...]:
    return record["task"], record["length"], record["depth"], record["index"]
