"""The folder of an evaluation: results line by line as they come, so that an interrupted run goes on where it was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lychee_jax.errors import UserError
from lychee_jax.evaluation.cases import Case, Cell
from lychee_jax.run_folder import Record, append_lines, claim, read_lines

SETTINGS, ANSWERS, PROMPTS = "settings.json", "answers.jsonl", "prompts.jsonl"


class Journal:
    """`settings.json`, `answers.jsonl` (a line for each prompt and variant) and `prompts.jsonl` in one folder.

    Other files in the folder are left alone. What a case is called: task, length, depth, index.
    """

    def __init__(self, folder: Path, settings: Record, inputs: Mapping[str, str] = MappingProxyType({})) -> None:
        """Open a folder, or make it; `inputs` are digests of what is read, by name.

        Raises:
            UserError: the folder is a file, or holds another run.
        """
        claim(folder, settings, SETTINGS, inputs=inputs)
        self.folder = folder
        self.records = read_lines(folder / ANSWERS)
        self._done = {(*_name(record), record["variant"]) for record in self.records}
        self._kept: dict[tuple[Any, ...], str] = {
            _name(record): record.get("digest", "") for record in read_lines(folder / PROMPTS)
        }

    def has(self, cell: Cell, index: int, variant: str) -> bool:
        """Whether this answer is there already."""
        return (*cell.key, index, variant) in self._done

    def check_prompt(self, cell: Cell, index: int, case: Case) -> None:
        """Refuse a case that is not the one whose answers are here.

        Raises:
            UserError: it is another one, by its name.
        """
        name = (*cell.key, index)
        if self._kept.get(name, case.digest) != case.digest:
            task, length, depth = cell.key
            where = "" if depth is None else f" and depth {depth:g}"
            raise UserError(
                f"--output {self.folder} holds answers to other prompts: {task} at length {length}{where}, prompt "
                f"{index}, is not what was asked. The chat template may have changed, or have put another date into "
                "it; give another folder or remove that one"
            )

    def keep_prompt(self, cell: Cell, index: int, case: Case) -> None:
        """Keep what was asked, once for all variants.

        Raises:
            UserError: something else was asked under this name before.
        """
        self.check_prompt(cell, index, case)
        name = (*cell.key, index)
        if name not in self._kept:
            self._kept[name] = case.digest
            asked = {**_fields(cell, index), "prompt": case.prompt, "digest": case.digest}
            append_lines(self.folder / PROMPTS, [asked])

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
