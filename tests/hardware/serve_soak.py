"""Mixed requests against one server: `PYTHONPATH=. python tests/hardware/serve_soak.py --requests 10000`.

Starts `lychee serve` with the bundled model and sends it, several at once, greedy and sampled requests of many lengths
with shared prefixes, whole and streamed, some of which are given up at a random moment, broken JSON, and readers that
do not read. Every greedy answer must equal that of an engine of its own with one row and no prefix cache. The outcome
goes to docs/results/serve_soak.json.
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
import time
from pathlib import Path
from typing import Any

import httpx
import jax

import lychee_jax
from lychee_jax.engine.options import EngineOptions
from lychee_jax.llm import LLM
from lychee_jax.text.streaming import text_of

ROOT = Path(__file__).parents[2]
MAX_MODEL_LEN, NEW_TOKENS, AT_ONCE, PREFIXES, TAILS = 2048, 48, 24, 8, 12
JSON = {"content-type": "application/json"}


@dataclasses.dataclass(frozen=True)
class Known:
    """A prompt, and what greedy decoding makes of it."""

    prompt: str
    tokens: list[int]


def known_prompts(rng: random.Random) -> tuple[LLM, list[Known]]:
    """Prompts that share prefixes, and their greedy answers by an engine that serves one at a time."""
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
    rows = [llm.generate(prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True).tokens[0] for prompt in prompts]
    return llm, [Known(prompt, tokens) for prompt, tokens in zip(prompts, rows, strict=True)]


class Soak:
    """One run; `outcomes` counts what became of the requests."""

    def __init__(self, url: str, llm: LLM, known: list[Known], seed: int):
        self.url, self.llm, self.known = url, llm, known
        self.rng = random.Random(seed)
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.client = httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=None))

    async def run(self, requests: int, watch: Any) -> None:
        """Send all of them."""
        numbers = iter(range(requests))

        async def some() -> None:
            for number in numbers:
                watch(number)
                await self.one()

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
                    await self.text(body)
                self.outcomes["answered"] += 1
            except TimeoutError:
                self.outcomes["given up"] += 1
        else:
            text = await self.text(body)
            if kind == "sampled":
                self.outcomes["answered"] += 1
                return
            expected = text_of(self.llm.tokenizer, known.tokens[:count])  # pyright: ignore[reportArgumentType]
            self.outcomes["equal" if text == expected else "unequal"] += 1

    async def text(self, body: dict[str, Any]) -> str:
        """The text of a request's first choice."""
        if not body["stream"]:
            answer = await self.client.post("/v1/completions", json=body)
            answer.raise_for_status()
            return answer.json()["choices"][0]["text"]
        pieces = []
        async with self.client.stream("POST", "/v1/completions", json=body) as answer:
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
        await asyncio.sleep(10)
        writer.transport.abort()
        self.outcomes["slow reader"] += 1


def resident(process: int) -> int:
    """Bytes of memory that a process has."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def threads(process: int) -> int:
    """How many threads it has."""
    return len(list(Path(f"/proc/{process}/task").iterdir()))


def metric(url: str, name: str) -> float:
    """A number of the server."""
    lines = httpx.get(url + "/metrics", timeout=60).text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(name + " "))


def main() -> None:
    """Run it, and write down what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "serve_soak.json")
    arguments = parser.parse_args()
    llm, known = known_prompts(random.Random(arguments.seed))
    command = [sys.executable, "-m", "lychee_jax", "serve", "--port", "0", "--max-model-len", str(MAX_MODEL_LEN)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url = process.stderr.readline().split()[-1]
        soak = Soak(url, llm, known, arguments.seed)
        memory: list[int] = []

        def watch(number: int) -> None:
            if number % max(1, arguments.requests // 100) == 0:
                memory.append(resident(process.pid))
                print(f"{number} of {arguments.requests}: {memory[-1] >> 20} MiB, {dict(soak.outcomes)}", flush=True)

        began = time.perf_counter()
        asyncio.run(soak.run(arguments.requests, watch))
        seconds = time.perf_counter() - began
        time.sleep(2)
        owned, left = metric(url, "lychee_pages_owned"), metric(url, "lychee_sequences_running")
        count = threads(process.pid)
        # Nothing but the threads that a served request needs is there again after one more.
        httpx.post(url + "/v1/completions", json={"prompt": "x", "max_tokens": 1}, timeout=60)
        grown = threads(process.pid) - count
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
    tenth = max(1, len(memory) // 10)
    second, last = max(memory[tenth : 2 * tenth]), max(memory[-tenth:])
    outcomes = dict(soak.outcomes)
    targets = [
        ("requests", sum(outcomes.values()), 10_000, ">="),
        ("greedy answers that differ from those of an engine of their own", outcomes.get("unequal", 0), 0, "<="),
        ("broken requests that were taken", outcomes.get("broken JSON taken", 0), 0, "<="),
        ("pages owned at the end", owned, 0, "<="),
        ("sequences left at the end", left, 0, "<="),
        ("threads that one more request adds", grown, 0, "<="),
        ("memory of the last tenth over that of the second", last / second, 1.05, "<="),
        ("exit status after SIGTERM", status, 0, "<="),
    ]
    row = {"outcomes": outcomes, "seconds": seconds, "memory_bytes": memory, "threads": count}
    result = {
        "device": str(jax.devices()[0].device_kind),
        "jax": jax.__version__,
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
