"""A folder that a run claims, resumes, and refuses if it holds another run.

A file in it says what decides the run's results; lines of results are appended as they come. An interrupt may cut off
the last line, which the next run removes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lychee_jax.errors import UserError

type Record = dict[str, Any]


def claim(folder: Path, settings: Mapping[str, Any], file: str = "plan.json") -> None:
    """Make a new folder this run's own, or check that the run in it has the same settings.

    Args:
        folder: made if it is missing; other files in it are left alone.
        settings: what decides the results; plain data. A setting that is absent equals None.
        file: where the folder keeps them.

    Raises:
        UserError: the folder is a file, or holds a run with other settings.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file; give a folder")
    record, wanted = folder / file, json.loads(json.dumps(settings))
    if not record.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(record, wanted)
        return
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{record} is no JSON; remove the folder or give another --output") from error
    if not isinstance(found, dict):
        raise UserError(f"{record} is no JSON object; remove the folder or give another --output")
    if other := [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]:
        changes = ", ".join(f"{name} was {found.get(name)!r}, now {wanted.get(name)!r}" for name in other)
        raise UserError(
            f"--output {folder} holds a run with other settings ({changes}); give another folder or remove that one"
        )


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write an object whole or not at all."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def read_json(file: Path) -> Record:
    """The object in a file, or an empty one if there is no such file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def append_lines(file: Path, records: Iterable[Record]) -> None:
    """Write objects at the end of a file, one a line."""
    with file.open("a", encoding="utf-8") as handle:
        handle.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_lines(file: Path) -> list[Record]:
    """The objects of a file, one a line; a last line that an interrupt cut off is removed from it."""
    if not file.exists():
        return []
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with file.open("r+b") as handle:
            handle.truncate(len(whole))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise UserError(f"{file} has a line that is no JSON; remove it or give another --output") from error


class MetricsFile:
    """One JSON object a step, appended; the lines of steps that a resumed run does again are dropped first."""

    def __init__(self, path: Path, done: int) -> None:
        kept: dict[int, str] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                step = int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):  # the run was killed while it wrote
                continue
            if step <= done:
                kept[step] = line
        path.write_text("".join(line + "\n" for line in kept.values()), encoding="utf-8")
        self._path = path

    def write(self, **values: Any) -> None:
        """Append a line; numbers are rounded to six digits."""
        rounded = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in values.items()}
        append_lines(self._path, [rounded])
