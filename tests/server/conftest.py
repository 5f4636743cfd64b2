"""One server of the tiny model for all modules that do it no harm."""

from collections.abc import Iterator

import openai
import pytest

from lychee_jax.server.settings import ServerConfig
from tests.support import servers
from tests.support.servers import Running


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    llm = servers.make_llm(tmp_path_factory.mktemp("tiny"))
    with servers.running(
        llm, ServerConfig(model_name="tiny", max_queue=40, slow_reader_seconds=1.0, max_body=1 << 16)
    ) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client
