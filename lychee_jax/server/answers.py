"""What a call generates, as it comes: outputs of the engine in, pieces of text out, stop texts looked for."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Literal

from lychee_jax.engine.outputs import PromptLogprob, RequestOutput
from lychee_jax.engine.request import Request
from lychee_jax.server.errors import ApiError
from lychee_jax.server.metrics import Metrics
from lychee_jax.server.token_texts import Likeliest
from lychee_jax.server.worker import Worker
from lychee_jax.text.streaming import TextStream

Ending = Literal["stop", "length"]


@dataclasses.dataclass
class Piece:
    """What one sequence got by one block: text that is final, its tokens, and where their texts begin in the answer.

    `top`: the likeliest tokens at each step, as many as were asked for. `begins`: it is the sequence's first, and has
    what is told of its prompt.
    """

    choice: int
    begins: bool = False
    prompt: list[PromptLogprob] = dataclasses.field(default_factory=list)
    text: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top: list[Likeliest] = dataclasses.field(default_factory=list)
    offsets: list[int] = dataclasses.field(default_factory=list)
    finish_reason: Ending | None = None

    def extend(self, other: Piece) -> None:
        """Add what a later piece has besides its text."""
        self.prompt += other.prompt
        self.tokens += other.tokens
        self.logprobs += other.logprobs
        self.top += other.top
        self.offsets += other.offsets


@dataclasses.dataclass
class Row:
    """One sequence of an answer."""

    request: Request
    choice: int
    text: TextStream
    wanted: int  # new tokens; the engine generates one where none is wanted
    begun: bool = False
    length: int = 0  # of the text
    count: int = 0
    cached_tokens: int = 0
    pages_read: int = 0
    pages_held: int = 0
    last: float = 0.0

    def take(self, output: RequestOutput) -> Piece:
        """Add an output; a stop text ends the sequence at the token that completes it."""
        piece = Piece(self.choice, not self.begun, output.prompt_logprobs)
        piece.finish_reason = "length" if self.wanted == 0 else output.finish_reason  # type: ignore[assignment]
        self.begun = True
        self.cached_tokens = output.cached_tokens
        self.pages_read += output.pages_read
        self.pages_held += output.pages_held
        pieces = []
        for place, token in enumerate(output.tokens[: self.wanted - self.count]):
            piece.tokens.append(token)
            piece.logprobs.append(output.logprobs[place])
            piece.top.append(output.top[place] if output.top else [])
            piece.offsets.append(self.length)
            pieces.append(self.text.push(token))
            self.length += len(pieces[-1])
            if self.text.stopped:
                piece.finish_reason = "stop"
                break
        if piece.finish_reason is not None:
            pieces.append(self.text.finish())
        self.count += len(piece.tokens)
        piece.text = "".join(pieces)
        return piece


class Answer:
    """All sequences of one call. `close` must be called, however it ends.

    Attributes:
        prompts: token ids of each.
        sequences: `n` for each prompt.
    """

    def __init__(
        self, worker: Worker, metrics: Metrics, prompts: Sequence[Sequence[int]], sequences: Sequence[Row]
    ) -> None:
        self.prompts, self.sequences = prompts, sequences
        self._worker, self._metrics = worker, metrics
        self._outputs: asyncio.Queue[tuple[Row, RequestOutput]] = asyncio.Queue()
        self._open = {sequence.request.id for sequence in sequences}
        self._began = time.perf_counter()
        for sequence in sequences:
            worker.add(sequence.request, self._receiver(sequence))

    @property
    def num_open(self) -> int:
        """Sequences that have not ended."""
        return len(self._open)

    async def pieces(self) -> AsyncGenerator[Piece]:
        """The pieces of all sequences, in the order in which they come.

        Raises:
            ApiError: the engine has ended, or the logits of a sequence are not finite.
        """
        while self._open:
            sequence, output = await self._outputs.get()
            if sequence.request.id not in self._open:
                continue  # a stop text has ended it meanwhile
            if output.finish_reason in ("abort", "error"):
                self.close()
                if output.error is None:
                    raise ApiError(503, "the server is shutting down")
                raise ApiError(500, output.error)
            piece = sequence.take(output)
            self._count(sequence, piece)
            if piece.finish_reason is not None:
                self._open.discard(sequence.request.id)
                self._worker.finish(sequence.request.id)
            yield piece

    def interrupt(self) -> None:
        """Whoever waits for a piece gets an error."""
        for row in self.sequences:
            if row.request.id in self._open:
                self._outputs.put_nowait((row, RequestOutput(row.request.id, finish_reason="abort")))

    def close(self) -> None:
        """Whatever has not ended ends now."""
        for request_id in self._open:
            self._worker.finish(request_id)
        self._open.clear()

    def usage(self) -> dict[str, Any]:
        """What was read and generated; of a prompt with several answers once."""
        prompt, new = sum(map(len, self.prompts)), sum(sequence.count for sequence in self.sequences)
        firsts = self.sequences[:: len(self.sequences) // len(self.prompts)]
        read = sum(sequence.pages_read for sequence in self.sequences)
        held = sum(sequence.pages_held for sequence in self.sequences)
        attention: Any = self.sequences[0].request.attention
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(sequence.cached_tokens for sequence in firsts)},
            "lychee": {"attention": attention.mode, "kv_read_share": read / held if held else 1.0},
        }

    def _receiver(self, sequence: Row) -> Any:
        return lambda output: self._outputs.put_nowait((sequence, output))

    def _count(self, sequence: Row, piece: Piece) -> None:
        now, metrics = time.perf_counter(), self._metrics
        if sequence.count == len(piece.tokens):
            metrics.first_token.observe(now - self._began)
        elif piece.tokens:
            metrics.between_tokens.observe((now - sequence.last) / len(piece.tokens))
        sequence.last = now
        metrics.new_tokens.inc(len(piece.tokens))
        if piece.finish_reason is not None:
            metrics.end_to_end.observe(now - self._began)
            metrics.finished.labels(piece.finish_reason).inc()
            metrics.cached_tokens.inc(sequence.cached_tokens)
            metrics.pages_read.inc(sequence.pages_read)
            metrics.pages_held.inc(sequence.pages_held)
