"""/v1/completions: prompts in, continuations out."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from lychee_jax.server.answers import Answer, Piece
from lychee_jax.server.errors import ApiError
from lychee_jax.server.model import ServedModel
from lychee_jax.server.protocol import CompletionRequest
from lychee_jax.server.service import Service
from lychee_jax.server.token_texts import TokenTexts
from lychee_jax.text.streaming import StreamDecoder

_DEFAULT_MAX_TOKENS = 16


async def begin(service: Service, body: CompletionRequest) -> Completion:
    """Admit a call.

    Raises:
        ApiError, UserError: it cannot be taken.
    """
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens is 0, which only makes sense with echo: true", param="max_tokens")
    given = body.prompts
    if len(given) > service.config.max_prompts:
        raise ApiError(400, f"{len(given)} prompts are too many; at most {service.config.max_prompts}", param="prompt")
    echoes: list[Echo] | None = None
    if body.echo:
        prompts, echoes = await service.in_pool(_encode_and_echo, service.model, given)
    else:
        prompts = await service.in_pool(_encode, service.model, given)
    grammar = await service.grammar(body.response_format)
    answer = service.begin(
        body, prompts, limit=body.max_tokens, default=_DEFAULT_MAX_TOKENS, top_logprobs=body.logprobs or 0,
        prompt_logprobs=body.logprobs if body.echo else None, endpoint="completions", grammar=grammar,
    )  # fmt: skip
    return Completion(service, body, answer, echoes)


@dataclasses.dataclass(frozen=True)
class Echo:
    """A prompt as it is said again: its text, and where the text of each token begins."""

    text: str = ""
    offsets: list[int] = dataclasses.field(default_factory=list)


def _encode(model: ServedModel, given: Sequence[str | list[int]]) -> list[list[int]]:
    """Token ids of the prompts."""
    return [model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in given]


def _encode_and_echo(model: ServedModel, given: Sequence[str | list[int]]) -> tuple[list[list[int]], list[Echo]]:
    prompts, echoes = _encode(model, given), []
    for tokens, prompt in zip(prompts, given, strict=True):
        model.check_ids(tokens)
        decoder, offsets, length = StreamDecoder(model.tokenizer), [], 0
        for token in tokens:
            offsets.append(length)
            length += len(decoder.push(token))
        echoes.append(Echo(prompt if isinstance(prompt, str) else model.tokenizer.decode(tokens), offsets))
    return prompts, echoes


class Completion:
    """One call that was admitted, in the words of the protocol.

    Attributes:
        answer: what is generated.
    """

    def __init__(
        self, service: Service, body: CompletionRequest, answer: Answer, echoes: Sequence[Echo] | None
    ) -> None:
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
        rows = [Piece(row.choice, begins=True) for row in self.answer.sequences]
        texts: list[list[str]] = [[] for _ in rows]
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
        async for piece in self.answer.pieces():
            if piece.text or piece.finish_reason or piece.begins or self._body.logprobs is not None:
                yield self._head | {"choices": [self._choice(piece)]} | usage
        if self._body.include_usage:
            yield self._head | {"choices": [], "usage": self.answer.usage()}

    def _choice(self, piece: Piece) -> dict[str, Any]:
        prompt = piece.choice // self._body.choices
        echo = Echo() if self._echoes is None else self._echoes[prompt]
        logprobs = None
        if self._body.logprobs is not None:
            tokens, values, top = list(piece.tokens), list[float | None](piece.logprobs), list(piece.top)
            offsets = [len(echo.text) + offset for offset in piece.offsets]
            if piece.begins and self._echoes is not None:
                told = piece.prompt
                tokens = [*self.answer.prompts[prompt], *tokens]
                values = [None, *(logprob for _, logprob, _ in told), *values]
                top = [None, *(likeliest for _, _, likeliest in told), *top]
                offsets = [*echo.offsets, *offsets]
            logprobs = self._token_texts.completion(tokens, values, top, offsets)
        text = echo.text + piece.text if piece.begins else piece.text
        return {"index": piece.choice, "text": text, "logprobs": logprobs, "finish_reason": piece.finish_reason}
