"""Text and JSON in files: UTF-8 with or without a byte order mark, lines that end at line feeds alone, never a NaN."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lychee_jax.errors import UserError


def check_tensor_path(path: str | Path) -> None:
    """Raise UserError for a path that TensorStore, with which Orbax reads and writes arrays, takes for another one."""
    name = os.path.abspath(path)
    if os.sep == "/" and "\\" in name:
        raise UserError(f"{name} has a backslash in it, which the library that stores arrays takes for a slash")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        shown = name.encode(errors="backslashreplace").decode()
        raise UserError(f"{shown} is not UTF-8, and no arrays can be stored there") from error


def decode_text(data: bytes, name: object) -> str:
    """The text of a file's bytes: a byte order mark in front is dropped, no newline is translated.

    Raises:
        UserError: no UTF-8; `name` says of what.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def read_bytes(path: str | Path) -> bytes:
    """What a file holds.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def read_text(path: str | Path) -> str:
    """The text of a file, as `decode_text` reads it.

    Raises:
        UserError: it cannot be read, or is no UTF-8.
    """
    return decode_text(read_bytes(path), path)


def write_text(path: str | Path, text: str) -> None:
    """Write a text as UTF-8; bytes of a file's name that are no UTF-8 are written as escapes.

    Raises:
        OSError: the file cannot be written.
    """
    Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")


def digest_of(text: str) -> str:
    """What tells a text apart from others: the first 64 bits of its SHA-256, in hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def parse_json(text: str, name: object) -> Any:
    """The value that a JSON text holds.

    Raises:
        UserError: no JSON, nested too deeply, or a string with half of a surrogate pair, which no file can hold as
            UTF-8; `name` says of what.
    """
    try:
        value = json.loads(text.removeprefix("\ufeff"))
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} is not valid JSON: a string in it has half of a surrogate pair") from error
    except RecursionError as error:
        raise UserError(f"{name} is not valid JSON: it is nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{name} is not valid JSON: {error}") from error
    return value


def read_json(path: str | Path) -> Any:
    """The value that a JSON file holds.

    Raises:
        UserError: the file cannot be read, or is no JSON.
    """
    return parse_json(read_text(path), path)


def read_json_object(path: str | Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object")
    return content


def parse_json_lines(text: str, name: object) -> list[Any]:
    """The values of a JSON Lines text; blank lines are skipped.

    Only a line feed ends a line: strings may hold U+2028, U+2029 and U+0085 as they are.

    Raises:
        UserError: a line that is no JSON, by its number.
    """
    lines = text.removeprefix("\ufeff").split("\n")
    return [parse_json(line, f"{name}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def json_text(value: Any, *, indent: int | None = None, sort_keys: bool = False) -> str:
    """A value as JSON; characters beyond ASCII are written as they are.

    Raises:
        UserError: a number that is not finite, which JSON does not have, by its place; or a value nested too deeply.
    """
    try:
        text = json.dumps(value, indent=indent, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair can only be written as an escape
        return json.dumps(value, indent=indent, sort_keys=sort_keys, allow_nan=False)
    except RecursionError as error:
        raise UserError("a value is nested too deeply to be written as JSON") from error
    except ValueError:
        for place, number in _not_finite(value, ""):
            raise UserError(f"{place or 'a result'} is {number}; only finite numbers can be written as JSON") from None
        raise
    return text


def _not_finite(value: Any, place: str) -> Iterator[tuple[str, float]]:
    """Where a value holds numbers that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield place, value
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from _not_finite(each, f"{place}.{name}" if place else str(name))
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _not_finite(each, f"{place}[{index}]")
