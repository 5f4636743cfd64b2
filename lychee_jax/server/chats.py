"""/v1/chat/completions: messages in, the assistant's next one out."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

from lychee_jax.server.answers import Answer, Piece
from lychee_jax.server.errors import ApiError
from lychee_jax.server.messages import check_conversation
from lychee_jax.server.protocol import ChatRequest
from lychee_jax.server.service import Service


async def begin(service: Service, body: ChatRequest) -> Chat:
    """Admit a call.

    Raises:
        ApiError, UserError: it cannot be taken.
    """
    if body.limit == 0:
        raise ApiError(400, "max_tokens must be at least 1", param="max_tokens")
    prompt = await service.in_pool(encode_chat, service, body.messages, body.chat_template_kwargs, body.tools)
    top = (body.top_logprobs or 0) if body.logprobs else 0
    answer = service.begin(
        body, [prompt], limit=body.limit, default=service.config.default_max_tokens, top_logprobs=top, endpoint="chat"
    )
    return Chat(service, body, answer)


def encode_chat(
    service: Service,
    messages: list[dict[str, Any]],
    template_kwargs: dict[str, Any] | None,
    tools: list[dict[str, Any]] | None,
) -> list[int]:
    """Token ids of a conversation up to where the answer begins.

    Raises:
        UserError: messages, tools or keywords that the model's template cannot take.
    """
    return service.model.tokenizer.encode_messages(check_conversation(messages), template_kwargs)


class Chat:
    """One call that was admitted, in the words of the protocol.

    Attributes:
        answer: what is generated.
    """

    def __init__(self, service: Service, body: ChatRequest, answer: Answer) -> None:
        self.answer = answer
        self._body = body
        self._token_texts = service.model.token_texts
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.config.model_name,
        }

    async def whole(self) -> dict[str, Any]:
        """Everything at once."""
        rows = [Piece(row.choice) for row in self.answer.sequences]
        texts: list[list[str]] = [[] for _ in rows]
        async for piece in self.answer.pieces():
            row = rows[piece.choice]
            texts[piece.choice].append(piece.text)
            row.tokens += piece.tokens
            row.logprobs += piece.logprobs
            row.top += piece.top
            row.finish_reason = piece.finish_reason
        choices = [
            {
                "index": row.choice,
                "message": {"role": "assistant", "content": "".join(parts), "refusal": None},
                "logprobs": self._logprobs(row),
                "finish_reason": row.finish_reason,
            }
            for row, parts in zip(rows, texts, strict=True)
        ]
        return self._head | {"object": "chat.completion", "choices": choices, "usage": self.answer.usage()}

    async def events(self) -> AsyncGenerator[dict[str, Any]]:
        """Piece by piece."""
        head = self._head | {"object": "chat.completion.chunk"}
        usage = {"usage": None} if self._body.include_usage else {}
        begun: set[int] = set()
        async for piece in self.answer.pieces():
            delta: dict[str, Any] = {}
            if piece.choice not in begun:
                begun.add(piece.choice)
                delta["role"] = "assistant"
                delta["content"] = ""
            if piece.text:
                delta["content"] = piece.text
            if delta or piece.finish_reason or self._body.logprobs:
                choice = {
                    "index": piece.choice,
                    "delta": delta,
                    "logprobs": self._logprobs(piece),
                    "finish_reason": piece.finish_reason,
                }
                yield head | {"choices": [choice]} | usage
        if self._body.include_usage:
            yield head | {"choices": [], "usage": self.answer.usage()}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return self._token_texts.chat(piece.tokens, piece.logprobs, piece.top)
