"""/v1/completions: prompts in, continuations out."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from lychee_jax.server.answers import Answer, Piece
from lychee_jax.server.errors import ApiError
from lychee_jax.server.protocol import CompletionRequest
from lychee_jax.server.service import Service
from lychee_jax.server.token_texts import TokenTexts

_DEFAULT_MAX_TOKENS = 16


async def begin(service: Service, body: CompletionRequest) -> Completion:
    """Admit a call.

    Raises:
        ApiError, UserError: it cannot be taken.
    """
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens is 0, which only makes sense with echo: true", param="max_tokens")
    if body.echo and body.logprobs is not None:
        raise ApiError(400, "logprobs with echo are not supported", param="echo")
    given = body.prompts
    if len(given) > service.config.max_prompts:
        raise ApiError(400, f"{len(given)} prompts are too many; at most {service.config.max_prompts}", param="prompt")
    prompts, texts = await service.in_pool(_encode, service, given, bool(body.echo))
    grammar = await service.grammar(body.response_format)
    answer = service.begin(
        body, prompts, limit=body.max_tokens, default=_DEFAULT_MAX_TOKENS, top_logprobs=body.logprobs or 0,
        endpoint="completions", grammar=grammar,
    )  # fmt: skip
    return Completion(service, body, answer, texts)


def _encode(service: Service, given: Sequence[str | list[int]], echo: bool) -> tuple[list[list[int]], list[str]]:
    """Token ids of the prompts, and the texts that are said again."""
    model = service.model
    rows, texts = [], []
    for prompt in given:
        rows.append(model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
        if not echo:
            texts.append("")
        elif isinstance(prompt, str):
            texts.append(prompt)
        else:
            model.check_ids(prompt)
            texts.append(model.tokenizer.decode(prompt))
    return rows, texts


class Completion:
    """One call that was admitted, in the words of the protocol.

    Attributes:
        answer: what is generated.
    """

    def __init__(self, service: Service, body: CompletionRequest, answer: Answer, echoes: Sequence[str]) -> None:
        self.answer = answer
        self._body, self._echoes = body, echoes
        self._token_texts: TokenTexts = service.model.token_texts
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.config.model_name,
        }

    async def whole(self) -> dict[str, Any]:
        """Everything at once."""
        rows = [Piece(row.choice) for row in self.answer.sequences]
        texts = [[self._echo(row.choice)] for row in rows]
        async for piece in self.answer.pieces():
            row = rows[piece.choice]
            texts[piece.choice].append(piece.text)
            row.extend(piece)
            row.finish_reason = piece.finish_reason
        for row, parts in zip(rows, texts, strict=True):
            row.text = "".join(parts)
        return self._head | {"choices": [self._choice(row) for row in rows], "usage": self.answer.usage()}

    async def events(self) -> AsyncGenerator[dict[str, Any]]:
        """Piece by piece."""
        usage = {"usage": None} if self._body.include_usage else {}
        begun: set[int] = set()
        async for piece in self.answer.pieces():
            if piece.choice not in begun:
                begun.add(piece.choice)
                piece.text = self._echo(piece.choice) + piece.text
            if piece.text or piece.finish_reason or self._body.logprobs is not None:
                yield self._head | {"choices": [self._choice(piece)]} | usage
        if self._body.include_usage:
            yield self._head | {"choices": [], "usage": self.answer.usage()}

    def _echo(self, choice: int) -> str:
        return self._echoes[choice // self._body.choices]

    def _choice(self, piece: Piece) -> dict[str, Any]:
        logprobs = None
        if self._body.logprobs is not None:
            begin = len(self._echo(piece.choice))
            offsets = [begin + offset for offset in piece.offsets]
            logprobs = self._token_texts.completion(piece.tokens, piece.logprobs, piece.top, offsets)
        return {
            "index": piece.choice, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason,
        }  # fmt: skip
