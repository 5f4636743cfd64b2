"""The life of a server: it listens, loads, answers, drains and ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from lychee_jax.errors import UserError
from lychee_jax.server.app import make_app
from lychee_jax.server.disconnects import ABORT
from lychee_jax.server.model import ServedModel
from lychee_jax.server.service import Service
from lychee_jax.server.settings import ServerConfig
from lychee_jax.server.worker import Worker, first_line

_CLOSING_SECONDS = 2  # for connections that are open when everything has been answered


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there; nothing is accepted yet.

    Raises:
        UserError: the port is in use, or not this user's to take, or there is no such address here.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise UserError(f"cannot listen on {host}, port {port}: {reason}; choose another --port or --host") from error
    return listener


class Server:
    """One server in one event loop.

    Attributes:
        address: where it listens.
        service: there once `run` has begun.
    """

    def __init__(self, config: ServerConfig, listener: socket.socket, load: Callable[[], ServedModel]) -> None:
        """`load` is called in the engine's thread."""
        self.config, self._listener, self._load = config, listener, load
        host, port = listener.getsockname()[:2]
        self.address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self.service: Service | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._leave = asyncio.Event()

    def stop(self) -> None:
        """Begin to drain, as the first SIGTERM does; any thread may call."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._leave.set)

    async def run(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop`, and then until what runs has been answered.

        Raises:
            Exception: what loading the model has raised, or what has ended the engine.
        """
        self._loop = asyncio.get_running_loop()
        worker = Worker(self._load)
        service = self.service = Service(self.config, worker)
        web = _Web(service)
        serving = asyncio.ensure_future(web.serve(sockets=[self._listener]))
        watching = asyncio.ensure_future(_watch(worker, self.config.watchdog_seconds))
        leaving = asyncio.ensure_future(self._leave.wait())
        warm = asyncio.ensure_future(worker.ready.wait())
        try:
            await asyncio.wait({warm, leaving, worker.ended}, return_when=asyncio.FIRST_COMPLETED)
            if warm.done():
                on_ready()
                await asyncio.wait({leaving, worker.ended}, return_when=asyncio.FIRST_COMPLETED)
            if not worker.ended.done():
                service.draining = True
                await self._drain(service)
        finally:
            for task in (watching, leaving, warm):
                task.cancel()
            service.interrupt()
            web.should_exit = True
            await serving
            service.close()
            if not worker.ended.done() and worker.stop():
                await worker.ended
        if worker.ended.done():
            worker.ended.result()

    async def _drain(self, service: Service) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.drain_seconds):
                while service.num_open and service.worker.state == "ready":
                    await asyncio.sleep(0.02)


class _Web(uvicorn.Server):
    """Uvicorn, that leaves signals alone."""

    def __init__(self, service: Service) -> None:
        config = uvicorn.Config(
            make_app(service), http=_Connection, ws="none", lifespan="off", log_config=None, access_log=False,
            server_header=False, proxy_headers=False, timeout_graceful_shutdown=_CLOSING_SECONDS,
        )  # fmt: skip
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None of them."""
        yield


class _Connection(H11Protocol):
    """A connection whose handlers may drop it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there."""
        super().connection_made(transport)
        app = self.app

        async def with_abort(scope: Scope, receive: Receive, send: Send) -> None:
            scope[ABORT] = transport.abort
            await app(scope, receive, send)  # type: ignore[arg-type]

        self.app = with_abort  # type: ignore[assignment]


async def _watch(worker: Worker, seconds: float) -> None:
    """Report a step that hangs, once."""
    told = False
    while True:
        await asyncio.sleep(min(1.0, seconds))
        hangs = worker.hangs_since(seconds)
        if hangs is not None and not told:
            _say(f"warning: a step of the engine has not ended for {hangs:.0f} s; it is in {worker.place()}")
        told = hangs is not None


def serve(config: ServerConfig, listener: socket.socket, load: Callable[[], ServedModel]) -> NoReturn:
    """Serve until a signal ends it, and then end the process: with status 0 after a drain, 1 if the engine has died.

    The first SIGTERM or SIGINT drains, the second ends the process at once. Threads that compile cannot be interrupted,
    so the process does not wait for them.

    Raises:
        UserError: the model cannot be loaded.
    """
    server = Server(config, listener, load)
    signals = 0
    loaded = False

    def on_signal(number: int) -> None:
        nonlocal signals
        signals += 1
        if signals > 1:
            os._exit(128 + number)
        if loaded:
            _say(f"draining: running requests have {config.drain_seconds:g} s; a second signal ends at once")
        server.stop()

    def on_ready() -> None:
        nonlocal loaded
        loaded = True
        _say(f"{config.model_name} is ready on {server.address}")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal, number)
        await server.run(on_ready)

    try:
        asyncio.run(main())
    except Exception as error:
        if not loaded:
            raise
        _say(f"error: the engine has ended: {first_line(error)}")
        os._exit(1)
    os._exit(0)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
