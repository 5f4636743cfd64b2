"""Requests alone and in company, as a program of its own: the tests compile with flags of their own, users do not.

`python -m tests.support.company SHAPE DTYPE` prints, as JSON, how many requests were compared and what differed.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.config import ModelConfig
from lychee_jax.engine.engine import Engine
from lychee_jax.engine.options import AttentionOptions, EngineConfig, EngineOptions
from lychee_jax.engine.outputs import RequestOutput
from lychee_jax.engine.request import Request
from lychee_jax.engine.sampling_params import SamplingParams
from lychee_jax.llm import LLM
from lychee_jax.models.decoder import Decoder
from tests.support.grammars import EvenThenEnd

SHAPES = {
    "bundled": ModelConfig("llama", 512, 256, 768, 2, 8, 4, 64, 4096, tie_word_embeddings=True),
    "smollm2": ModelConfig("llama", 512, 576, 1536, 2, 9, 3, 64, 4096, tie_word_embeddings=True),
}
PAGE, NEW = 16, 14
POLICY = SelectionPolicy(budget=64, sink=16, recent=16)
# Two sizes of batches and one of tables: each more is a program more to compile.
CONFIG = EngineConfig(
    ((1 << 40, 32),), 32, min_rows=2, correct_rows=1, dense_below=120, batch_factor=8, table_factor=1 << 20
)
SAMPLING = (
    SamplingParams(),
    SamplingParams(0.8, top_p=0.9, seed=5),
    SamplingParams(repetition_penalty=1.3, frequency_penalty=0.2, logit_bias=((3, 0.5),)),
)


def requests(model: ModelConfig) -> list[Request]:
    """Prompts of all lengths around pages and chunks, half of which begin alike; every attention mode and sampling."""
    rng = np.random.default_rng(7)
    common = rng.integers(0, model.vocab_size, 96).tolist()
    heads = HeadMap.none(model)
    made = []
    for index, length in enumerate((1, 15, 16, 33, 64, 97, 129, 200, 130, 110, 161, 100)):
        own = rng.integers(0, model.vocab_size, length).tolist()
        prompt = (common + own)[:length] if index % 2 and length > 96 else own
        mode = ("hybrid", "auto", "dense")[index % 3]
        made.append(
            Request(
                f"r{index}", tuple(prompt), NEW, SAMPLING[index // 3 % 3],
                AttentionOptions("dense" if mode == "dense" else mode, heads, POLICY), sample_index=index % 4,
            )
        )  # fmt: skip
    return made


def collect(engine: Engine, into: dict[str, RequestOutput], steps: int | None = None) -> None:
    """Step the engine, to its end or so many times, and join what comes for each request."""
    while engine.has_work and steps != 0:
        for output in engine.step():
            whole = into.setdefault(output.request_id, RequestOutput(output.request_id))
            whole.tokens += output.tokens
            whole.logprobs += output.logprobs
            whole.top += output.top
            whole.cached_tokens = output.cached_tokens  # each output tells the whole number
            whole.finish_reason = output.finish_reason or whole.finish_reason
        steps = None if steps is None else steps - 1


def main() -> None:
    """Compare."""
    name, dtype, correct_every = sys.argv[1], sys.argv[2], int(sys.argv[3])
    config = SHAPES[name]
    model = LLM(Path(name), config, Decoder(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)), None, ())
    options = EngineOptions(PAGE, correct_every=correct_every, cache_memory=1 << 28, max_model_len=1024)
    engine = Engine(model.spec, model.weights, options, CONFIG)
    made = requests(config)
    alone: dict[str, RequestOutput] = {}
    for request in made:
        engine.add_request(request)
        collect(engine, alone)
        engine.reset_prefix_cache()

    # Company: some arrive late, into slots and pages of others that were aborted, and find prefixes in the cache.
    together: dict[str, RequestOutput] = {}
    rng = np.random.default_rng(0)
    for index in range(4):
        filler = tuple(rng.integers(0, config.vocab_size, 40 + 30 * index).tolist())
        if index == 0:  # a page that others begin with, but read by a smaller program
            filler = made[5].prompt[:PAGE]
        # The last one is guided, so that others decode step by step beside it.
        grammar = EvenThenEnd(config.vocab_size, 100, 1) if index == 3 and not correct_every else None
        engine.add_request(Request(f"filler{index}", filler, 40, attention=made[index].attention, grammar=grammar))
    collect(engine, together, 3)
    for request in made[:5]:
        engine.add_request(request)
    collect(engine, together, 2)
    for index in range(3):
        engine.abort(f"filler{index}")
    for request in made[5:]:
        engine.add_request(request)
        collect(engine, together, 1)
    collect(engine, together)

    differ = [request.id for request in made if together[request.id].tokens != alone[request.id].tokens]
    gaps = [
        float(np.max(np.abs(np.subtract(together[request.id].logprobs, alone[request.id].logprobs))))
        for request in made
        if request.id not in differ
    ]
    allocator = engine.allocator
    assert allocator is not None
    allocator.check()
    print(
        json.dumps(
            {
                "requests": len(made),
                "differ": differ,
                "gap": max(gaps, default=0.0),
                "cached": sum(together[request.id].cached_tokens for request in made),
                "lengths": sorted({len(together[request.id].tokens) for request in made}),
                "aborted": [together[f"filler{index}"].finish_reason for index in range(4)],
                "owned": allocator.num_owned,
                "platform": jax.default_backend(),
            }
        )
    )


if __name__ == "__main__":
    main()
