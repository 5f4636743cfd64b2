"""Answers that end with their client: whatever is awaited for one is cancelled when the client goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lychee_jax.files import json_text
from lychee_jax.server.errors import ApiError

# A line may end here for readers that follow Unicode; JSON allows escapes.
_LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}

ABORT = "lychee.abort"
"""Of a scope: a function that drops the connection, unsent data included."""


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, Response]) -> Response:
    """What `work` answers; where the client goes first, work is cancelled, and the answer goes nowhere."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else Response(status_code=499)
    finally:
        await _cancel(task, gone)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Server-sent events, an object each, ended by `[DONE]`.

    It ends early when the client goes, or takes nothing for `patience` seconds: its connection is dropped then.
    `on_end` is called however it ends, also where the first event was never asked for; it is told whether patience did.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[Any],
        *,
        patience: float,
        on_end: Callable[[bool], None],
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._patience, self._on_end = events, patience, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends until the events, the client or its patience end."""
        sending, gone = asyncio.ensure_future(self._send(send)), asyncio.ensure_future(_disconnect(receive))
        slow = False
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        except _SlowReader:
            slow = True
            scope.get(ABORT, lambda: None)()
        finally:
            self._on_end(slow)
            await _cancel(sending, gone)
            await self._events.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await self._put(send, _event(event), more=True)
        except ApiError as error:
            await self._put(send, _event(error.to_json()), more=True)
        await self._put(send, "data: [DONE]\n\n", more=False)

    async def _put(self, send: Send, text: str, *, more: bool) -> None:
        try:
            async with asyncio.timeout(self._patience):
                await send({"type": "http.response.body", "body": text.encode(), "more_body": more})
        except TimeoutError:
            raise _SlowReader from None


def _event(value: Any) -> str:
    return f"data: {json_text(value).translate(_LINE_ENDS)}\n\n"


class _SlowReader(Exception):
    """The client takes nothing."""
