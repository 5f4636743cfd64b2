"""Calls of tools in an answer's text, however it is cut."""

import json

import pytest

from lychee_jax.errors import UserError
from lychee_jax.server.messages import check_conversation
from lychee_jax.server.tools import Tools, read_tools

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


def parse(text: str, style: str, cut: int) -> tuple[str, list[tuple[str, dict]]]:
    parser = Tools([WEATHER, CLOCK], style).parser()  # pyright: ignore
    shown, calls = "", []
    for start in range(0, len(text), cut):
        piece, found = parser.push(text[start : start + cut])
        shown, calls = shown + piece, calls + found
    piece, found = parser.finish()
    return shown + piece, [(call.name, json.loads(call.arguments)) for call in calls + found]


ROME = ("weather", {"city": "Rome"})

CASES = [
    ("hermes", "no call < at all", ("no call < at all", [])),
    ("hermes", CALL, ("", [ROME])),
    ("hermes", f"Let me see.\n{CALL}\n{CALL}\n", ("Let me see.\n", [ROME, ROME])),
    ("hermes", "<tool_call>{broken</tool_call>", ("<tool_call>{broken</tool_call>", [])),
    ("hermes", '<tool_call>{"name": "other", "arguments": {}}</tool_call>', None),
    ("hermes", "<tool_call>{never", ("<tool_call>{never", [])),
    ("llama", '{"name": "weather", "parameters": {"city": "Rome"}}', ("", [ROME])),
    ("llama", '{"name": "clock", "parameters": {}}; {"name": "clock", "parameters": {}}', ("", [("clock", {})] * 2)),
    ("llama", '{"answer": 42}', ('{"answer": 42}', [])),
    ("llama", "It is {late}", ("It is {late}", [])),
]


@pytest.mark.parametrize("cut", [1, 7, 1000])
@pytest.mark.parametrize(("style", "text", "expected"), CASES)
def test_calls_are_found(style, text, expected, cut):
    assert parse(text, style, cut) == (expected or (text, []))


def test_tools_that_are_none():
    for tools, choice, template in (
        ([WEATHER, WEATHER], None, "tools"),
        ([{"type": "function"}], None, "tools"),
        ([WEATHER], "other", "tools"),
        ([WEATHER], {"type": "function", "function": {"name": "clock"}}, "tools"),
        ([WEATHER], "auto", "no place"),
        (None, "required", "tools"),
    ):
        with pytest.raises(UserError):
            read_tools(tools, choice, template)
    assert read_tools([WEATHER], "none", "tools") is None
    tools = read_tools([WEATHER, CLOCK], "required", "tools <tool_call>")
    assert tools is not None
    assert (tools.style, tools.forced) == ("hermes", ("weather", "clock"))


def test_calls_go_back_to_the_template_as_objects():
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    said = check_conversation([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert said[0]["content"] == ""
    assert said[0]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}
    for broken in ({}, {"function": {"name": "f", "arguments": "[1]"}}, {"function": {"name": "f", "arguments": "{"}}):
        with pytest.raises(UserError, match="message 0, tool call 0"):
            check_conversation([{"role": "assistant", "tool_calls": [broken]}])
