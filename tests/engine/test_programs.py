"""The compiled programs: what they copy, what they hold, how often they compile, and who waits for whom."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_kernels
from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.benchmarks.step import pool_copies
from lychee_jax.cache.pages import make_pools
from lychee_jax.config import ModelConfig
from lychee_jax.engine import programs
from lychee_jax.engine.compile_timer import forget_programs
from lychee_jax.engine.options import EngineConfig, EngineOptions, GenerateOptions
from lychee_jax.engine.programs import DecodePlan, make_rows
from lychee_jax.engine.request import MAX_EOS_IDS
from lychee_jax.engine.sampling_params import SamplingParams
from lychee_jax.errors import UserError
from lychee_jax.llm import LLM, engine_options
from lychee_jax.models.decoder import Decoder
from pallas_kernels.xla.prefill import causal_attention

CONFIG = ModelConfig("llama", 64, 32, 48, 3, 4, 2, 16, 4096)
POLICY = SelectionPolicy(budget=32, sink=8, recent=8)
BATCH, PAGES, PAGE = 4, 1024, 8


def make(dtype: str = "float32", seed: int = 0, config: EngineConfig | None = None) -> LLM:
    model = Decoder(CONFIG, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(seed))
    return LLM(Path("tiny"), CONFIG, model, None, (), engine_config=config)


@pytest.fixture(scope="module")
def model() -> LLM:
    return make()


def _lower_decode(model, head_map, mixed=False, kv_dtype=None):
    pools = make_pools(CONFIG, BATCH * PAGES + BATCH, PAGE, model.dtype, kv_dtype)
    rows = make_rows(16, CONFIG.vocab_size, MAX_EOS_IDS)
    angles = jnp.zeros((BATCH, 8, CONFIG.head_dim // 2))
    compiled = programs.decode_block.lower(
        model.spec, DecodePlan(head_map, POLICY, 8, None, mixed), model.weights, pools, rows,
        jnp.arange(BATCH, dtype=jnp.int32), jnp.zeros((BATCH, PAGES), jnp.int32), angles, angles,
        jnp.full((BATCH, 8), -1, jnp.int32), jnp.zeros(BATCH, bool),
    ).compile()  # fmt: skip
    return compiled, pools[0]


def _memory(compiled: Any) -> Any:
    return compiled.memory_analysis()


def _text(compiled: Any) -> str:
    return compiled.as_text() or ""


@pytest.mark.parametrize(
    ("roles", "mixed", "kv_dtype"),
    [
        ("all", False, None), ("dense", False, None), ("hybrid", False, None), ("hybrid", True, None),
        ("hybrid", True, "int8"), ("dense", False, "fp8"),
    ],
)  # fmt: skip
def test_the_decode_loop_copies_no_pool(model, roles, mixed, kv_dtype):
    head_map = {"dense": None, "hybrid": HeadMap.none(CONFIG), "all": HeadMap.all(CONFIG)}[roles]
    compiled, pool = _lower_decode(model, head_map, mixed, kv_dtype)
    for leaf in jax.tree.leaves(pool):
        assert pool_copies(_text(compiled), leaf) == 0
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(pool))
    memory = _memory(compiled)
    assert memory.temp_size_in_bytes < size, "no temporary as large as one layer's pool"
    assert memory.alias_size_in_bytes >= CONFIG.num_layers * size, "the pools are donated"


@pytest.mark.parametrize(("program", "kv_dtype"), [("prefill", None), ("correct", None), ("prefill", "int8")])
def test_chunks_are_written_in_place_and_their_memory_does_not_follow_the_past(model, program, kv_dtype):
    def compile_at(pages):
        pools = make_pools(CONFIG, BATCH * pages + BATCH, PAGE, model.dtype, kv_dtype)
        table = jnp.zeros((BATCH, pages), jnp.int32)
        angles = jnp.zeros((BATCH, 64, CONFIG.head_dim // 2))
        starts = jnp.zeros(BATCH, jnp.int32)
        if program == "prefill":
            tokens = jnp.zeros((BATCH, 64), jnp.int32)
            lowered = programs.prefill_chunk.lower(
                model.spec, None, BATCH, model.weights, pools, table, tokens, angles, angles, starts, starts
            )
        else:
            new = jnp.zeros((64, BATCH), jnp.int32)
            lowered = programs.correct_cache.lower(
                model.spec, None, model.weights, pools, table, starts, new, starts, angles, angles, starts
            )
        return lowered.compile(), pools[0]

    (small, _), (large, pool) = compile_at(128), compile_at(1024)
    for leaf in jax.tree.leaves(pool):
        assert pool_copies(_text(large), leaf) == 0
    assert _memory(large).temp_size_in_bytes <= _memory(small).temp_size_in_bytes + BATCH * 1024 * 8


def test_whole_sequence_attention_needs_memory_linear_in_length():
    def temporaries(length):
        q = jax.ShapeDtypeStruct((1, length, 2, 2, 16), jnp.float32)
        k = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        compiled = jax.jit(lambda q, k, v: causal_attention(q, k, v, scale=0.25)).lower(q, k, k).compile()
        return _memory(compiled).temp_size_in_bytes

    assert temporaries(8192) < 2.5 * temporaries(4096)


def _count(model: LLM, options: GenerateOptions) -> int:
    runner = model.engine(engine_options(model.engine_options, options)).runner
    return runner.programs.count if runner is not None else 0


def test_prompts_of_one_bucket_share_their_programs(model):
    options = GenerateOptions(
        attention="hybrid", heads=HeadMap.none(CONFIG), policy=POLICY, page_size=PAGE, max_new_tokens=3, ignore_eos=True
    )
    rng = np.random.default_rng(0)
    counts = []
    for length in (241, 230, 235, 249):
        model.generate_tokens([rng.integers(0, 64, length).tolist()], options)
        counts.append(_count(model, options))
    assert len(set(counts)) == 1
    assert counts[0] >= 3, "prefill, the first token, a block: or this counts nothing"


def test_another_temperature_seed_filter_or_penalty_compiles_nothing(model):
    sizes = []
    for params in (
        SamplingParams(),
        SamplingParams(0.7, seed=3),
        SamplingParams(0.9, top_k=3, top_p=0.8, min_p=0.1),
        SamplingParams(repetition_penalty=1.3),
    ):
        options = GenerateOptions(policy=POLICY, page_size=PAGE, max_new_tokens=4, sampling=params)
        model.generate_tokens([list(range(20))], options)
        model.stream_tokens([list(range(20))], options, top_logprobs=5).close()
        sizes.append(_count(model, options))
    assert len(set(sizes)) == 1


def test_no_program_is_compiled_after_all_were():
    """Rows of every number and length, dense and hybrid: at most 24 programs, and a second round finds them all."""
    model = make()
    model.engine_options = EngineOptions(cache_memory=16 << 20)
    options = GenerateOptions("auto", HeadMap.none(CONFIG), POLICY, PAGE, 9)
    rng = np.random.default_rng(1)
    batches = [
        [rng.integers(0, 64, n).tolist() for n in lengths] for lengths in ((5,), (300, 40, 3), (1100, *[70] * 8))
    ]
    for batch in batches:
        model.generate_tokens(batch, options)
    known = _count(model, options)
    assert known <= 24
    for batch in batches[::-1]:
        model.generate_tokens([row[::-1] for row in batch], options)
    assert _count(model, options) == known


def test_the_host_sends_the_next_block_before_it_reads_the_last(model):
    """When the tokens of a block reach the caller, two more have been sent, as long as there are any."""
    options = GenerateOptions(policy=POLICY, page_size=PAGE, max_new_tokens=33)
    stream = model.stream_tokens([[1, 2, 3]], options)
    runner = None
    sent: list[int] = []
    received = 0
    for _, output in stream:
        if runner is None:
            runner = model.engine(options.engine).runner
        received += len(output.tokens)
        sent.append(runner.blocks_sent - (received + 7 - 1) // 8)
        if received == 33:
            break
    assert max(sent) >= 2


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []], [[64]], [[-1]], [[0] * 4094]])
def test_prompts_that_the_model_cannot_take_are_refused(model, prompts):
    with pytest.raises(UserError):
        model.check_prompts(prompts, max_new_tokens=3)


@pytest.mark.parametrize(("named", "wanted"), [("xla", "xla"), (None, None)])
def test_xla_by_name_keeps_kernels_out_of_prefill_and_correction(model, monkeypatch, named, wanted):
    """Both read many tokens over the cache, each with a program of its own."""
    asked = []
    real = pallas_kernels.extend_attention

    def watched(*args: Any, **options: Any) -> jax.Array:
        asked.append((args[0].shape[1], options["implementation"]))
        return real(*args, **options)

    jax.clear_caches()  # a program that is known is not traced again
    forget_programs()
    monkeypatch.setattr(pallas_kernels, "extend_attention", watched)
    options = GenerateOptions("dense", page_size=PAGE, max_new_tokens=8, correct_every=3, implementation=named)
    model.generate_tokens([[5] * 40], options)
    assert {length for length, _ in asked} == {64, 3}, "a chunk of the prompt, and a correction"
    assert {implementation for _, implementation in asked} == {wanted}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [576, 768, 896, 2048])
def test_a_row_of_a_product_does_not_depend_on_how_many_there_are(dtype: str, width: int):
    least = EngineConfig.of("cpu", dataclasses.replace(CONFIG, dtype=dtype)).min_rows
    rng = np.random.default_rng(width)
    rows, kernel = (jnp.asarray(rng.normal(size=(count, width)), dtype) for count in (64, 1024))
    product = jax.jit(lambda x, kernel: jax.lax.dot_general(x, kernel, (((1,), (1,)), ((), ()))))
    first = np.asarray(product(rows[:least], kernel), np.float32)
    for count in (least + 1, 4, 8, 16, 64):
        np.testing.assert_array_equal(np.asarray(product(rows[:count], kernel), np.float32)[:least], first)
