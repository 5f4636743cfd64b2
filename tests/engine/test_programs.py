"""The compiled programs: what they copy, what they hold, how often they compile, and who waits for whom."""

import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_kernels
from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.cache.pages import make_pools
from lychee_jax.config import ModelConfig
from lychee_jax.engine import engine as generate
from lychee_jax.engine import programs
from lychee_jax.engine.engine import Engine
from lychee_jax.engine.options import GenerateOptions
from lychee_jax.engine.programs import DecodePlan, Rows
from lychee_jax.engine.sampling import SamplingParams
from lychee_jax.errors import UserError
from lychee_jax.models.decoder import Decoder
from pallas_kernels.xla.prefill import causal_attention

CONFIG = ModelConfig("llama", 64, 32, 48, 3, 4, 2, 16, 4096)
POLICY = SelectionPolicy(budget=32, sink=8, recent=8)
BATCH, PAGES, PAGE = 4, 1024, 8


@pytest.fixture(scope="module")
def engine():
    return Engine(Decoder(CONFIG, rngs=nnx.Rngs(0)))


def _lower_decode(engine, head_map, program="decode"):
    pools = make_pools(CONFIG, BATCH * PAGES + BATCH, PAGE, engine.dtype)
    rows = Rows(
        jnp.zeros(BATCH, jnp.int32), jnp.full(BATCH, 100), jnp.ones(BATCH, bool), jnp.zeros(BATCH, jnp.int32), None
    )
    plan = DecodePlan(head_map, POLICY, SamplingParams().kind, 8, None)
    table = jnp.zeros((BATCH, PAGES), jnp.int32)
    angles = jnp.zeros((BATCH, 8, CONFIG.head_dim // 2))
    if program == "feed":
        steps = jnp.zeros((BATCH, 8), jnp.int32)
        compiled = programs.feed_block.lower(
            engine.spec, plan, engine.weights, pools, jnp.zeros((BATCH, CONFIG.hidden_size)), steps, rows.positions,
            jnp.full(BATCH, 8), table, angles, angles,
        ).compile()  # fmt: skip
        return compiled, pools[0].data
    compiled = programs.decode_block.lower(
        engine.spec, plan, engine.weights, pools, rows, table, angles, angles, jnp.ones(BATCH, bool),
        SamplingParams().arrays(), jnp.full(4, -1, jnp.int32), jnp.int32(8),
    ).compile()  # fmt: skip
    return compiled, pools[0].data


def _memory(compiled: Any) -> Any:
    return compiled.memory_analysis()


def _text(compiled: Any) -> str:
    return compiled.as_text() or ""


def _compiled(*jitted: Any) -> tuple[int, ...]:
    """How many programs each jitted function has compiled so far."""
    return tuple(each._cache_size() for each in jitted)


@pytest.mark.parametrize(
    ("program", "roles"), [("decode", "all"), *itertools.product(["decode", "feed"], ["dense", "hybrid"])]
)
def test_the_decode_loop_copies_no_pool(engine, program, roles):
    head_map = {"dense": None, "hybrid": HeadMap.none(CONFIG), "all": HeadMap.all(CONFIG)}[roles]
    compiled, pool = _lower_decode(engine, head_map, program)
    text = _text(compiled)
    shape = f"f32[{','.join(map(str, pool.shape))}]"
    assert shape in text, "the pool must be in the program, or this test looks for the wrong thing"
    assert not re.findall(rf"= {re.escape(shape)}\S* (?:copy|copy-start|dynamic-update-slice|transpose)\(", text)
    memory = _memory(compiled)
    assert memory.temp_size_in_bytes < pool.nbytes, "no temporary as large as one layer's pool"
    assert memory.alias_size_in_bytes >= CONFIG.num_layers * pool.nbytes, "the pools are donated"


@pytest.mark.parametrize("program", ["prefill", "correct"])
def test_chunks_are_written_in_place_and_their_memory_does_not_follow_the_past(engine, program):
    def compile_at(pages):
        pools = make_pools(CONFIG, BATCH * pages + BATCH, PAGE, engine.dtype)
        table = jnp.zeros((BATCH, pages), jnp.int32)
        tokens = jnp.zeros((BATCH, 64), jnp.int32)
        angles = jnp.zeros((1, 64, CONFIG.head_dim // 2))
        starts = jnp.zeros(BATCH, jnp.int32)
        if program == "prefill":
            lowered = programs.prefill_chunk.lower(
                engine.spec,
                engine.weights,
                pools,
                table,
                tokens,
                angles,
                angles,
                starts,
                starts,
            )
        else:
            lowered = programs.correct_cache.lower(
                engine.spec, engine.weights, pools, table, tokens, angles, angles, starts, jnp.ones(BATCH, bool)
            )
        return lowered.compile(), pools[0].data

    (small, _), (large, pool) = compile_at(128), compile_at(1024)
    shape = f"f32[{','.join(map(str, pool.shape))}]"
    assert not re.findall(rf"= {re.escape(shape)}\S* (?:copy|copy-start)\(", _text(large))
    assert _memory(large).temp_size_in_bytes <= _memory(small).temp_size_in_bytes + BATCH * 1024 * 8


def test_whole_sequence_attention_needs_memory_linear_in_length():
    def temporaries(length):
        q = jax.ShapeDtypeStruct((1, length, 2, 2, 16), jnp.float32)
        k = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        compiled = jax.jit(lambda q, k, v: causal_attention(q, k, v, scale=0.25)).lower(q, k, k).compile()
        return _memory(compiled).temp_size_in_bytes

    assert temporaries(8192) < 2.5 * temporaries(4096)


def test_prompts_of_one_bucket_share_their_programs(engine):
    options = GenerateOptions(
        attention="hybrid", heads=HeadMap.none(CONFIG), policy=POLICY, page_size=PAGE, max_new_tokens=3, ignore_eos=True
    )
    rng = np.random.default_rng(0)
    counts = []
    for length in (241, 230, 235, 249):
        engine.generate([rng.integers(0, 64, length).tolist()], options)
        counts.append(_compiled(programs.prefill_chunk, programs.first_token, programs.decode_block))
    assert len(set(counts)) == 1


def test_another_temperature_or_seed_compiles_nothing(engine):
    prompt = [list(range(20))]
    sizes = []
    for temperature, seed in ((0.7, 0), (0.9, 1), (1.3, 5)):
        options = GenerateOptions(
            policy=POLICY, page_size=PAGE, max_new_tokens=4, sampling=SamplingParams(temperature=temperature, seed=seed)
        )
        engine.generate(prompt, options)
        sizes.append(_compiled(programs.decode_block))
    assert len(set(sizes)) == 1


def test_the_host_sends_the_next_block_before_it_reads_the_last(engine, monkeypatch):
    events = []
    send, receive = generate.Stream._send, generate.Stream._receive

    def logged_send(self, rows, first, count, size):
        events.append(("send", first))
        return send(self, rows, first, count, size)

    def logged_receive(self, first, count, blocks):
        events.append(("read", first))
        return receive(self, first, count, blocks)

    monkeypatch.setattr(generate.Stream, "_send", logged_send)
    monkeypatch.setattr(generate.Stream, "_receive", logged_receive)
    engine.generate([[1, 2, 3]], GenerateOptions(policy=POLICY, page_size=PAGE, max_new_tokens=33))
    sends = [first for kind, first in events if kind == "send"]
    reads = [first for kind, first in events if kind == "read"]
    assert reads == [0, *sends]
    for index, first in enumerate(sends[:-1]):
        assert events.index(("send", sends[index + 1])) < events.index(("read", first))


def test_a_consumer_sees_the_first_token_before_any_decode_step_is_sent(engine, monkeypatch):
    sent = []
    send = generate.Stream._send
    monkeypatch.setattr(generate.Stream, "_send", lambda self, *args: sent.append(1) or send(self, *args))
    stream = engine.stream([[1, 2, 3]], GenerateOptions(policy=POLICY, page_size=PAGE, max_new_tokens=9))
    assert next(stream).index == 0
    assert not sent
    assert [step.index for step in stream] == list(range(1, 9))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_comes_out_the_same_alone_and_in_company(dtype):
    """To the bit of every token: rounding of the storage type must not depend on the other rows of a batch."""
    small = Engine(Decoder(CONFIG, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(1)))
    options = GenerateOptions(
        attention="hybrid", heads=HeadMap.none(CONFIG), policy=POLICY, page_size=PAGE, max_new_tokens=24
    )
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 64, length).tolist() for length in (1, 40, 64, 129)]
    together = small.generate(prompts, options)
    for prompt, tokens, logprobs in zip(prompts, together.tokens, together.logprobs, strict=True):
        alone = small.generate([prompt], options)
        assert alone.tokens[0] == tokens
        np.testing.assert_allclose(alone.logprobs[0], logprobs, atol=2e-6)


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []], [[64]], [[-1]], [[0] * 4094]])
def test_prompts_that_the_model_cannot_take_are_refused(engine, prompts):
    with pytest.raises(UserError):
        engine.check_prompts(prompts, max_new_tokens=3)


@pytest.mark.parametrize(("named", "wanted"), [("xla", "xla"), (None, None)])
def test_xla_by_name_keeps_kernels_out_of_prefill_and_correction(engine, monkeypatch, named, wanted):
    """Both read many tokens over the cache, each with a program of its own."""
    asked = []
    real = pallas_kernels.extend_attention

    def watched(*args: Any, **options: Any) -> jax.Array:
        asked.append((args[0].shape[1], options["implementation"]))
        return real(*args, **options)

    jax.clear_caches()  # a program that is known is not traced again
    monkeypatch.setattr(pallas_kernels, "extend_attention", watched)
    options = GenerateOptions("dense", page_size=PAGE, max_new_tokens=8, correct_every=3, implementation=named)
    engine.generate([[5] * 40], options)
    assert {length for length, _ in asked} == {64, 3}, "a chunk of the prompt, and a correction"
    assert {implementation for _, implementation in asked} == {wanted}
