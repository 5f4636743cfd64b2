"""Completions and chats over HTTP, by the clients that people use."""

import asyncio
import itertools
from typing import Any

import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI

from tests.support.servers import Running

HELLO: Any = [{"role": "user", "content": "The red fox sleeps."}]


def test_greedy_completions_are_those_of_generate(server: Running, client: openai.OpenAI):
    prompts = ["The red fox", "Once", "In the old house " * 12]
    got = client.completions.create(model="tiny", prompt=prompts, max_tokens=20, temperature=0, logprobs=0)
    own = server.reference(prompts, max_new_tokens=20)
    assert [choice.text for choice in got.choices] == own.text
    assert got.usage is not None
    assert got.usage.prompt_tokens == sum(own.prompt_tokens)
    assert got.usage.completion_tokens == sum(map(len, own.tokens))
    for choice, logprobs in zip(got.choices, own.logprobs, strict=True):
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs == pytest.approx(logprobs, abs=1e-5)


def test_the_token_that_ends_a_text_is_not_in_it(server: Running):
    """Whether or not the tokenizer calls it special."""
    told = server.reference(["The red fox"], max_new_tokens=8, ignore_eos=True).tokens[0]
    count = next(n for n, token in enumerate(told) if n and token not in told[:n])
    body = {"prompt": "The red fox", "max_tokens": 8, "temperature": 0, "stop_token_ids": [told[count]]}
    (choice,) = server.post("/v1/completions", {**body, "ignore_eos": True}).json()["choices"]
    shown = server.reference(["The red fox"], max_new_tokens=count, ignore_eos=True).text
    assert ([choice["text"]], choice["finish_reason"]) == (shown, "stop")


def test_a_stream_carries_the_same_text(client: openai.OpenAI):
    options: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 30, "seed": 5, "n": 2, "logprobs": True}
    whole = client.chat.completions.create(**options, top_logprobs=2)
    texts, tokens = ["", ""], [0, 0]
    reasons: list[str | None] = [None, None]
    stream = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    usage = None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += len(choice.logprobs.content or ()) if choice.logprobs else 0
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage is not None
    assert usage == whole.usage
    assert usage.completion_tokens == sum(tokens)
    content = whole.choices[0].logprobs.content
    assert [len(entry.top_logprobs) for entry in content] == [2] * len(content)
    said = b"".join(bytes(entry.bytes) for entry in content if entry.token != "<|eos|>")
    assert said.decode("utf-8", "replace") == texts[0]


def test_a_given_seed_repeats_and_an_absent_one_does_not(client: openai.OpenAI):
    def ask(**options: Any) -> str:
        return client.completions.create(model="tiny", prompt="The red", max_tokens=24, **options).choices[0].text

    assert ask(seed=7) == ask(seed=7)
    assert ask() != ask()


def test_stop_texts_and_stop_ids_end_an_answer(server: Running, client: openai.OpenAI):
    options: Any = {"model": "tiny", "prompt": "The red fox", "max_tokens": 20, "temperature": 0}
    whole = client.completions.create(**options, logprobs=0)
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    stop = (logprobs.tokens or [])[6]
    stopped = client.completions.create(**options, stop=[stop, "never"]).choices[0]
    assert stopped.text == whole.choices[0].text.split(stop)[0]
    assert stopped.finish_reason == "stop"
    tokens = server.reference(["The red fox"], max_new_tokens=20).tokens[0]
    ended = client.completions.create(**options, extra_body={"stop_token_ids": [tokens[5]]})
    assert ended.choices[0].finish_reason == "stop"
    assert ended.usage is not None
    assert ended.usage.completion_tokens == tokens.index(tokens[5]) + 1
    server.wait_until(server.is_idle)


def test_penalties_and_biases_change_what_is_said(server: Running):
    def ask(**options: Any) -> str:
        body = {"prompt": "The red fox", "max_tokens": 24, "temperature": 0, "ignore_eos": True} | options
        return server.post("/v1/completions", body).json()["choices"][0]["text"]

    token = server.post("/tokenize", {"prompt": " red", "add_special_tokens": False}).json()["tokens"][0]
    assert ask(logit_bias={str(token): 100}) == " red" * 24
    assert ask(logit_bias={str(token): 100}, max_tokens=24, presence_penalty=2, frequency_penalty=2) == " red" * 24
    assert ask(presence_penalty=2, frequency_penalty=2) != ask() or len(set(ask().split())) == 24


def test_echo_says_the_prompt_again(client: openai.OpenAI):
    said = client.completions.create(model="tiny", prompt="The red fox", max_tokens=0, echo=True)
    assert said.choices[0].text == "The red fox"
    more = client.completions.create(model="tiny", prompt="The red fox", max_tokens=4, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in more).startswith("The red fox")


def test_log_probabilities_of_a_prompt_are_those_of_the_same_text_as_an_answer(server: Running):
    body = {"prompt": "The red fox", "max_tokens": 12, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    said = server.post("/v1/completions", body).json()["choices"][0]
    asked = server.post("/tokenize", {"prompt": "The red fox"}).json()["tokens"]
    tokens = server.reference(["The red fox"], max_new_tokens=12, ignore_eos=True).tokens[0]
    whole = body | {"prompt": [asked + tokens], "max_tokens": 0, "echo": True}
    echoed = server.post("/v1/completions", whole).json()["choices"][0]
    answer, prompt = said["logprobs"], echoed["logprobs"]
    assert prompt["token_logprobs"][0] is prompt["top_logprobs"][0] is None
    assert len(prompt["tokens"]) == len(asked) + 12
    assert prompt["tokens"][-12:] == answer["tokens"]
    assert prompt["token_logprobs"][-12:] == pytest.approx(answer["token_logprobs"], abs=1e-4)
    assert all(len(likeliest) == 1 for likeliest in prompt["top_logprobs"][1:])
    assert echoed["finish_reason"] == "length"
    assert echoed["text"] == "The red fox" + said["text"]


def test_usage_tells_cached_tokens_and_what_was_read(server: Running):
    body = {"prompt": "A quiet lake, " * 30, "max_tokens": 4, "lychee": {"attention": "dense"}}
    server.post("/v1/completions", body)
    usage = server.post("/v1/completions", body).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 64
    assert usage["lychee"] == {"attention": "dense", "kv_read_share": 1.0}


def test_a_chat_without_a_limit_gets_what_is_left(client: openai.OpenAI):
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens == 512
    assert answer.choices[0].finish_reason == "length"


def test_langchain(server: Running):
    with httpx.Client() as http:
        options: Any = {"base_url": f"{server.url}/v1", "api_key": "none", "max_tokens": 8, "http_client": http}
        chat = ChatOpenAI(model="tiny", temperature=0, **options)
        whole = chat.invoke("The red fox sleeps.")
        assert whole.content == "".join(str(piece.content) for piece in chat.stream("The red fox sleeps."))
        assert whole.usage_metadata is not None
        assert whole.usage_metadata["output_tokens"] == 8


def test_the_asynchronous_client(server: Running):
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            asked = [
                client.completions.create(model="tiny", prompt=f"Number {n}", max_tokens=12, temperature=0)
                for n in range(8)
            ]
            texts = [answer.choices[0].text for answer in await asyncio.gather(*asked)]
            stream = await client.completions.create(
                model="tiny", prompt="Number 3", max_tokens=12, temperature=0, stream=True
            )
            assert "".join([chunk.choices[0].text async for chunk in stream]) == texts[3]

    asyncio.run(main())


def test_tokens_there_and_back(server: Running):
    tokens = server.post("/tokenize", {"prompt": "The red fox"}).json()
    assert tokens["count"] == len(tokens["tokens"])
    assert tokens["max_model_len"] == 512
    assert server.post("/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": "The red fox"}
    chat = server.post("/tokenize", {"messages": HELLO}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": chat}).json()["prompt"].startswith("user: The red fox")


def test_models_health_and_metrics(server: Running, client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "lychee-jax"
    assert httpx.get(server.url + "/health").status_code == 200
    before = _numbers(server)
    client.completions.create(model="tiny", prompt="The red fox", max_tokens=6, temperature=0)
    server.wait_until(server.is_idle)
    after = _numbers(server)
    assert after["lychee_generation_tokens_total"] - before["lychee_generation_tokens_total"] == 6
    assert after["lychee_request_seconds_count"] - before["lychee_request_seconds_count"] == 1
    assert after["lychee_page_bytes"] > 0
    assert after["lychee_pages_owned"] == after["lychee_sequences_running"] == 0


def _numbers(server: Running) -> dict[str, float]:
    lines = server.metrics().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


BAD = [
    ("/v1/completions", {"prompt": "x", "model": "other"}, 404, "model"),
    ("/v1/completions", {"prompt": []}, 400, "prompt"),
    ("/v1/completions", {"prompt": ""} | {"prompt": [[]]}, 400, None),
    ("/v1/completions", {"prompt": [[5000]]}, 400, None),
    ("/v1/completions", {"prompt": ["x"] * 65}, 400, "prompt"),
    ("/v1/completions", {"prompt": "x", "n": 17}, 400, "n"),
    ("/v1/completions", {"prompt": "x", "stop": ["a"] * 17}, 400, "stop"),
    ("/v1/completions", {"prompt": "x", "stop": ""}, 400, None),
    ("/v1/completions", {"prompt": "x", "max_tokens": 600}, 400, None),
    ("/v1/completions", {"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": "x", "temperature": -1}, 400, None),
    ("/v1/completions", {"prompt": "x", "temperature": "hot"}, 400, "temperature"),
    ("/v1/completions", {"prompt": "x", "presence_penalty": 3}, 400, "presence_penalty"),
    ("/v1/completions", {"prompt": "x", "logit_bias": {"a": 1}}, 400, "logit_bias"),
    ("/v1/completions", {"prompt": "x", "logit_bias": {"5000": 1}}, 400, None),
    ("/v1/completions", {"prompt": "x", "best_of": 2}, 400, "best_of"),
    ("/v1/completions", {"prompt": "x", "suffix": "y"}, 400, "suffix"),
    ("/v1/completions", {"prompt": "x", "stream_options": {}}, 400, "stream_options"),
    ("/v1/chat/completions", {"messages": []}, 400, None),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 400, None),
    ("/v1/chat/completions", {"messages": HELLO, "functions": []}, 400, "functions"),
    ("/v1/chat/completions", {"messages": HELLO, "top_logprobs": 3}, 400, "top_logprobs"),
    ("/v1/chat/completions", {"messages": HELLO, "chat_template_kwargs": {"tools": []}}, 400, None),
    ("/v1/chat/completions", {"messages": HELLO, "tools": [{"type": "function"}]}, 400, None),
    ("/v1/chat/completions", {"messages": HELLO, "lychee": {"attention": "some"}}, 400, "lychee"),
    ("/detokenize", {"tokens": [1024]}, 400, None),
    ("/tokenize", {}, 400, "prompt"),
    ("/v1/embeddings", {}, 404, None),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), BAD)
def test_what_cannot_be_is_refused_in_the_protocols_words(server: Running, path, body, status, param):
    answer = server.post(path, body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert error["param"] == param
    assert "/home" not in answer.text
    assert "Traceback" not in answer.text


def test_unknown_fields_are_ignored(server: Running):
    body = {"prompt": "x", "max_tokens": 1, "user": "me", "store": True, "service_tier": "auto", "n": None}
    assert server.post("/v1/completions", body).status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"{", b"\xff\xfe", b'{"prompt": "x", "seed": 1' + b"0" * 5000 + b"}", b"[" * 9000, b'{"prompt": "\\ud800"}'],
)
def test_broken_json(server: Running, body):
    answer = httpx.post(server.url + "/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_body_that_is_too_large(server: Running):
    answer = server.post("/v1/completions", {"prompt": "x" * (1 << 16)})
    assert answer.status_code == 413
    assert answer.json()["error"]["message"]


def test_a_full_queue(server: Running):
    """44 sequences are the most; more in one call can never be, more in all may come again."""
    assert server.post("/v1/completions", {"prompt": ["x"] * 3, "n": 15}).status_code == 400

    async def main() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            calls = [
                client.post("/v1/completions", json={"prompt": "x", "n": 11, "max_tokens": 60, "ignore_eos": True})
                for _ in range(6)
            ]
            return await asyncio.gather(*calls)

    answers = asyncio.run(main())
    assert sorted(answer.status_code for answer in answers) == [200] * 4 + [429] * 2
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "queue_full"
    server.wait_until(server.is_idle)


def test_rows_of_one_call_differ_and_all_have_an_index(client: openai.OpenAI):
    got = client.completions.create(model="tiny", prompt=["a red", "a blue"], n=3, max_tokens=8, seed=1)
    assert [choice.index for choice in got.choices] == list(range(6))
    texts = [choice.text for choice in got.choices]
    assert all(one != other for one, other in itertools.combinations(texts, 2))


def test_defaults_name_the_served_model(server: Running):
    answer = server.post("/v1/completions", {"prompt": "x"}).json()
    assert answer["model"] == "tiny"
    assert answer["usage"]["completion_tokens"] <= 16
