"""Log-probabilities of prompts: those of forced tokens, whatever the chunks, the company and the cache are."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.cache.pages import make_pools
from lychee_jax.config import ModelConfig
from lychee_jax.engine import programs
from lychee_jax.engine.engine import Engine
from lychee_jax.engine.options import AttentionOptions, EngineOptions
from lychee_jax.engine.outputs import RequestOutput
from lychee_jax.engine.request import Request
from lychee_jax.errors import UserError
from lychee_jax.llm import LLM
from lychee_jax.models.decoder import Decoder
from lychee_jax.models.spec import ModelSpec
from tests.support.company import collect
from tests.support.hybrid_models import small_chunks

VOCABULARY = 40
CONFIG = ModelConfig("llama", VOCABULARY, 32, 48, 2, 4, 2, 16, 512)
DENSE = AttentionOptions("dense", HeadMap(2, 2, ((0, 1), (1,))), SelectionPolicy(budget=32, sink=8, recent=8))
HYBRID = dataclasses.replace(DENSE, mode="hybrid")
LENGTHS = (1, 2, 31, 32, 33, 75)


def prompt(length: int) -> tuple[int, ...]:
    """Prompts that begin alike."""
    return tuple(np.random.default_rng(1).integers(0, VOCABULARY, length).tolist())


@pytest.fixture(scope="module")
def engine() -> Engine:
    """Seven positions have logits at a time, which divides no chunk."""
    model = LLM(Path("tiny"), CONFIG, Decoder(CONFIG, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)), None, ())
    config = small_chunks(32, batch_factor=8, prefill_rows=8, prefill_tokens=256, logit_bytes=7 * 16 * VOCABULARY)
    return Engine(model.spec, model.weights, EngineOptions(8, max_num_seqs=8, max_model_len=128), config)


def run(engine: Engine, *requests: Request) -> dict[str, RequestOutput]:
    found: dict[str, RequestOutput] = {}
    for request in requests:
        engine.add_request(request)
    while engine.has_work:
        for output in engine.step():
            if output.prompt_logprobs:
                assert len(output.tokens) == 1, "they come with the first token"
            whole = found.setdefault(output.request_id, output)
            if whole is not output:
                whole.tokens += output.tokens
                whole.logprobs += output.logprobs
                whole.top += output.top
                whole.cached_tokens = output.cached_tokens
    return found


def test_they_are_those_of_forced_tokens(engine: Engine) -> None:
    """Prompts of several chunks and of one token, beside each other and beside others that stay what they are."""
    tokens = prompt(75)
    forced = run(engine, Request("f", tokens[:1], 74, attention=DENSE, forced=tokens[1:], top_logprobs=5))["f"]
    other = Request("plain", prompt(64), 20, attention=HYBRID)
    alone = run(engine, other)["plain"]
    for count in (5, 0):
        made = [Request(str(length), prompt(length), 3, attention=HYBRID, prompt_logprobs=count) for length in LENGTHS]
        found = run(engine, *made[:3], other, *made[3:])
        for length in LENGTHS:
            reported = found[str(length)].prompt_logprobs
            assert [token for token, _, _ in reported] == list(tokens[1:length])
            np.testing.assert_allclose(
                [logprob for _, logprob, _ in reported], forced.logprobs[: length - 1], atol=1e-5
            )
            for (_, _, best), wanted in zip(reported, forced.top, strict=False):
                assert [token for token, _ in best] == [token for token, _ in wanted][:count]
                np.testing.assert_allclose([each for _, each in best], [each for _, each in wanted[:count]], atol=1e-5)
        assert found["plain"].tokens == alone.tokens
        assert found["plain"].prompt_logprobs == []


def test_such_a_prompt_is_read_whole_and_what_is_written_for_it_is_its_own(engine: Engine) -> None:
    engine.reset_prefix_cache()
    request = Request("r", prompt(75), 8, attention=HYBRID)
    scored = dataclasses.replace(request, id="s", prompt_logprobs=0)
    assert run(engine, scored)["s"].cached_tokens == 0
    first = run(engine, request)["r"]
    assert first.cached_tokens == 0, "what the other program wrote is not shared"
    again, found = run(engine, request)["r"], run(engine, scored)["s"]
    assert (again.cached_tokens, found.cached_tokens) == (64, 0)
    assert first.tokens == again.tokens == found.tokens
    assert engine.allocator is not None
    engine.allocator.check()


def test_an_aborted_prompt_leaves_nothing_to_its_successor(engine: Engine) -> None:
    whole = run(engine, Request("r", prompt(75), 2, attention=DENSE, prompt_logprobs=1))["r"].prompt_logprobs
    engine.add_request(Request("r", prompt(75)[::-1], 2, attention=DENSE, prompt_logprobs=1))
    found: dict[str, RequestOutput] = {}
    collect(engine, found, 1)
    engine.abort("r")
    assert run(engine, Request("r", prompt(75), 2, attention=DENSE, prompt_logprobs=1))["r"].finish_reason is not None
    found = run(engine, Request("r", prompt(75), 2, attention=DENSE, prompt_logprobs=1))
    assert found["r"].prompt_logprobs == whole


def test_logits_of_few_positions_exist_at_a_time() -> None:
    config = ModelConfig("llama", 20_000, 32, 48, 2, 4, 2, 16, 512)
    spec, weights = ModelSpec.abstract(config, jnp.float32)
    pools = jax.eval_shape(lambda: make_pools(config, 64, 8, np.dtype("float32")))

    def temporaries(at_once: int) -> int:
        def of(*shape: int, dtype: Any = jnp.int32) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype)

        angles = of(2, 256, 8, dtype=jnp.float32)
        lowered = programs.score_chunk.lower(
            spec, None, 2, at_once, weights, pools, of(2, 32), of(2, 256), angles, angles, of(2), of(2), of(2, 256),
            of(),
        )  # fmt: skip
        memory: Any = lowered.compile().memory_analysis()
        return memory.temp_size_in_bytes

    few, whole, logits = temporaries(8), temporaries(512), 512 * 4 * 20_000
    assert few < 0.6 * logits
    assert logits <= whole < 4 * logits, "what the runner counts with"


@pytest.mark.parametrize("count", [-1, 21])
def test_more_than_can_be_reported_is_refused(engine: Engine, count: int) -> None:
    with pytest.raises(UserError, match=f"prompt_logprobs is {count}; it must lie between 0 and 20"):
        engine.add_request(Request("r", prompt(5), 3, attention=DENSE, prompt_logprobs=count))
