"""Calls of tools: what clients offer and choose, and calls in a model's text, found as it comes.

Two ways of writing a call are known, by the model's chat template: that of Hermes and Qwen, `<tool_call>` around a JSON
object, and that of Llama 3, an answer that is nothing but JSON objects.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lychee_jax.errors import UserError
from lychee_jax.files import json_text, parse_json
from lychee_jax.server.grammar import Grammars

Style = Literal["hermes", "llama"]

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_MAX_TOOLS = 128


@dataclasses.dataclass(frozen=True)
class Tools:
    """The tools of a request.

    Attributes:
        offered: as the client wrote them; what the template gets.
        style: how this model writes calls.
        forced: names of which one must be called; empty: the model is free.
    """

    offered: Sequence[dict[str, Any]]
    style: Style
    forced: tuple[str, ...] = ()

    @property
    def schemas(self) -> dict[str, Mapping[str, Any]]:
        """What arguments each tool takes, by its name."""
        functions = [tool["function"] for tool in self.offered]
        return {each["name"]: each.get("parameters") or {"type": "object"} for each in functions}

    def grammar(self, grammars: Grammars) -> str | None:
        """The grammar of an answer that calls one of the forced tools; None if the model is free.

        Raises:
            UserError: parameters that cannot be compiled.
        """
        if not self.forced:
            return None
        key = "arguments" if self.style == "hermes" else "parameters"
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": name}, key: self.schemas[name]},
                "required": ["name", key],
                "additionalProperties": False,
            }
            for name in self.forced
        ]
        before, after = (f"{_OPEN}\n", f"\n{_CLOSE}") if self.style == "hermes" else ("", "")
        return grammars.between(before, calls[0] if len(calls) == 1 else {"anyOf": calls}, after)

    def parser(self) -> CallParser:
        """Finds calls in one answer."""
        kind = _HermesParser if self.style == "hermes" else _LlamaParser
        return kind(frozenset(self.schemas))


def read_tools(
    offered: Sequence[dict[str, Any]] | None, choice: str | Mapping[str, Any] | None, template: str
) -> Tools | None:
    """The tools that a model is to see; None if there are none, or it may not call any.

    Raises:
        UserError: tools or a choice that are none, or a chat template that has no place for them.
    """
    if not offered:
        if choice not in (None, "none", "auto"):
            raise UserError("tool_choice needs tools")
        return None
    names = [_tool_name(tool, number) for number, tool in enumerate(offered)]
    if len(names) > _MAX_TOOLS or len(set(names)) < len(names):
        raise UserError(f"tools must be at most {_MAX_TOOLS}, each with a name of its own")
    forced = _forced(choice, names)
    if choice == "none":
        return None
    if "tools" not in template:
        raise UserError("the model's chat template has no place for tools")
    return Tools(offered, "hermes" if _OPEN in template else "llama", forced)


def _tool_name(tool: dict[str, Any], number: int) -> str:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f'tool {number} must be {{"type": "function", "function": {{"name": …, "parameters": …}}}}')
    if not isinstance(function.get("parameters") or {}, dict):
        raise UserError(f"tool {number} has parameters that are no JSON schema")
    return function["name"]


def _forced(choice: str | Mapping[str, Any] | None, names: Sequence[str]) -> tuple[str, ...]:
    if choice in (None, "none", "auto"):
        return ()
    if choice == "required":
        return tuple(names)
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if name not in names:
        raise UserError(
            'tool_choice must be none, auto, required, or {"type": "function", "function": {"name": …}} of a tool'
        )
    return (str(name),)


@dataclasses.dataclass(frozen=True)
class Call:
    """A call that the model has written; `arguments` are JSON."""

    name: str
    arguments: str
    id: str = dataclasses.field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def to_json(self) -> dict[str, Any]:
        """As a message has it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class CallParser:
    """Takes an answer's text as it comes; gives back what of it is text, and the calls that are complete.

    What looks like a call and is none stays text: no JSON, or a tool that was not offered.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._held = ""

    def push(self, text: str) -> tuple[str, list[Call]]:
        """Take more text."""
        raise NotImplementedError

    def finish(self) -> tuple[str, list[Call]]:
        """The end of the text."""
        raise NotImplementedError

    def _call(self, value: Any) -> Call | None:
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        return Call(value["name"], json_text(arguments)) if isinstance(arguments, dict) else None


class _HermesParser(CallParser):
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, anywhere in the text."""

    _called = False

    def push(self, text: str) -> tuple[str, list[Call]]:
        self._held += text
        shown, calls = "", []
        while True:
            start = self._held.find(_OPEN)
            if start < 0:
                keep = _begun(self._held, _OPEN)
                shown += self._outside(self._held[: len(self._held) - keep])
                self._held = self._held[len(self._held) - keep :]
                return shown, calls
            end = self._held.find(_CLOSE, start)
            if end < 0:
                shown += self._outside(self._held[:start])
                self._held = self._held[start:]
                return shown, calls
            shown += self._outside(self._held[:start])
            inner = self._held[start + len(_OPEN) : end]
            call = self._call(_json_or_none(inner))
            if call is None:
                shown += _OPEN + inner + _CLOSE
            else:
                calls.append(call)
                self._called = True
            self._held = self._held[end + len(_CLOSE) :]

    def finish(self) -> tuple[str, list[Call]]:
        held, self._held = self._held, ""
        return self._outside(held), []

    def _outside(self, text: str) -> str:
        """Text that is no call; blanks after one are no text either."""
        return "" if self._called and not text.strip() else text


class _LlamaParser(CallParser):
    """`{"name": …, "parameters": {…}}`, several separated by semicolons, and nothing else."""

    _open = True

    def push(self, text: str) -> tuple[str, list[Call]]:
        self._held += text
        if self._open and self._held.lstrip()[:1] in ("", "{"):
            return "", []
        self._open = False
        shown, self._held = self._held, ""
        return shown, []

    def finish(self) -> tuple[str, list[Call]]:
        held, self._held = self._held, ""
        values = [_json_or_none(held)]
        if values == [None]:
            values = [_json_or_none(part) for part in held.split(";")]
        calls = [self._call(value) for value in values]
        found = [call for call in calls if call is not None]
        return ("", found) if len(found) == len(calls) else (held, [])


def _json_or_none(text: str) -> Any:
    try:
        return parse_json(text, "a call")
    except UserError:
        return None


def _begun(text: str, marker: str) -> int:
    """Length of the longest end of the text that begins the marker."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if marker.startswith(text[-n:])), 0)
