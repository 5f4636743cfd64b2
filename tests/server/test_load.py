"""A small load: requests of all kinds at once, some of which are given up; and requests that nobody would write."""

import asyncio
import collections
import json
import os
import random
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode as Mode
from schemathesis.core import NotSet

from lychee_jax.cli import main as cli
from tests.support.servers import Running

REQUESTS, AT_ONCE = 40, 12
CASES = int(os.environ.get("LYCHEE_SCHEMA_CASES", "300"))
"""Requests made from the document; with `-s` more of them tell how they were answered."""


def _body(rng: random.Random) -> dict[str, Any]:
    prompt = "The red fox sleeps. " * rng.randrange(1, 8) + str(rng.randrange(100))
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": rng.randrange(1, 40), "temperature": 0}
    if rng.random() < 0.4:
        body |= {"temperature": 0.8, "top_p": 0.9, "n": rng.randrange(1, 4), "seed": rng.randrange(100)}
    if rng.random() < 0.3:
        body |= {"logprobs": 3, "stop": ["."]}
    return body


async def _ask(client: httpx.AsyncClient, rng: random.Random) -> tuple[dict[str, Any], str] | None:
    """A request and its text; None for one that was given up."""
    body = _body(rng)
    patience = rng.random() * 0.3 if rng.random() < 0.3 else 120.0
    if rng.random() < 0.1:
        assert (await client.post("/v1/completions", content=b"{", headers=_JSON)).status_code == 400
    try:
        async with asyncio.timeout(patience):
            if rng.random() < 0.5:
                answer = await client.post("/v1/completions", json=body)
                assert answer.status_code == 200
                return body, answer.json()["choices"][0]["text"]
            text = ""
            async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        choice = json.loads(line[6:])["choices"][0]
                        text += choice["text"] if choice["index"] == 0 else ""
            return body, text
    except TimeoutError:
        return None


_JSON = {"content-type": "application/json"}


def test_mixed_requests_and_nothing_is_left(server: Running):
    rng = random.Random(0)

    async def main() -> list[tuple[dict[str, Any], str] | None]:
        gate = asyncio.Semaphore(AT_ONCE)
        async with httpx.AsyncClient(base_url=server.url, timeout=None) as client:

            async def one() -> tuple[dict[str, Any], str] | None:
                async with gate:
                    return await _ask(client, rng)

            return await asyncio.gather(*(one() for _ in range(REQUESTS)))

    answers = [answer for answer in asyncio.run(main()) if answer is not None]
    assert len(answers) > REQUESTS // 2
    for body, text in answers:
        again = server.post("/v1/completions", body | {"n": 1}).json()["choices"][0]["text"]
        assert again == text or (body["temperature"] and "seed" not in body)
    server.wait_until(server.is_idle)
    assert server.tasks() <= server.idle_tasks


@pytest.mark.slow
def test_nothing_that_the_document_allows_is_a_server_error(server: Running):
    """Requests made from the OpenAPI document, valid and not."""
    document = httpx.get(server.url + "/openapi.json").json()
    # Short answers, so that many are asked for.
    for name in ("CompletionRequest", "ChatRequest"):
        properties = document["components"]["schemas"][name]["properties"]
        properties["max_tokens"] = {"type": "integer", "minimum": 0, "maximum": 3}
        properties["n"] = {"type": "integer", "maximum": 2}
    schema = schemathesis.openapi.from_dict(document)
    valid, invalid = (schema.as_strategy(generation_mode=mode) for mode in (Mode.POSITIVE, Mode.NEGATIVE))
    statuses: list[int] = []
    with httpx.Client(base_url=server.url, timeout=60) as client:

        @given(valid | invalid)
        @settings(
            max_examples=CASES, deadline=None, phases=[Phase.generate], database=None, derandomize=True,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
        )  # fmt: skip
        def call(case: schemathesis.Case) -> None:
            content = b"" if isinstance(case.body, NotSet) else json.dumps(case.body, default=repr).encode()
            answer = client.request(case.method, case.formatted_path, content=content, headers=_JSON)
            statuses.append(answer.status_code)
            assert answer.status_code < 500, (case.path, content, answer.text)

        call()
    print(len(statuses), "requests:", dict(collections.Counter(statuses)))
    assert statuses.count(200) >= CASES // 20
    server.wait_until(server.is_idle)


def test_the_benchmark_of_a_server(server: Running, tmp_path: Path):
    target = tmp_path / "serve.json"
    arguments = ["--at-once", "1,3", "--requests", "1", "--new-tokens", "20", "--guided", "1", "--output", str(target)]
    assert cli.main(["bench", "serve", "--url", server.url, *arguments]) == 0
    alone, together = json.loads(target.read_text())["rows"]
    assert alone["beside_guided"] is None
    assert together["beside_guided"] > 0
    for row in (alone, together):
        assert len(row["samples_first_token_s"]) == row["requests"] == row["at_once"]
        assert row["tokens_per_s"] == row["requests"] * 20 / row["seconds"]
        assert 0 < row["overhead_share"] < 1
