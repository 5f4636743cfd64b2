"""Answers that a grammar guides, alone and beside others; tools that must be called."""

import asyncio
import json
import re
from typing import Any

import openai
import pytest

from tests.support.servers import Running

HELLO: Any = [{"role": "user", "content": "The red fox sleeps."}]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "wild": {"type": "boolean"}},
    "required": ["colour", "wild"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "fox", "schema": SCHEMA, "strict": True}}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def test_a_json_schema(client: openai.OpenAI):
    options: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 200, "seed": 1, "response_format": FORMAT}
    answer = client.chat.completions.create(**options).choices[0]
    said = json.loads(answer.message.content or "")
    assert said["colour"] in ("red", "blue")
    assert isinstance(said["wild"], bool)
    assert answer.finish_reason == "stop"
    stream = client.chat.completions.create(**options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == answer.message.content


def test_a_regex_beside_plain_rows(server: Running):
    """Rows of one batch: some are guided, the others say what they say alone."""
    plain = {"prompt": "The red fox", "max_tokens": 40, "temperature": 0}
    guided = plain | {"response_format": {"type": "regex", "regex": "[0-9]{3}-[a-f]{2}"}, "temperature": 1, "n": 2}

    async def both() -> list[list[str]]:
        answers = await asyncio.gather(*(asyncio.to_thread(server.post, "/v1/completions", b) for b in (plain, guided)))
        return [[choice["text"] for choice in answer.json()["choices"]] for answer in answers]

    alone = server.post("/v1/completions", plain).json()["choices"][0]["text"]
    unguided, numbers = asyncio.run(both())
    assert unguided == [alone]
    assert all(re.fullmatch("[0-9]{3}-[a-f]{2}", number) for number in numbers)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_tool_that_must_be_called(client: openai.OpenAI, choice: Any):
    options: Any = {
        "model": "tiny", "messages": HELLO, "max_tokens": 250, "seed": 2, "tools": [WEATHER], "tool_choice": choice,
    }  # fmt: skip
    answer = client.chat.completions.create(**options).choices[0]
    assert answer.finish_reason == "tool_calls"
    (call,) = answer.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**options, stream=True)]
    (streamed,) = [one for chunk in chunks for one in chunk.delta.tool_calls or []]
    assert streamed.function is not None
    assert streamed.function.arguments == call.function.arguments
    assert chunks[-1].finish_reason == "tool_calls"
    assert "".join(chunk.delta.content or "" for chunk in chunks) == ""


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "regex", "regex": "(a"},
        {"type": "regex"},
        {"type": "json_schema", "json_schema": {}},
        {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}},
        {"type": "poem"},
    ],
)
def test_what_cannot_be_compiled(server: Running, response_format: Any):
    answer = server.post("/v1/chat/completions", {"messages": HELLO, "response_format": response_format})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_schemas_too_deep_to_be_read(server: Running):
    schema: Any = {"type": "string"}
    for _ in range(300):
        schema = {"type": "array", "items": schema}
    body = {"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    assert server.post("/v1/chat/completions", body).status_code == 400
