"""A folder that a run claims, resumes, and refuses if it holds another run.

A file in it says what decides the run's results: settings, and digests of all contents that are read. Lines of results
are appended as they come; an interrupt may cut off the last one, which the next run removes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lychee_jax.errors import UserError
from lychee_jax.files import (
    decode_text,
    json_text,
    parse_json,
    parse_json_lines,
    read_json_object,
    read_text,
    write_text,
)

_log = logging.getLogger(__name__)

type Record = dict[str, Any]

_INPUTS = "inputs"


def claim(
    folder: Path,
    settings: Mapping[str, Any],
    file: str = "plan.json",
    *,
    inputs: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Make a new folder this run's own, or check that the run in it has the same settings and reads the same.

    What a run reads counts by its content, not by its name or place: give digests.

    Args:
        folder: made if it is missing; other files in it are left alone.
        settings: what decides the results; plain data. A setting that is absent equals None.
        file: where the folder keeps them.
        inputs: digests of texts and data, by name. A run may come to read more, but nothing it has read may change.

    Raises:
        UserError: the folder is a file, or holds another run; what differs, by name.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file; give a folder")
    record, wanted = folder / file, parse_json(json_text(settings), "the settings")
    if not record.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(record, {**wanted, **({_INPUTS: dict(inputs)} if inputs else {})})
        return
    try:
        found = read_json_object(record)
    except UserError as error:
        raise UserError(f"{error}; remove the folder or give another --output") from error
    known: dict[str, Any] = found.pop(_INPUTS, None) or {}
    if other := [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]:
        changes = ", ".join(f"{name} was {found.get(name)!r}, now {wanted.get(name)!r}" for name in other)
        raise UserError(
            f"--output {folder} holds a run with other settings ({changes}); give another folder or remove that one"
        )
    if changed := [name for name, digest in inputs.items() if known.get(name, digest) != digest]:
        raise UserError(
            f"--output {folder} holds a run that has read other contents of {', '.join(changed)}; "
            "give another folder or remove that one"
        )
    if not inputs.keys() <= known.keys():
        write_json(record, {**found, _INPUTS: {**known, **inputs}})
    _log.info("%s holds this run: it is resumed", folder)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write an object whole or not at all."""
    part = file.with_suffix(".part")
    write_text(part, json_text(content, indent=1) + "\n")
    part.replace(file)


def read_json(file: Path) -> Record:
    """The object in a file, or an empty one if there is no such file."""
    return read_json_object(file) if file.exists() else {}


def append_lines(file: Path, records: Iterable[Record]) -> None:
    """Write objects at the end of a file, one a line."""
    with file.open("a", encoding="utf-8") as handle:
        handle.write("".join(json_text(record) + "\n" for record in records))


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
        return parse_json_lines(decode_text(whole, file), file)
    except UserError as error:
        raise UserError(f"{error}; remove that line or give another --output") from error


class MetricsFile:
    """One JSON object a step, appended; the lines of steps that a resumed run does again are dropped first."""

    def __init__(self, path: Path, done: int) -> None:
        kept: dict[int, str] = {}
        for line in read_text(path).split("\n") if path.exists() else ():
            try:
                step = int(parse_json(line, path)["step"])
            except (UserError, ValueError, KeyError, TypeError):  # the run was killed while it wrote
                continue
            if step <= done:
                kept[step] = line
        write_text(path, "".join(line + "\n" for line in kept.values()))
        self._path = path

    def write(self, **values: Any) -> None:
        """Append a line; numbers are rounded to six digits.

        Raises:
            UserError: one that is not finite, by its name.
        """
        rounded = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in values.items()}
        append_lines(self._path, [rounded])
