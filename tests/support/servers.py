"""A server in a thread of this process, with a tiny model that speaks the bundled model's language."""

import asyncio
import contextlib
import dataclasses
import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai

from lychee_jax.data import language
from lychee_jax.engine.engine import Engine
from lychee_jax.engine.options import EngineConfig, EngineOptions, GenerateOptions
from lychee_jax.llm import LLM, Generation
from lychee_jax.loading import BUNDLED
from lychee_jax.server.model import ServedModel
from lychee_jax.server.process import Server, bind
from lychee_jax.server.service import Service
from lychee_jax.server.settings import ServerConfig
from lychee_jax.server.warmup import warm_up
from tests.support import tiny_models

ENGINE_CONFIG = EngineConfig(
    chunk_rungs=((1 << 40, 64),), chunk_unit=64, min_rows=2, block_steps=4, table_factor=64, correct_rows=1
)
ENGINE = EngineOptions(max_num_seqs=4, cache_memory=8 << 20)
DEFAULTS = GenerateOptions(page_size=16)
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }} <tool_call>{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def make_llm(folder: Path, **changes: Any) -> LLM:
    """The model; its tokenizer is the bundled one, with a chat template that knows tools."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    llm = tiny_models.make(dataclasses.replace(tiny_models.CONFIG, **changes), folder=folder)
    llm.engine_config = ENGINE_CONFIG
    assert llm.tokenizer is not None
    assert llm.eos_ids == (language.EOS,)
    return llm


@dataclasses.dataclass
class Running:
    """A server that answers."""

    server: Server
    llm: LLM
    idle_tasks: int = 0

    def tasks(self) -> int:
        """Tasks of the server's event loop, the one that counts them included."""

        async def count() -> int:
            return len(asyncio.all_tasks())

        loop = self.service.worker.ended.get_loop()
        return asyncio.run_coroutine_threadsafe(count(), loop).result(60)

    @property
    def url(self) -> str:
        return self.server.address

    @property
    def service(self) -> Service:
        assert self.server.service is not None
        return self.server.service

    def client(self, **options: Any) -> openai.OpenAI:
        """OpenAI's own client; close it."""
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options})

    def post(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60)

    def another_llm(self) -> LLM:
        """The same model, with an engine of its own."""
        return LLM(self.llm.path, self.llm.config, self.llm.model, None, self.llm.eos_ids, ENGINE_CONFIG, ENGINE)

    def reference(self, prompts: list[str], **options: Any) -> Generation:
        """What an engine of its own makes of the prompts, greedily."""
        return self.another_llm().generate(prompts, page_size=DEFAULTS.page_size, **options)

    def metrics(self) -> str:
        return httpx.get(self.url + "/metrics", timeout=60).text

    def wait_until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        """Wait for something that other threads do."""
        pause = threading.Event()
        for _ in range(int(seconds / 0.01)):
            if condition():
                return
            pause.wait(0.01)
        raise AssertionError("it did not happen in time")

    def is_idle(self) -> bool:
        stats = self.service.worker.stats
        return not (stats.running or stats.waiting or stats.pages_owned or self.service.num_open)


def served(llm: LLM, engine: type[Engine] = Engine) -> ServedModel:
    """The model with an engine of its own, which compiles at first use."""
    assert llm.tokenizer is not None
    return ServedModel(engine(llm.spec, llm.weights, ENGINE, ENGINE_CONFIG), llm.tokenizer, DEFAULTS)


@contextlib.contextmanager
def running(
    llm: LLM, config: ServerConfig, *, engine: EngineOptions = ENGINE, load: Callable[[], ServedModel] | None = None
) -> Iterator[Running]:
    """Serve until the end of the block."""

    def load_it() -> ServedModel:
        model = ServedModel.of(llm, DEFAULTS, engine)
        return dataclasses.replace(model, readiness=warm_up(model.engine, model.defaults.attention_options))

    config = dataclasses.replace(config, port=0)
    listener = bind(config.host, 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)  # so that little stands between writer and reader
    server = Server(config, listener, load or load_it)
    ready, errors = threading.Event(), []

    def main() -> None:
        try:
            asyncio.run(server.run(ready.set))
        except Exception as error:
            errors.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=main)
    thread.start()
    try:
        assert ready.wait(300)
        if errors:
            raise errors[0]
        started = Running(server, llm)
        started.idle_tasks = started.tasks()
        yield started
    finally:
        server.stop()
        thread.join(60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]
