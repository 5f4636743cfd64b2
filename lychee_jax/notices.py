"""What the packages have to say beside results, for the command lines: warnings of their loggers, a line each."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def notices_on_stderr() -> Iterator[None]:
    """Show what is logged as a warning on standard error, every notice once."""
    handler = _OnceEach(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("lychee_jax", "checkpoints_convert")]
    before = [logger.propagate for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False  # libraries that read weights give the root logger a handler, which would say it again
    try:
        yield
    finally:
        for logger, propagate in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.propagate = propagate


class _OnceEach(logging.Handler):
    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        notice = " ".join(record.getMessage().split())
        if notice not in self._said:
            self._said.add(notice)
            print(f"notice: {notice}", file=sys.stderr)
