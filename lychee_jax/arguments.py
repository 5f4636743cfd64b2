"""What callers pass, as they mean it: whole numbers, prompts, stop strings. Anything else is refused in one line."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterable, Mapping
from typing import Any, SupportsFloat

import numpy as np

from lychee_jax.errors import UserError

MAX_INT32 = 2**31 - 1


def whole_number(value: Any, name: str) -> int:
    """A whole number; 4.0 is one, True is none.

    Raises:
        UserError: anything else.
    """
    integral = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not integral and not (isinstance(value, float | np.floating) and float(value).is_integer()):
        raise UserError(f"{name} is {value!r}; it must be a whole number")
    return int(value)


def number(value: Any, name: str) -> float:
    """A real number; True and text are none.

    Raises:
        UserError: anything else.
    """
    real = isinstance(value, numbers.Real | np.floating) and not isinstance(value, bool)
    if not real or not isinstance(value, SupportsFloat):
        raise UserError(f"{name} is {value!r}; it must be a number")
    return float(value)


def check_int32(options: Any, *names: str) -> None:
    """Refuse fields that the device's 32-bit integers do not hold.

    Raises:
        UserError: the first of them, by name.
    """
    for name in names:
        if getattr(options, name) > MAX_INT32:
            raise UserError(f"{name} is {getattr(options, name)}; it must be at most {MAX_INT32}")


def settle_numbers(options: Any) -> None:
    """Make numbers of a frozen dataclass what its defaults are, `int`, `float` or `bool`; None is the default.

    Call it first in `__post_init__`: what follows may compare without a TypeError.

    Raises:
        UserError: a value that is no such number, by the field's name.
    """
    for field in dataclasses.fields(options):
        default, value = field.default, getattr(options, field.name)
        if not isinstance(default, int | float):
            continue
        if value is None:
            settled: int | float = default
        elif isinstance(default, bool):
            if not isinstance(value, bool | np.bool_):
                raise UserError(f"{field.name} is {value!r}; it must be True or False")
            settled = bool(value)
        elif isinstance(default, int):
            settled = whole_number(value, field.name)
        else:
            settled = number(value, field.name)
        object.__setattr__(options, field.name, settled)


def as_prompts(prompts: Any) -> list[str | list[int]]:
    """Prompts as a list with one entry for each: a text, or a row of token ids.

    One text is one prompt, and so is a flat row of ids; arrays count as the lists that they hold.

    Raises:
        UserError: no prompts, or something that is neither text nor whole numbers.
    """
    if isinstance(prompts, str):
        return [prompts]
    rows = _listed(prompts)
    if rows is None:
        raise UserError(f"the prompt is {shown(prompts)}; give a text, a list of texts, or lists of token ids")
    if not rows:
        raise UserError("there is no prompt; give at least one")
    if any(isinstance(row, Mapping) for row in rows):
        raise UserError("a conversation is given as messages, not as the prompt")
    if not any(isinstance(row, str) or _listed(row) is not None for row in rows):
        rows = [rows]
    return [row if isinstance(row, str) else _token_ids(row, index) for index, row in enumerate(rows)]


def as_stops(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    """Stop strings as a tuple: one text is one of them, None is none.

    Raises:
        UserError: something that is no text, or an empty text.
    """
    listed = [stop] if isinstance(stop, str) else [] if stop is None else _listed(stop)
    if listed is None or not all(isinstance(each, str) for each in listed):
        raise UserError(f"stop is {shown(stop)}; give a text or a list of texts")
    if "" in listed:
        raise UserError("a stop string must not be empty")
    return tuple(listed)


def _token_ids(row: Any, index: int) -> list[int]:
    tokens = _listed(row)
    if tokens is None:
        raise UserError(f"prompt {index} is {shown(row)}; give a text or a list of token ids")
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, numbers.Integral):
            raise UserError(f"prompt {index} has {shown(token)}; token ids are whole numbers")
    return [int(token) for token in tokens]


def _listed(value: Any) -> list[Any] | None:
    """The items of a sequence, an array or another iterable; None for anything that is not meant as a list."""
    if isinstance(value, str | bytes | bytearray | Mapping) or not isinstance(value, Iterable):
        return None
    if hasattr(value, "__array__"):  # numpy's, and JAX's, whose items would be arrays again
        value = np.asarray(value)
        return value.tolist() if value.ndim else None
    return list(value)


def shown(value: Any) -> str:
    """A value in an error's line, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
