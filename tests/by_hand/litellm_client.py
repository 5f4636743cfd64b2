"""litellm as a client of a server that runs: `python tests/by_hand/litellm_client.py http://127.0.0.1:8000`.

litellm brings too much for the test suite; it is run in an environment of its own (`pip install litellm`).
"""

import asyncio
import importlib.metadata
import json
import sys
from typing import Any

import litellm  # pyright: ignore[reportMissingImports]

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}},
    "required": ["colour"],
    "additionalProperties": False,
}


def main(url: str) -> None:
    """Ask in every way, and compare."""
    server: Any = {"api_base": f"{url}/v1", "api_key": "none"}
    chat: Any = server | {
        "model": "openai/lychee",
        "messages": [{"role": "user", "content": "Tell me about the sea."}],
        "temperature": 0,
        "max_tokens": 32,
    }
    whole = litellm.completion(**chat)
    text = whole.choices[0].message.content
    assert text
    assert whole.usage.completion_tokens <= 32
    assert whole.choices[0].finish_reason in ("stop", "length")
    print("chat:", repr(text))

    pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**chat, stream=True)]
    assert "".join(pieces) == text
    print("stream:", len(pieces), "pieces")

    async def several() -> list[str]:
        answers = await asyncio.gather(*(litellm.acompletion(**chat) for _ in range(4)))
        return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(several()) == [text] * 4
    print("asynchronous: four equal answers")

    plain: Any = server | {"model": "text-completion-openai/lychee", "prompt": "The sea", "temperature": 0}
    completion = litellm.text_completion(**plain, max_tokens=16)
    streamed = litellm.text_completion(**plain, max_tokens=16, stream=True)
    assert "".join(chunk.choices[0].text or "" for chunk in streamed) == completion.choices[0].text
    print("completion:", repr(completion.choices[0].text))

    asked = chat | {"temperature": 1, "seed": 1}
    shape = {"type": "json_schema", "json_schema": {"name": "fox", "schema": SCHEMA, "strict": True}}
    said = litellm.completion(**asked, response_format=shape).choices[0].message.content
    assert json.loads(said)["colour"] in ("red", "blue")
    print("schema:", said)

    scored = litellm.completion(**chat, logprobs=True, top_logprobs=3).choices[0].logprobs
    assert len(scored.content[0].top_logprobs) == 3
    print("log-probabilities:", scored.content[0].logprob)

    try:
        litellm.completion(**chat | {"max_tokens": 10**9})
    except litellm.BadRequestError as error:
        print("refused:", str(error)[:120])
    else:
        raise AssertionError("an impossible request was taken")
    print(f"litellm {importlib.metadata.version('litellm')}: all as it should be")


if __name__ == "__main__":
    main(sys.argv[1])
