"""Messages as OpenAI's clients send them, made into what chat templates take."""

from __future__ import annotations

from typing import Any

from lychee_jax.errors import UserError
from lychee_jax.files import parse_json
from lychee_jax.text.chat import Message


def check_conversation(messages: list[dict[str, Any]]) -> list[Message]:
    """The messages, those of the assistant that only call tools with a content, and calls with arguments as objects.

    Raises:
        UserError: calls of tools that are none, by the message's number.
    """
    return [_message(message, number) for number, message in enumerate(messages)]


def _message(message: dict[str, Any], number: int) -> Message:
    calls = message.get("tool_calls")
    if calls is None:
        return {name: value for name, value in message.items() if value is not None}
    if not isinstance(calls, list):
        raise UserError(f"message {number} has tool_calls that are no list")
    content = message.get("content")
    return message | {
        "content": "" if content is None else content,
        "tool_calls": [_call(call, f"message {number}, tool call {place}") for place, call in enumerate(calls)],
    }


def _call(call: Any, name: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f'{name} must be {{"type": "function", "function": {{"name": …, "arguments": …}}}}')
    arguments = function.get("arguments", "{}")
    parsed = parse_json(arguments or "{}", f"{name}: arguments") if isinstance(arguments, str) else arguments
    if not isinstance(parsed, dict):
        raise UserError(f"{name}: arguments must hold a JSON object")
    return call | {"function": function | {"arguments": parsed}}
