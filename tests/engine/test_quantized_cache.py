"""Generation over a quantised cache: what the oracle says of the stored numbers, whatever the company."""

from collections.abc import Iterator

import jax
import numpy as np
import pytest

import pallas_kernels
from lychee_jax.engine.kernel_support import refuse_uncovered
from lychee_jax.engine.options import EngineOptions, check_kv_dtype
from lychee_jax.errors import UserError
from pallas_kernels.types import KVDtype
from tests.support import oracle, quantized
from tests.support.hybrid_models import BUDGET, NEW, make_model, run, small_chunks

KINDS = pytest.mark.parametrize("kind", ["int8", "fp8"])
# Prompts go in chunks of two pages; what begins alike is found again.
CONFIG = small_chunks(2 * BUDGET.page_size)


@pytest.fixture(autouse=True, scope="module")
def _compile_fast() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@KINDS
def test_hybrid_decoding_is_the_oracles_of_what_is_stored(kind: KVDtype) -> None:
    """Prefill, too: other chunks than the oracle's one, and all attend to the stored keys and values of their own."""
    model, weights = make_model(BUDGET, engine_config=CONFIG)
    judge = oracle.Oracle(weights, BUDGET.config, BUDGET.page_size, lambda x: quantized.store(x, kind).read)
    plain = oracle.Oracle(weights, BUDGET.config, BUDGET.page_size)
    result = run(model, BUDGET.prompts, BUDGET.options(kv_dtype=kind, correct_every=5))
    for row in (0, len(BUDGET.prompts) - 1):
        asked = {"retrieval": BUDGET.retrieval, "rule": BUDGET.rule, "feed": result.tokens[row], "correct_every": 5}
        want = judge.generate(BUDGET.prompts[row], NEW, **asked)
        # A number between two of 8 bits may be rounded either way.
        np.testing.assert_allclose(result.logprobs[row], want.logprobs, atol=5e-3)
    other = plain.generate(BUDGET.prompts[-1], NEW, **asked)
    assert np.abs(np.subtract(want.logprobs, other.logprobs)).max() > 0.05, "another seed: quantisation must matter"


@KINDS
def test_tokens_are_those_of_the_request_alone_and_prefixes_are_reused(kind: KVDtype) -> None:
    model, _ = make_model(BUDGET, engine_config=CONFIG)
    options = BUDGET.options(kv_dtype=kind, correct_every=5)
    longest = BUDGET.prompts[-1]
    prompts = [*BUDGET.prompts[1:], [*longest[:20], 3, 1, 4]]
    alone = [run(model, [prompt], options) for prompt in prompts]
    together = run(model, prompts, options)
    assert together.tokens == [result.tokens[0] for result in alone]
    assert together.logprobs == [result.logprobs[0] for result in alone]
    again = model.generate_tokens(prompts[-2:], options)
    assert again.tokens == together.tokens[-2:]
    assert again.logprobs == together.logprobs[-2:]
    assert again.cached_tokens == [24, 16]


def test_another_kv_dtype_is_another_engine_with_smaller_pages() -> None:
    model, _ = make_model(BUDGET)
    sizes = {}
    for kind in (None, "int8", "fp8"):
        engine = model.engine(EngineOptions(BUDGET.page_size, kv_dtype=kind, cache_memory=1 << 20, max_model_len=120))
        sizes[kind] = engine.page_bytes
        assert engine.max_tokens == 120
    layers, heads, page, width = 3, BUDGET.kv_heads, BUDGET.page_size, BUDGET.head_dim
    assert sizes == {
        None: layers * heads * page * 2 * width * 4,
        "int8": layers * heads * page * (2 * width + 2 * 4),
        "fp8": layers * heads * page * 2 * width,
    }


def test_a_kv_dtype_that_does_not_exist_is_told() -> None:
    with pytest.raises(UserError, match="kv_dtype is 'int4'; use int8 or fp8, or none at all"):
        check_kv_dtype("int4")
    for kind in (None, "int8", "fp8"):
        check_kv_dtype(kind)


@KINDS
@pytest.mark.parametrize("name", ["mosaic_gpu"])
def test_named_kernels_say_before_anything_is_read_what_they_do_not_cover(name: str, kind: KVDtype) -> None:
    with (
        pallas_kernels.interpreted(name),
        pytest.raises(NotImplementedError, match=f"not float32 over {kind}"),
    ):
        refuse_uncovered(
            name, BUDGET.config, np.dtype("float32"), BUDGET.policy, batch=1, pages=4, page_size=BUDGET.page_size,
            kv_dtype=kind,
        )  # fmt: skip
