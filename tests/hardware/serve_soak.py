"""Mixed requests against one server: `PYTHONPATH=. python tests/hardware/serve_soak.py --requests 10000`.

Starts `lychee serve` with the bundled model and sends it, several at once, greedy and sampled requests of many lengths
with shared prefixes, whole and streamed, some of which are given up at a random moment, broken JSON, and readers that
do not read. Every greedy answer must equal that of an engine of its own with one row and no prefix cache, which answers
all prompts in another process while the server starts. On a GPU, where programs of different batches round
differently, an answer may leave that reference at a token whose two best were closer than 1e-2: these are counted, too.
The outcome goes to docs/results/serve_soak.json.
"""

import argparse
import asyncio
import collections
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import httpx

ROOT = Path(__file__).parents[2]
MAX_MODEL_LEN, NEW_TOKENS, AT_ONCE, PREFIXES, TAILS = 2048, 48, 24, 8, 12
CACHE_MEMORY = "0.4"  # GiB
NEAR_TIE = 1e-2  # between the log-probabilities of the two best tokens
SLOW_SECONDS = 10
JSON = {"content-type": "application/json"}


@dataclasses.dataclass(frozen=True)
class Known:
    """A prompt, the text of its first 0, 1, 2 … greedy tokens, and how far the second best lay behind each of them."""

    prompt: str
    texts: list[str]
    margins: list[float]

    def judge(self, text: str, count: int, *, exact: bool) -> str:
        """What an answer of `count` tokens is."""
        if text == self.texts[count]:
            return "equal"
        # Up to the first token that does not begin this answer.
        common = next(length for length in range(count, -1, -1) if text.startswith(self.texts[length]))
        near = not exact and min(self.margins[: common + 1]) < NEAR_TIE
        return "left at a near tie" if near else "unequal"


def write_reference(seed: int, target: Path) -> None:
    """Prompts that share prefixes, and their greedy answers by an engine that serves one at a time; and the device."""
    import jax

    import lychee_jax
    from lychee_jax.engine.options import EngineOptions
    from lychee_jax.text.streaming import text_of

    rng = random.Random(seed)
    llm = lychee_jax.load()
    # A cache of one size: each that grows would compile everything anew.
    llm.engine_options = EngineOptions(
        max_num_seqs=1, max_model_len=MAX_MODEL_LEN, cache_memory=64 << 20, prefix_cache=False
    )
    facts = [f"The passkey of number {n} is {rng.randrange(10**5):05}. " for n in range(PREFIXES)]
    prompts = [
        fact * rng.randrange(1, 60) + f"It is {rng.randrange(24)} in town {tail}. "
        for fact in facts
        for tail in range(TAILS)
    ]
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    options = llm.options(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    tokens: list[list[int]] = [[] for _ in prompts]
    margins: list[list[float]] = [[] for _ in prompts]
    for row, output in llm.stream_tokens([tokenizer.encode(each) for each in prompts], options, top_logprobs=2):
        tokens[row] += output.tokens
        margins[row] += [first - second for (_, first), (_, second) in output.top]
    known = [
        Known(prompt, [text_of(tokenizer, own[:count]) for count in range(NEW_TOKENS + 1)], gaps)
        for prompt, own, gaps in zip(prompts, tokens, margins, strict=True)
    ]
    device = {"platform": jax.default_backend(), "device": jax.devices()[0].device_kind, "jax": jax.__version__}
    target.write_text(json.dumps(device | {"known": [dataclasses.asdict(each) for each in known]}))


class Soak:
    """One run; `outcomes` counts what became of the requests."""

    def __init__(self, url: str, known: list[Known], seed: int, *, exact: bool):
        self.url, self.known, self.exact = url, known, exact
        self.rng = random.Random(seed)
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.client = httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=None))

    async def run(self, requests: int, watch: Any) -> None:
        """Send all of them."""
        numbers = iter(range(requests))

        async def some() -> None:
            for number in numbers:
                watch(number)
                try:
                    await self.one()
                except (httpx.HTTPError, OSError) as error:
                    print(f"request {number}: {error!r}", flush=True)
                    self.outcomes["failed"] += 1

        await asyncio.gather(*(some() for _ in range(AT_ONCE)))
        await self.client.aclose()

    async def one(self) -> None:
        """A request of some kind."""
        rng, known = self.rng, self.rng.choice(self.known)
        count = rng.randrange(1, NEW_TOKENS + 1)
        body: dict[str, Any] = {
            "prompt": known.prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True,
            "stream": rng.random() < 0.5,
        }  # fmt: skip
        kind = rng.choices(["greedy", "sampled", "given up", "broken", "slow"], [60, 20, 15, 4, 1])[0]
        if kind == "sampled":
            body |= {"temperature": 0.9, "top_p": 0.9, "n": rng.randrange(1, 4), "logprobs": 2}
        if kind == "broken":
            answer = await self.client.post("/v1/completions", content=json.dumps(body)[:-9].encode(), headers=JSON)
            self.outcomes["refused" if answer.status_code == 400 else "broken JSON taken"] += 1
        elif kind == "slow":
            await self.slow(body | {"max_tokens": 600, "logprobs": 20, "stream": True})
        elif kind == "given up":
            try:
                async with asyncio.timeout(rng.random() * 2):
                    text = await self.text(body)
                self.outcomes[known.judge(text, count, exact=self.exact)] += 1
            except TimeoutError:
                self.outcomes["given up"] += 1
        else:
            text = await self.text(body)
            self.outcomes["sampled" if kind == "sampled" else known.judge(text, count, exact=self.exact)] += 1

    async def text(self, body: dict[str, Any]) -> str:
        """The text of a request's first choice."""
        if not body["stream"]:
            answer = await self.client.post("/v1/completions", json=body)
            answer.raise_for_status()
            return answer.json()["choices"][0]["text"]
        pieces = []
        async with self.client.stream("POST", "/v1/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    choice = json.loads(line[6:])["choices"][0]
                    pieces += [choice["text"]] if choice["index"] == 0 else []
        return "".join(pieces)

    async def slow(self, body: dict[str, Any]) -> None:
        """Ask, read nothing for a while, and go."""
        reader, writer = await asyncio.open_connection("127.0.0.1", int(self.url.rsplit(":", 1)[1]), limit=1024)
        data = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
        )
        writer.write(head.encode() + b"\r\n\r\n" + data)
        await writer.drain()
        await reader.read(1)
        await asyncio.sleep(SLOW_SECONDS)
        writer.transport.abort()
        self.outcomes["slow reader"] += 1


class Process:
    """The server's process, as the system sees it, and its metrics."""

    def __init__(self, log: IO[bytes]):
        self._log = log
        # Room for all sequences and some prefixes: pages are taken from one another.
        options = ["--port", "0", "--max-model-len", str(MAX_MODEL_LEN), "--cache-memory", CACHE_MEMORY]
        self._process = subprocess.Popen([sys.executable, "-m", "lychee_jax", "serve", *options], stderr=log, cwd=ROOT)
        self.url = self._ready()
        self._settle()

    def _ready(self) -> str:
        """Wait until it answers; its address."""
        while self._process.poll() is None:
            time.sleep(0.2)
            for line in Path(self._log.name).read_text().splitlines():
                if " is ready on http" in line:
                    return line.split()[-1]
        raise SystemExit(f"the server has ended:\n{Path(self._log.name).read_text()}")

    def _settle(self) -> None:
        """Wait until nothing is compiled in the background any more."""
        while True:
            spent = self.metric('lychee_cpu_seconds{part="process"}')
            time.sleep(5)
            if self.metric('lychee_cpu_seconds{part="process"}') - spent < 0.5:
                return

    @property
    def memory(self) -> int:
        """Bytes that are resident."""
        pages = Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    @property
    def threads(self) -> int:
        """How many there are."""
        return len(list(Path(f"/proc/{self._process.pid}/task").iterdir()))

    def metric(self, name: str) -> float:
        """A number of /metrics."""
        lines = httpx.get(self.url + "/metrics", timeout=60).text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(name + " "))

    def wait_until_idle(self) -> None:
        """Wait until all that was given up is forgotten, a minute at most."""
        for _ in range(60):
            if not self.metric("lychee_pages_owned") + self.metric("lychee_sequences_running"):
                return
            time.sleep(1)

    def end(self) -> int:
        """The exit status after SIGTERM."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(60)


def main() -> None:
    """Run it, and write down what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "serve_soak.json")
    parser.add_argument("--reference", type=Path, help="write the reference there, and nothing else")
    arguments = parser.parse_args()
    if arguments.reference is not None:
        write_reference(arguments.seed, arguments.reference)
        return
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile() as log:
        target = Path(folder) / "reference.json"
        # A process of its own, which compiles while the server does.
        command = [sys.executable, __file__, "--reference", str(target), "--seed", str(arguments.seed)]
        with subprocess.Popen(command, cwd=ROOT) as referee:
            server = Process(log)
            print(f"server: {time.perf_counter() - started:.0f} s", flush=True)
        if referee.returncode:
            raise SystemExit("there is no reference")
        reference = json.loads(target.read_text())
        known = [Known(**each) for each in reference["known"]]
        print(f"reference: {time.perf_counter() - started:.0f} s", flush=True)
        soak = Soak(server.url, known, arguments.seed, exact=reference["platform"] == "cpu")
        memory: list[int] = []
        threads: list[int] = []
        tasks = server.metric("lychee_tasks")

        def watch(number: int) -> None:
            if number % max(1, arguments.requests // 100) == 0:
                memory.append(server.memory)
                threads.append(server.threads)
                if number % max(1, arguments.requests // 20) == 0:
                    print(f"{number}: {memory[-1] >> 20} MiB, {dict(soak.outcomes)}", flush=True)

        began = time.perf_counter()
        asyncio.run(soak.run(arguments.requests, watch))
        seconds = time.perf_counter() - began
        server.wait_until_idle()
        owned, left = server.metric("lychee_pages_owned"), server.metric("lychee_sequences_running")
        more_tasks, last_threads = server.metric("lychee_tasks") - tasks, server.threads
        status = server.end()
    tenth = max(1, len(memory) // 10)
    second, last = max(memory[tenth : 2 * tenth]), max(memory[-tenth:])
    outcomes = dict(soak.outcomes)
    targets = [
        ("requests", sum(outcomes.values()), 10_000, ">="),
        ("greedy answers that differ from those of an engine of their own", outcomes.get("unequal", 0), 0, "<="),
        ("requests that failed", outcomes.get("failed", 0), 0, "<="),
        ("broken requests that were taken", outcomes.get("broken JSON taken", 0), 0, "<="),
        ("pages owned at the end", owned, 0, "<="),
        ("sequences left at the end", left, 0, "<="),
        ("tasks of the event loop at the end, beyond those at the start", more_tasks, 0, "<="),
        ("threads at the end, beyond the most in the second tenth", last_threads - max(threads[:2 * tenth]), 0, "<="),
        ("memory of the last tenth over that of the second", last / second, 1.05, "<="),
        ("exit status after SIGTERM", status, 0, "<="),
    ]  # fmt: skip
    row = {"outcomes": outcomes, "seconds": seconds, "memory_bytes": memory, "threads": threads}
    result = {
        "device": f"{reference['device']}, {os.cpu_count()} CPU cores",
        "jax": reference["jax"],
        "command": f"PYTHONPATH=. python tests/hardware/serve_soak.py --requests {arguments.requests}",
        "rows": [row],
        "targets": [
            {"what": what, "value": value, "target": target, "sense": sense} for what, value, target, sense in targets
        ],
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    for what, value, target, sense in targets:
        print(f"{what}: {value} ({sense} {target})")


if __name__ == "__main__":
    main()
