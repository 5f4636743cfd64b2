"""A server as its clients notice it, at several numbers of requests at once: streams over HTTP, by `http.client`.

Any server of OpenAI's protocol will do; one of ours also tells how much of its processor time went to something else
than the engine.
"""

import concurrent.futures
import contextlib
import dataclasses
import http.client
import random
import statistics
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lychee_jax.benchmarks.deliveries import Spread
from lychee_jax.errors import UserError
from lychee_jax.files import json_text, parse_json

_WORDS = (
    "amber",
    "falcon",
    "river",
    "stone",
    "quiet",
    "market",
    "wooden",
    "lantern",
    "old",
    "harbour",
    "silver",
    "north",
)

_PARTS = {"event_loop", "text", "process"}


@dataclasses.dataclass(frozen=True)
class HttpLoad:
    """What is asked.

    Attributes:
        url: of the server, such as http://127.0.0.1:8000.
        at_once: numbers of requests that run together, one after the other.
        requests: of each number, for each request that runs; all numbers are multiples of it.
        prompt_words: words of each prompt, drawn at random.
        new_tokens: of each request.
        guided: streams that follow a regular expression, beside which all others are measured again; 0: none.
        api_key: that the server wants to see.

    Raises:
        UserError: a number out of its range, or no address.
    """

    url: str
    at_once: tuple[int, ...] = (1, 4, 16, 64)
    requests: int = 2
    prompt_words: int = 100
    new_tokens: int = 64
    guided: int = 0
    api_key: str | None = None

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme != "http" or parts.hostname is None:
            raise UserError(f"--url is {self.url}; give an address such as http://127.0.0.1:8000")
        if min(self.at_once, default=0) < 1 or min(self.requests, self.prompt_words, self.new_tokens) < 1:
            raise UserError("numbers of requests, words and tokens must be at least 1")
        if self.guided < 0:
            raise UserError(f"--guided is {self.guided}; it must not be negative")


@dataclasses.dataclass(frozen=True)
class HttpRow:
    """One number of requests at once.

    `stream_tokens_per_s`: of a stream from its first token on, the median. `beside_guided`: the same where some of the
    streams are guided, of the others, over the number without; None where it was not asked for, or no others are left.
    `between_tokens_s`: gaps between two events of one stream, over the tokens that end them. `overhead_share`: of the
    server's processor time, what its event loop and its text workers took, all but the engine's thread and those that
    compute for it; None where it does not tell.
    """

    at_once: int
    requests: int
    seconds: float
    tokens_per_s: float
    stream_tokens_per_s: float | None
    beside_guided: float | None
    first_token_s: Spread
    between_tokens_s: Spread | None
    overhead_share: float | None
    samples_first_token_s: list[float]
    samples_between_tokens_s: list[float]


@dataclasses.dataclass
class _Stream:
    """What one request got when, in seconds since it was sent."""

    first: float
    gaps: list[float]
    tokens: int
    rate: float | None  # tokens a second, from the first on


def measure(
    load: HttpLoad, *, seed: int = 0, progress: Callable[[str, int, int], None] = lambda stage, done, total: None
) -> list[HttpRow]:
    """Ask for everything, the smallest number first, after one request that warms up.

    Raises:
        UserError: the server cannot be reached, or refuses.
    """
    rng = random.Random(seed)
    _ask(load, _prompt(load, rng))
    rows = []
    for at_once in sorted(load.at_once):
        before, began = _processor_seconds(load), time.perf_counter()
        streams = _streams(load, at_once, rng, lambda done, total, n=at_once: progress(f"{n} at once", done, total))
        row = _row(at_once, streams, time.perf_counter() - began, before, _processor_seconds(load))
        if 0 < load.guided < at_once and row.stream_tokens_per_s is not None:
            stage = f"{at_once} at once, {load.guided} guided"
            rate = _rate_beside_guided(load, at_once, rng, lambda done, total, s=stage: progress(s, done, total))
            row = dataclasses.replace(row, beside_guided=None if rate is None else rate / row.stream_tokens_per_s)
        rows.append(row)
    return rows


def _streams(load: HttpLoad, at_once: int, rng: random.Random, progress: Callable[[int, int], None]) -> list[_Stream]:
    """So many at once, until all that belong to this number have been read."""
    prompts = [_prompt(load, rng) for _ in range(at_once * load.requests)]
    streams = []
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        for stream in pool.map(lambda prompt: _ask(load, prompt), prompts):
            streams.append(stream)
            progress(len(streams), len(prompts))
    return streams


def _rate_beside_guided(
    load: HttpLoad, at_once: int, rng: random.Random, progress: Callable[[int, int], None]
) -> float | None:
    """The median rate of plain streams as long as `load.guided` of those at once are guided."""
    # Letters and spaces without an end: the server may not end it before its tokens are used up.
    guide = {"response_format": {"type": "regex", "regex": f"[a-z ]{{{16 * load.new_tokens}}}"}}
    rates: list[float | None] = []
    for _ in range(2):  # what guided requests need may be compiled in the first round
        over = threading.Event()

        def guided(prompt: str, over: threading.Event = over) -> None:
            while not over.is_set():
                _ask(load, prompt, guide)

        with concurrent.futures.ThreadPoolExecutor(load.guided) as pool:
            guides = [pool.submit(guided, _prompt(load, rng)) for _ in range(load.guided)]
            try:
                rates.append(_median_rate(_streams(load, at_once - load.guided, rng, progress)))
            finally:
                over.set()
            for each in guides:
                each.result()
    return rates[-1]


def _median_rate(streams: Sequence[_Stream]) -> float | None:
    rates = [stream.rate for stream in streams if stream.rate is not None]
    return statistics.median(rates) if rates else None


def _row(
    at_once: int, streams: Sequence[_Stream], seconds: float, before: dict[str, float], after: dict[str, float]
) -> HttpRow:
    spent = {part: after[part] - before.get(part, 0.0) for part in after}
    first = [stream.first for stream in streams]
    between = [gap for stream in streams for gap in stream.gaps]
    first_token = Spread.of(first)
    assert first_token is not None
    return HttpRow(
        at_once=at_once,
        requests=len(streams),
        seconds=seconds,
        tokens_per_s=sum(stream.tokens for stream in streams) / seconds,
        stream_tokens_per_s=_median_rate(streams),
        beside_guided=None,
        first_token_s=first_token,
        between_tokens_s=Spread.of(between),
        overhead_share=(spent["event_loop"] + spent["text"]) / spent["process"] if spent.keys() >= _PARTS else None,
        samples_first_token_s=first,
        samples_between_tokens_s=between,
    )


def targets(rows: Sequence[HttpRow]) -> list[dict[str, Any]]:
    """What the server is to reach at 16 requests at once, as far as it was measured."""
    found = []
    for row in rows:
        if row.at_once != 16:
            continue
        for what, value, target, sense in (
            ("processor time outside the engine at 16 requests at once, share of all", row.overhead_share, 0.1, "<="),
            (
                "tokens/s beside a guided stream at 16, share (a target for an H200)",
                row.beside_guided,
                0.5,
                ">=",
            ),
        ):
            if value is not None:
                found.append({"what": what, "value": value, "target": target, "sense": sense})
    return found


def table(rows: Sequence[HttpRow]) -> str:
    """For people."""

    def each(label: str, *numbers: int | float | None, form: str = ",.2f") -> str:
        return f"{label:<40}" + "".join(f" {'–' if n is None else format(n, form):>10}" for n in numbers)

    return "\n".join(
        [
            each("requests at once", *(row.at_once for row in rows), form="d"),
            each("tokens/s, end to end", *(row.tokens_per_s for row in rows)),
            each("tokens/s of a stream, median", *(row.stream_tokens_per_s for row in rows)),
            each("the same beside guided streams, share", *(row.beside_guided for row in rows), form=".1%"),
            each("first token, s: median", *(row.first_token_s.median for row in rows)),
            each("first token, s: p99", *(row.first_token_s.p99 for row in rows)),
            each("between tokens, ms: median", *(r.between_tokens_s and 1e3 * r.between_tokens_s.median for r in rows)),
            each("between tokens, ms: p99", *(r.between_tokens_s and 1e3 * r.between_tokens_s.p99 for r in rows)),
            each("outside the engine, share of CPU", *(row.overhead_share for row in rows), form=".1%"),
        ]
    )


def _prompt(load: HttpLoad, rng: random.Random) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(load.prompt_words))


def _ask(load: HttpLoad, prompt: str, guide: Mapping[str, Any] | None = None) -> _Stream:
    """One stream, read to its end; `guide`: what its tokens have to follow."""
    body = {
        "prompt": prompt, "max_tokens": load.new_tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True}, "logprobs": 0,
        **(guide or {}),
    }  # fmt: skip
    sent = last = time.perf_counter()
    first: float | None = None
    gaps: list[float] = []
    tokens = at_first = 0
    with _answer(load, "POST", "/v1/completions", body) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            now = time.perf_counter()
            event = parse_json(line[6:].decode(), "an event")
            if "error" in event:
                raise UserError(f"{load.url} answers: {event['error']['message']}")
            for choice in event["choices"]:
                count = len(choice["logprobs"]["tokens"]) if choice.get("logprobs") else 1
                if first is None:
                    first, at_first = now - sent, count
                elif count:
                    gaps.append((now - last) / count)
                tokens, last = tokens + count, now
    if first is None:
        raise UserError(f"{load.url} has answered without a token")
    seconds = last - sent - first
    return _Stream(first, gaps, tokens, (tokens - at_first) / seconds if seconds > 0 else None)


def _processor_seconds(load: HttpLoad) -> dict[str, float]:
    """Of the server's parts, as far as it tells."""
    try:
        with _answer(load, "GET", "/metrics", None) as answer:
            lines = answer.read().decode().splitlines()
    except UserError:
        return {}
    name = 'lychee_cpu_seconds{part="'
    return {line[len(name) :].split('"')[0]: float(line.split()[-1]) for line in lines if line.startswith(name)}


@contextlib.contextmanager
def _answer(load: HttpLoad, method: str, path: str, body: Any) -> Iterator[http.client.HTTPResponse]:
    """The server's answer.

    Raises:
        UserError: none, or one with an error.
    """
    parts = urllib.parse.urlsplit(load.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=600)
    headers = {"content-type": "application/json"}
    if load.api_key is not None:
        headers["authorization"] = f"Bearer {load.api_key}"
    try:
        connection.request(method, path, None if body is None else json_text(body), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise UserError(f"{load.url}{path} answers {answer.status}: {answer.read(300).decode(errors='replace')}")
        yield answer
    except OSError as error:
        raise UserError(f"{load.url} cannot be reached: {error.strerror or error}") from error
    finally:
        connection.close()
