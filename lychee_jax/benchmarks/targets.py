"""The targets that results files list, and which of them are not met."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeGuard

from lychee_jax.errors import UserError
from lychee_jax.files import read_json_object

Sense = Literal["<=", ">="]


@dataclasses.dataclass(frozen=True)
class Target:
    """What was to be reached, and what was; `value` is None where nothing could be measured."""

    what: str
    value: float | None
    target: float
    sense: Sense

    @property
    def met(self) -> bool:
        """Whether the value is on the right side of the target, or on it."""
        if self.value is None:
            return False
        return self.value <= self.target if self.sense == "<=" else self.value >= self.target

    def __str__(self) -> str:
        value = "not measured" if self.value is None else f"{self.value:g}"
        return f"{self.what}: {value}, target {self.sense} {self.target:g}"


def read_targets(path: str | Path) -> list[Target]:
    """The targets of a results file, in its order; none if it lists none.

    Raises:
        UserError: the file cannot be read, or has targets of another form.
    """
    listed = read_json_object(path).get("targets", [])
    if not isinstance(listed, list):
        raise UserError(f"{path}: targets must be a list")
    return [_target(raw, f"{path}: target {number}") for number, raw in enumerate(listed, 1)]


def table(paths: Sequence[str | Path]) -> str:
    """As text: how many targets each file meets, and the others one by one.

    Raises:
        UserError: as `read_targets` does.
    """
    lines = []
    for path in paths:
        targets = read_targets(path)
        missed = [target for target in targets if not target.met]
        counts = f"{len(targets) - len(missed)} of {len(targets)} targets are met" if targets else "lists no targets"
        lines.append(f"{path}: {counts}")
        lines += [f"  {target}" for target in missed]
    return "\n".join(lines)


def _target(raw: Any, name: str) -> Target:
    if not isinstance(raw, dict) or not isinstance(what := raw.get("what"), str):
        raise UserError(f"{name} must be an object with what, value, target and sense")
    value, target, sense = raw.get("value"), raw.get("target"), raw.get("sense")
    if not _is_number(target) or not (value is None or _is_number(value)):
        raise UserError(f"{name} has value {value!r} and target {target!r}; give numbers, or the value null")
    if sense not in ("<=", ">="):
        raise UserError(f"{name} has sense {sense!r}; give <= or >=")
    return Target(what, None if value is None else float(value), float(target), sense)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
