"""Clients that leave or do not read, devices that fail, signals, and what a key guards."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from lychee_jax.cli import main as cli
from lychee_jax.engine.engine import Engine
from lychee_jax.server.errors import ApiError
from lychee_jax.server.middleware import ApiKey
from lychee_jax.server.process import bind, serve
from lychee_jax.server.settings import ServerConfig
from tests.support import servers
from tests.support.servers import Running

ROOT = Path(__file__).parents[2]
LONG = {"prompt": "The red fox", "max_tokens": 480, "ignore_eos": True}


def _send(server: Running, body: dict[str, Any]) -> socket.socket:
    """A request whose answer is not read."""
    client = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    client.sendall(head.encode() + b"\r\n\r\n" + data)
    return client


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_forgotten(server: Running, stream: bool):
    """While its rows decode, and while others of them wait for a slot."""
    client = _send(server, LONG | {"n": 12, "stream": stream})
    server.wait_until(lambda: server.service.worker.stats.waiting > 0)
    client.close()
    server.wait_until(server.is_idle)


def test_a_client_that_is_killed_in_its_stream_is_forgotten(server: Running):
    code = f"""
import http.client, sys, time
connection = http.client.HTTPConnection({server.url.removeprefix("http://")!r})
connection.request("POST", "/v1/completions", sys.argv[1], {{"content-type": "application/json"}})
print(connection.getresponse().readline().decode(), flush=True)
time.sleep(600)
"""
    command = [sys.executable, "-S", "-c", code, json.dumps(LONG | {"n": 6, "stream": True})]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("data: {")
        assert not server.is_idle()
        process.kill()
    server.wait_until(server.is_idle)


def test_a_client_that_leaves_before_its_request_is_whole(server: Running):
    client = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
    client.close()
    server.wait_until(server.is_idle)


def test_a_reader_that_takes_nothing_is_given_up(server: Running):
    """Its answer, with log-probabilities, is larger than what the sockets' buffers hold."""
    with _send(server, LONG | {"n": 4, "stream": True, "logprobs": 20}):
        server.wait_until(lambda: 'requests_aborted_total{reason="slow_reader"} 1.0' in server.metrics(), 60)
    server.wait_until(server.is_idle)


def test_the_key_guards_everything_but_health():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def ask(path: str, headers: list[tuple[bytes, bytes]]) -> int:
        sent: list[Any] = []

        async def send(message):
            sent.append(message)

        await ApiKey(app, "secret")({"type": "http", "path": path, "headers": headers}, None, send)  # pyright: ignore
        return sent[0]["status"]

    def status(path: str, *headers: tuple[bytes, bytes]) -> int:
        return asyncio.run(ask(path, list(headers)))

    assert status("/health") == 200
    for path in ("/v1/models", "/metrics", "/tokenize", "/openapi.json"):
        assert status(path) == 401
        assert status(path, (b"authorization", b"Bearer wrong")) == 401
        assert status(path, (b"authorization", b"Bearer secr\xe9t")) == 401
        assert status(path, (b"authorization", b"Bearer secret")) == 200


def test_a_port_in_use_is_told_in_one_line(capsys: pytest.CaptureFixture[str]):
    with bind("127.0.0.1", 0) as taken:
        assert cli.main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert "choose another --port" in told


class FailingEngine(Engine):
    """Whose device fails as soon as some request has a marked prompt."""

    marked = False

    def add_request(self, request, *, hold=False):
        self.marked |= len(request.prompt) == 13
        super().add_request(request, hold=hold)

    def step(self):
        if self.marked:
            raise RuntimeError("the device has failed\nsomewhere")
        return super().step()


def test_a_device_error_fails_what_runs_and_ends_the_server(server: Running):
    llm = server.llm

    def fail() -> None:
        with servers.running(llm, ServerConfig(), load=lambda: servers.served(llm, FailingEngine)) as other:
            answer = other.post("/v1/completions", {"prompt": [[1] * 13], "max_tokens": 2})
            assert answer.status_code == 503
            assert "device" not in answer.text

    with pytest.raises(RuntimeError, match="the device has failed"):
        fail()


def test_a_device_error_ends_the_process_with_a_reason(
    server: Running, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """`serve` runs in this process here; what ends it is an exception."""
    llm = server.llm

    def leave(status: int) -> None:
        raise SystemExit(status)

    def ask() -> None:
        """Until it is ready, and then the request at which the device fails."""
        while (answer := httpx.post(url + "/v1/completions", json=body, timeout=60)).status_code != 503 or (
            "loading" in answer.text
        ):
            time.sleep(0.01)

    monkeypatch.setattr(os, "_exit", leave)
    listener = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    body = {"prompt": [[1] * 13], "max_tokens": 2}
    client = threading.Thread(target=ask)
    client.start()
    with pytest.raises(SystemExit) as ended:
        serve(ServerConfig(), listener, lambda: servers.served(llm, FailingEngine))
    client.join(60)
    assert ended.value.code == 1
    assert capfd.readouterr().err.splitlines()[-1] == "error: the engine has ended: the device has failed"


class HangingEngine(Engine):
    """Whose steps wait for `go_on`."""

    go_on = threading.Event()

    def step(self):
        self.go_on.wait(60)
        return super().step()


def test_a_step_that_hangs_and_text_that_takes_too_long_are_told(server: Running, capfd: pytest.CaptureFixture[str]):
    llm = server.llm

    def health() -> int:
        return httpx.get(other.url + "/health", timeout=60).status_code

    config = ServerConfig(watchdog_seconds=0.2, text_seconds=0.05)
    with servers.running(llm, config, load=lambda: servers.served(llm, HangingEngine)) as other:
        work = other.service.in_pool(time.sleep, 0.5)
        with pytest.raises(ApiError, match=r"longer than 0\.05 s"):
            asyncio.run_coroutine_threadsafe(work, other.service.worker.ended.get_loop()).result(60)
        assert health() == 200
        thread = threading.Thread(target=other.post, args=("/v1/completions", {"prompt": [[1]], "max_tokens": 1}))
        thread.start()
        other.wait_until(lambda: health() == 503)
        HangingEngine.go_on.set()
        thread.join(60)
        other.wait_until(lambda: health() == 200)
    assert "warning: a step of the engine has not ended" in capfd.readouterr().err


def test_a_drain_answers_what_runs_and_takes_nothing_new(server: Running):
    llm = server.llm
    answers: list[httpx.Response] = []
    with servers.running(llm, ServerConfig()) as other:
        thread = threading.Thread(target=lambda: answers.append(other.post("/v1/completions", LONG | {"n": 4})))
        thread.start()
        other.wait_until(lambda: other.service.num_open > 0)
        other.server.stop()
        other.wait_until(lambda: other.service.draining)
        late = other.post("/v1/completions", {"prompt": "x"})
        assert late.status_code == 503
        assert httpx.get(other.url + "/health").status_code == 503
        thread.join(60)
    assert answers[0].status_code == 200
    assert answers[0].json()["usage"]["completion_tokens"] == 4 * 480


def test_what_does_not_end_in_time_is_answered_all_the_same(server: Running):
    llm = server.llm
    answers: list[httpx.Response] = []
    with servers.running(llm, ServerConfig(drain_seconds=0.0)) as other:
        body = LONG | {"n": 16}
        thread = threading.Thread(target=lambda: answers.append(other.post("/v1/completions", body)))
        thread.start()
        other.wait_until(lambda: other.service.num_open > 0)
        other.server.stop()
        thread.join(60)
    assert answers[0].status_code == 503


def _command(*options: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lychee_jax", "serve", "--port", "0", *options],
        stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


@pytest.mark.slow
def test_the_command_serves_the_bundled_model_until_a_signal():
    with _command(
        "--max-model-len", "256", "--max-num-seqs", "2", "--drain-seconds", "100", LYCHEE_API_KEY="secret"
    ) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("lychee is ready on http://127.0.0.1:"), line
        url = line.split()[-1]
        key = {"authorization": "Bearer secret"}
        body = {"prompt": "The red fox", "max_tokens": 4}
        assert httpx.post(url + "/v1/completions", json=body).status_code == 401
        assert httpx.post(url + "/v1/completions", json=body, headers=key, timeout=60).status_code == 200
        long = {"prompt": "The red fox", "max_tokens": 60, "ignore_eos": True, "n": 4, "stream": True}
        with httpx.stream("POST", url + "/v1/completions", json=long, headers=key, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert "draining" in process.stderr.readline()
            assert httpx.post(url + "/v1/completions", json=body, headers=key, timeout=60).status_code == 503
            told = [line for line in lines if line]
        assert told[-1] == "data: [DONE]"
        assert sum('"finish_reason":"length"' in line.replace(" ", "") for line in told) == 4
        assert process.wait(30) == 0


def test_a_missing_model_is_told_in_one_line():
    with _command("--model", "/nowhere/at-all") as process:
        _, told = process.communicate(timeout=120)
    assert process.returncode == 2
    assert (
        told.strip() == "error: no such folder: /nowhere/at-all (a model on the Hugging Face Hub is named owner/name)"
    )
