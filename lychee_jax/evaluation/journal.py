"""The folder of an evaluation: results line by line as they come, so that an interrupted run goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lychee_jax.errors import UserError
from lychee_jax.evaluation.cases import Case, Cell
from lychee_jax.files import decode_text, json_text, parse_json, parse_json_lines, read_json_object

SETTINGS, ANSWERS, PROMPTS = "settings.json", "answers.jsonl", "prompts.jsonl"

type Record = dict[str, Any]


class Journal:
    """`settings.json`, `answers.jsonl` (a line for each prompt and variant) and `prompts.jsonl` in one folder.

    Other files in the folder are left alone. What a case is called: task, length, depth, index.
    """

    def __init__(self, folder: Path, settings: Record) -> None:
        """Open a folder, or make it.

        Raises:
            UserError: a file is in the variant, or the folder holds a run with other settings.
        """
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output {folder} is a file; give a folder")
        _claim(folder, parse_json(json_text(settings), "the settings"))
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


def _claim(folder: Path, settings: Record) -> None:
    file = folder / SETTINGS
    if file.exists():
        try:
            found = read_json_object(file)
        except UserError as error:
            raise UserError(f"{error}; remove the folder or give another --output") from error
        other = [name for name in {**found, **settings} if found.get(name) != settings.get(name)]
        if other:
            changes = ", ".join(f"{name} was {found.get(name)!r}, now {settings.get(name)!r}" for name in other)
            raise UserError(f"--output {folder} holds a run with other settings ({changes}); give another folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json_text(settings, indent=1) + "\n", encoding="utf-8")


def read_lines(file: Path) -> list[Record]:
    """The objects of a file; a last line that an interrupt cut off is removed from it."""
    if not file.exists():
        return []
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with file.open("r+b") as handle:
            handle.truncate(len(whole))
    try:
        return parse_json_lines(decode_text(whole, file), file)
    except UserError as error:
        raise UserError(f"{error}; remove that line or give another --output") from error


def append_lines(file: Path, records: list[Record]) -> None:
    """Write the objects at the end of a file, one a line."""
    with file.open("a", encoding="utf-8") as handle:
        handle.write("".join(json_text(record) + "\n" for record in records))
