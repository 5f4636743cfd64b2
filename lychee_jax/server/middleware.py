"""What happens to a request before its handler sees it: key, readiness, size. Pure ASGI, so that a handler's `receive`
still tells when the client has gone.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lychee_jax.server.errors import ApiError

_DISCARDED = 4  # times the limit: what is read of a body that is too large, so that the client hears why


class CountErrors:
    """Counts answers with an error status."""

    def __init__(self, app: ASGIApp, count: Callable[[int], None]) -> None:
        self._app, self._count = app, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on, and looks at the answer."""

        async def watch(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                self._count(message["status"])
            await send(message)

        await self._app(scope, receive, watch)


class ApiKey:
    """Lets in only who shows the key, but everyone to /health."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app = app
        self._expected = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 401, or passes on."""
        if scope["type"] == "http" and scope["path"] != "/health" and self._expected is not None:
            shown = Headers(scope=scope).get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(shown, self._expected):
                error = ApiError(401, "this server needs an API key: Authorization: Bearer KEY", code="invalid_api_key")
                error.headers["www-authenticate"] = "Bearer"
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Gate:
    """Answers 503 as long as `reason` gives one, but for /health and /metrics."""

    def __init__(self, app: ASGIApp, reason: Callable[[], str | None]) -> None:
        self._app, self._reason = app, reason

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 503, or passes on."""
        if scope["type"] == "http" and scope["path"] not in ("/health", "/metrics"):
            reason = self._reason()
            if reason is not None:
                await ApiError(503, reason, headers={"retry-after": "5"}).response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """Reads the whole body before anything else happens, up to a limit; handlers get it in one message."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 413, or passes on."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        body, total, more = bytearray(), 0, True
        while more and total <= _DISCARDED * self._limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            total += len(message.get("body", b""))
            more = message.get("more_body", False)
            if total <= self._limit:
                body += message.get("body", b"")
        if total > self._limit:
            error = ApiError(413, f"the request is larger than {self._limit} bytes", headers={"connection": "close"})
            await error.response()(scope, receive, send)
            return
        whole: Message | None = {"type": "http.request", "body": bytes(body), "more_body": False}

        async def replay() -> Message:
            nonlocal whole
            if whole is None:
                return await receive()
            message, whole = whole, None
            return message

        await self._app(scope, replay, send)
