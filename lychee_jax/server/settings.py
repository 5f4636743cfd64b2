"""What whoever starts a server may choose, and the numbers that tests choose otherwise."""

from __future__ import annotations

import dataclasses

from lychee_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """How a server admits, answers and ends.

    Attributes:
        host, port: where it listens; port 0: any free one.
        api_key: what clients must show; None: nothing.
        model_name: how clients call the model.
        max_queue: sequences that may wait beside those that run.
        default_max_tokens: new tokens of a chat whose client names no limit.
        drain_seconds: how long running requests may go on after the first SIGTERM.
        max_body: bytes of a request.
        max_prompts, max_choices, max_stops: of one call.
        slow_reader_seconds: after which a client that takes nothing of its stream is given up.
        text_seconds: what tokenising, a template or a grammar may take.
        text_workers: threads for these.
        watchdog_seconds: a step of the engine that takes longer is reported, and the server counts as unhealthy.

    Raises:
        UserError: a number out of its range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    model_name: str = "lychee"
    max_queue: int = 256
    default_max_tokens: int = 2048
    drain_seconds: float = 30.0
    max_body: int = 32 << 20
    max_prompts: int = 64
    max_choices: int = 16
    max_stops: int = 16
    slow_reader_seconds: float = 60.0
    text_seconds: float = 10.0
    text_workers: int = 4
    watchdog_seconds: float = 120.0

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise UserError(f"--port is {self.port}; it must lie between 0 (any free one) and 65535")
        if self.max_queue < 0:
            raise UserError(f"--max-queue is {self.max_queue}; it must be at least 0")
        if self.default_max_tokens < 1:
            raise UserError(f"--default-max-tokens is {self.default_max_tokens}; it must be at least 1")
        if not self.drain_seconds >= 0:
            raise UserError(f"--drain-seconds is {self.drain_seconds}; it must be at least 0")
        if self.api_key is not None and (not self.api_key or not self.api_key.isascii()):
            raise UserError("the API key must be ASCII text, and not empty")
