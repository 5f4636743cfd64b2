"""The web application: paths, errors, and which handler waits for what."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from lychee_jax.errors import UserError
from lychee_jax.server import chats, completions
from lychee_jax.server.disconnects import EventStream, until_disconnect
from lychee_jax.server.errors import ApiError, json_response
from lychee_jax.server.middleware import ApiKey, BodyLimit, CountErrors, Gate
from lychee_jax.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
)
from lychee_jax.server.service import Service

type Call = completions.Completion | chats.Chat


def make_app(service: Service) -> FastAPI:
    """The application around a service."""
    app = FastAPI(title="lychee serve", docs_url=None, redoc_url=None)
    _add_errors(app)
    _add_information(app, service)
    _add_text(app, service)
    # The last one added is the first to see a request.
    app.add_middleware(BodyLimit, limit=service.config.max_body)
    app.add_middleware(Gate, reason=lambda: service.unavailable)
    app.add_middleware(ApiKey, key=service.config.api_key)
    app.add_middleware(CountErrors, count=lambda status: service.metrics.refused.labels(str(status)).inc())

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Continue prompts."""
        return await _generate(service, request, body, lambda: completions.begin(service, body))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await _generate(service, request, body, lambda: chats.begin(service, body))

    return app


async def _generate(
    service: Service, request: Request, body: GenerationRequest, begin: Callable[[], Awaitable[Call]]
) -> Response:
    """Admit a call and answer it, as long as its client is there."""
    service.check_name(body.model)
    call: Call | None = None

    async def work() -> Response:
        nonlocal call
        call = await begin()
        if not body.stream:
            return json_response(await call.whole())
        return EventStream(
            call.events(),
            patience=service.config.slow_reader_seconds,
            on_end=end,
        )

    def end(slow: bool) -> None:
        if call is not None and (slow or call.answer.num_open):
            service.metrics.aborted.labels("slow_reader" if slow else "disconnect").inc()
            call.answer.close()

    response = None
    try:
        response = await until_disconnect(request.receive, work())
        return response
    finally:
        if not isinstance(response, EventStream):
            end(slow=False)


def _add_information(app: FastAPI, service: Service) -> None:
    started = int(time.time())

    @app.get("/health")
    async def health() -> Response:
        """Whether requests are answered."""
        hangs = service.worker.hangs_since(service.config.watchdog_seconds)
        reason = service.unavailable or (None if hangs is None else f"a step has not ended for {hangs:.0f} s")
        if reason is not None:
            raise ApiError(503, reason)
        return json_response({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    def described() -> dict[str, Any]:
        limit = service.model.engine.max_tokens
        return {
            "id": service.config.model_name, "object": "model", "created": started, "owned_by": "lychee-jax",
            "max_model_len": limit,
        }  # fmt: skip

    @app.get("/v1/models")
    async def models() -> Response:
        """The one model."""
        return json_response({"object": "list", "data": [described()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """The one model, by its name."""
        service.check_name(name)
        return json_response(described())


def _add_text(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        """Token ids of a text or a conversation."""
        service.check_name(body.model)

        async def work() -> Response:
            tokenizer = service.model.tokenizer
            if body.messages is not None:
                tokens = await service.in_pool(
                    chats.encode_chat, service.model, body.messages, body.chat_template_kwargs, body.tools
                )
            else:
                encode = tokenizer.encode_plain if body.add_special_tokens is False else tokenizer.encode
                tokens = await service.in_pool(encode, body.prompt or "")
            limit = service.model.engine.max_tokens
            return json_response({"count": len(tokens), "max_model_len": limit, "tokens": tokens})

        return await until_disconnect(request.receive, work())

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        """The text of token ids."""
        service.check_name(body.model)
        service.model.check_ids(body.tokens)

        async def work() -> Response:
            return json_response({"prompt": await service.in_pool(service.model.tokenizer.decode, body.tokens)})

        return await until_disconnect(request.receive, work())


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def told(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(UserError)
    async def refused(_: Request, error: UserError) -> Response:
        return ApiError(400, str(error)).response()

    @app.exception_handler(NotImplementedError)
    async def uncovered(_: Request, error: NotImplementedError) -> Response:
        return ApiError(400, str(error)).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        if first["type"] == "json_invalid":
            return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']}").response()
        name = place[0] if place else ""
        return ApiError(400, f"{name}: {first['msg']}" if name else first["msg"], param=name or None).response()

    @app.exception_handler(HTTPException)
    async def web(request: Request, error: HTTPException) -> Response:
        message = f"there is no {request.url.path}" if error.status_code == 404 else str(error.detail)
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return ApiError(500, "the server has failed to answer; its log says more").response()
