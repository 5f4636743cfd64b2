"""Programs are compiled before they are needed, and who needs others waits alone."""

import asyncio
import concurrent.futures
from typing import Any

import httpx
import pytest

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.benchmarks.shapes import MODELS
from lychee_jax.engine.compile_timer import Programs, count_programs
from lychee_jax.engine.engine import Engine
from lychee_jax.engine.options import AttentionOptions, EngineConfig, EngineOptions
from lychee_jax.engine.request import Request
from lychee_jax.models.spec import ModelSpec
from lychee_jax.server.model import ServedModel
from lychee_jax.server.settings import ServerConfig
from lychee_jax.server.warmup import Readiness, rehearsals
from tests.support import servers
from tests.support.servers import Running

PLAIN: dict[str, Any] = {"prompt": "The red fox", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
KINDS: list[dict[str, Any]] = [
    PLAIN,
    PLAIN | {"response_format": {"type": "regex", "regex": "[a-z]{9}"}},
    PLAIN | {"echo": True, "logprobs": 2},
    PLAIN | {"n": 3, "logprobs": 5, "temperature": 1},
    PLAIN | {"prompt": "A quiet lake, " * 30},
]


def test_nothing_is_compiled_for_a_request_that_was_taken(server: Running):
    attention = servers.DEFAULTS.attention_options
    readiness = Readiness(server.service.model.engine, attention)  # other modules' programs are forgotten
    for part in ("plain", "guided", "scored"):
        for program in readiness.begin(attention, part).result(60):
            program.result(60)
    before = count_programs()

    async def main() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for body in KINDS))

    assert [answer.status_code for answer in asyncio.run(main())] == [200] * len(KINDS)
    assert count_programs() == before


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("model", ["llama-3-8b", "bundled"])
def test_a_server_compiles_at_most_24_programs_before_it_is_healthy(
    platform: str, model: str, monkeypatch: pytest.MonkeyPatch
):
    asked = dict[Any, concurrent.futures.Future[Any]]()

    def prepare(self: Programs, function: Any, key: Any, static: Any, *args: Any) -> concurrent.futures.Future[Any]:
        return asked.setdefault((function, key, static), concurrent.futures.Future())

    monkeypatch.setattr(Programs, "prepare", prepare)
    config = MODELS[model]
    spec, shapes = ModelSpec.abstract(config, config.dtype)
    engine = Engine(spec, shapes, EngineOptions(cache_memory=40 << 30), EngineConfig.of(platform, config))
    heads = HeadMap.none(config)
    for requests in rehearsals(engine, AttentionOptions("auto", heads)):
        engine.prepare(requests)
    assert 12 < len(asked) <= 24


class Held(Readiness):
    """Hybrid attention is compiled when somebody says so."""

    failed = compiled = False

    def is_ready(self, request: Request) -> bool:
        if self.failed:
            raise RuntimeError("/some/where: no compiler")
        return self.compiled or request.attention.mode != "hybrid"  # type: ignore[union-attr]


def test_a_request_whose_programs_are_compiled_waits_alone(server: Running):
    llm = server.llm
    model = servers.served(llm)
    held = Held(model.engine, servers.DEFAULTS.attention_options)

    async def main(url: str, waiting: Any) -> None:
        rare = PLAIN | {"lychee": {"attention": "hybrid"}}
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            first, given_up = (asyncio.ensure_future(client.post("/v1/completions", json=rare)) for _ in range(2))
            await asyncio.to_thread(waiting, 2)
            plain = await client.post("/v1/completions", json=PLAIN)
            given_up.cancel()
            await asyncio.to_thread(waiting, 1)
            assert not first.done()
            held.compiled = True
            assert (await first).json()["choices"] == plain.json()["choices"]
            held.failed = True
            refused = await client.post("/v1/completions", json=PLAIN)
            assert refused.status_code == 500
            assert "/some" not in refused.text

    def load() -> ServedModel:
        return ServedModel(model.engine, model.tokenizer, model.defaults, held)

    with servers.running(llm, ServerConfig(), load=load) as other:
        stats = other.service.worker
        asyncio.run(main(other.url, lambda count: other.wait_until(lambda: stats.stats.waiting == count)))
        other.wait_until(other.is_idle)
