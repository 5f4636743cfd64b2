"""What /metrics tells, in Prometheus' text format."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lychee_jax.server.worker import EngineStats

_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)
_BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_END_TO_END = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0)


class Metrics:
    """The numbers of one server; each has a registry of its own."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        """`stats` gives the engine's numbers as of its last step."""
        self._registry = registry = CollectorRegistry()
        self._clocks: dict[str, list[int]] = {}

        def gauge(name: str, what: str, read: Callable[[EngineStats], float]) -> None:
            Gauge(f"lychee_{name}", what, registry=registry).set_function(lambda: read(stats()))

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"lychee_{name}", what, labels, registry=registry)

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"lychee_{name}", what, buckets=buckets, registry=registry)

        gauge("sequences_running", "Sequences that have a row of the batch", lambda now: now.running)
        gauge("sequences_waiting", "Sequences that wait for a row or for pages", lambda now: now.waiting)
        gauge("pages_free", "Pages of the KV cache that hold nothing of use", lambda now: now.pages_free)
        gauge("pages_cached", "Pages that nobody owns and a prompt may reuse", lambda now: now.pages_cached)
        gauge("pages_owned", "Pages that running sequences own", lambda now: now.pages_owned)
        gauge("tasks", "Tasks of the event loop, the one that asks included", lambda _: len(asyncio.all_tasks()))
        gauge("page_bytes", "Device memory of a page of the KV cache, over layers", lambda now: now.page_bytes)
        self.requests = counter("requests", "Calls that were admitted", "endpoint")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were admitted")
        self.cached_tokens = counter("prefix_cache_hit_tokens", "Tokens of prompts that the prefix cache had")
        self.new_tokens = counter("generation_tokens", "Tokens that were generated")
        self.pages_read = counter("kv_pages_read", "Pages that decode steps read, over layers and KV heads")
        self.pages_held = counter("kv_pages_held", "Pages that dense attention would have read in these steps")
        self.finished = counter("sequences_finished", "Sequences that ended by themselves", "reason")
        self.aborted = counter("requests_aborted", "Calls that ended with their client", "reason")
        self.refused = counter("requests_refused", "Calls that were answered by an error", "status")
        self.first_token = histogram(
            "time_to_first_token_seconds", "From admission to the first token of a sequence", _FIRST_TOKEN
        )
        self.between_tokens = histogram(
            "time_between_tokens_seconds", "Time since the last delivery of a sequence, over its tokens",
            _BETWEEN_TOKENS,
        )  # fmt: skip
        self.end_to_end = histogram("request_seconds", "From admission to the last token of a sequence", _END_TO_END)

        self._cpu = Gauge(
            "lychee_cpu_seconds", "Processor time of the process, and of its parts", ["part"], registry=registry
        )
        self._cpu.labels("process").set_function(time.process_time)

    def count_thread(self, part: str) -> None:
        """Count this thread's processor time to a part of the process from here on."""
        clocks = self._clocks.setdefault(part, [])
        clocks.append(time.pthread_getcpuclockid(threading.get_ident()))
        self._cpu.labels(part).set_function(lambda: sum(map(time.clock_gettime, clocks)))

    def text(self) -> bytes:
        """All of it; to be called in the event loop."""
        return generate_latest(self._registry)
