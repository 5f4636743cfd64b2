"""/v1/chat/completions: messages in, the assistant's next one out."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from lychee_jax.server.answers import Answer, Piece
from lychee_jax.server.errors import ApiError
from lychee_jax.server.messages import check_conversation
from lychee_jax.server.model import ServedModel
from lychee_jax.server.protocol import ChatRequest
from lychee_jax.server.service import Service
from lychee_jax.server.tools import Call, Tools, read_tools


async def begin(service: Service, body: ChatRequest) -> Chat:
    """Admit a call.

    Raises:
        ApiError, UserError: it cannot be taken.
    """
    if body.limit == 0:
        raise ApiError(400, "max_tokens must be at least 1", param="max_tokens")
    tools = read_tools(body.tools, body.tool_choice, service.model.tokenizer.tool_template)
    if body.response_format is not None and tools is not None and tools.forced:
        raise ApiError(400, "an answer cannot call a tool and follow response_format", param="tool_choice")
    offered = tools.offered if tools is not None else None
    prompt = await service.in_pool(encode_chat, service.model, body.messages, body.chat_template_kwargs, offered)
    grammar = await service.grammar(body.response_format, tools)
    top = (body.top_logprobs or 0) if body.logprobs else 0
    answer = service.begin(
        body, [prompt], limit=body.limit, default=service.config.default_max_tokens, top_logprobs=top, endpoint="chat",
        grammar=grammar,
    )  # fmt: skip
    return Chat(service, body, answer, tools)


def encode_chat(
    model: ServedModel,
    messages: list[dict[str, Any]],
    template_kwargs: Mapping[str, Any] | None,
    tools: Sequence[Mapping[str, Any]] | None,
) -> list[int]:
    """Token ids of a conversation up to where the answer begins.

    Raises:
        UserError: messages, tools or keywords that the model's template cannot take.
    """
    return model.tokenizer.encode_messages(check_conversation(messages), template_kwargs, tools=tools)


class _Reader:
    """What one answer says, and what it calls."""

    def __init__(self, tools: Tools | None) -> None:
        self._parser = tools.parser() if tools is not None else None
        self.begun = False
        self.calls: list[Call] = []

    def take(self, piece: Piece) -> tuple[str, list[Call], str | None]:
        """The piece's text without calls, the calls that are complete, and why the answer ends, if it does."""
        if self._parser is None:
            return piece.text, [], piece.finish_reason
        text, calls = self._parser.push(piece.text)
        if piece.finish_reason is not None:
            rest, more = self._parser.finish()
            text, calls = text + rest, calls + more
        self.calls += calls
        reason = "tool_calls" if piece.finish_reason == "stop" and self.calls else piece.finish_reason
        return text, calls, reason


@dataclasses.dataclass
class _Message:
    """An answer that is collected."""

    piece: Piece
    reader: _Reader
    texts: list[str] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        text, calls = "".join(self.texts), [call.to_json() for call in self.reader.calls]
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        return message | ({"tool_calls": calls} if calls else {})


class Chat:
    """One call that was admitted, in the words of the protocol.

    Attributes:
        answer: what is generated.
    """

    def __init__(self, service: Service, body: ChatRequest, answer: Answer, tools: Tools | None) -> None:
        self.answer = answer
        self._body, self._tools = body, tools
        self._token_texts = service.model.token_texts
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.config.model_name,
        }

    async def whole(self) -> dict[str, Any]:
        """Everything at once."""
        rows = [_Message(Piece(row.choice), _Reader(self._tools)) for row in self.answer.sequences]
        async for piece in self.answer.pieces():
            row = rows[piece.choice]
            text, _, row.finish_reason = row.reader.take(piece)
            row.texts.append(text)
            row.piece.extend(piece)
        choices = [
            {
                "index": row.piece.choice,
                "message": row.to_json(),
                "logprobs": self._logprobs(row.piece),
                "finish_reason": row.finish_reason,
            }
            for row in rows
        ]
        return self._head | {"object": "chat.completion", "choices": choices, "usage": self.answer.usage()}

    async def events(self) -> AsyncGenerator[dict[str, Any]]:
        """Piece by piece; a call of a tool comes when it is complete."""
        head = self._head | {"object": "chat.completion.chunk"}
        usage = {"usage": None} if self._body.include_usage else {}
        readers = [_Reader(self._tools) for _ in self.answer.sequences]
        async for piece in self.answer.pieces():
            reader = readers[piece.choice]
            known = len(reader.calls)
            text, calls, reason = reader.take(piece)
            delta: dict[str, Any] = {} if reader.begun else {"role": "assistant", "content": ""}
            reader.begun = True
            if text:
                delta["content"] = text
            if calls:
                delta["tool_calls"] = [{"index": known + n} | call.to_json() for n, call in enumerate(calls)]
            if delta or reason or self._body.logprobs:
                choice = {
                    "index": piece.choice,
                    "delta": delta,
                    "logprobs": self._logprobs(piece),
                    "finish_reason": reason,
                }
                yield head | {"choices": [choice]} | usage
        if self._body.include_usage:
            yield head | {"choices": [], "usage": self.answer.usage()}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return self._token_texts.chat(piece.tokens, piece.logprobs, piece.top)
