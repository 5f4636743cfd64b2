"""The programs of a model on eight TPU chips, compiled by the real TPU compiler for a slice that is not here."""

import collections
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels as ops
from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.benchmarks import tpu_compiler
from lychee_jax.benchmarks.shapes import MODELS
from lychee_jax.benchmarks.step import pool_copies
from lychee_jax.benchmarks.tpu_compiler import CHIPS, compile_for
from lychee_jax.cache.pages import make_pools
from lychee_jax.engine import programs
from lychee_jax.engine.programs import DecodePlan, make_rows
from lychee_jax.engine.request import MAX_EOS_IDS
from lychee_jax.models.spec import ModelSpec
from lychee_jax.parallel.layouts import POOLS, Layout, share_of

pytestmark = [
    pytest.mark.libtpu,
    pytest.mark.slow,
    pytest.mark.skipif(not tpu_compiler.installed(), reason="libtpu, the TPU compiler, is not installed here"),
]

# The attention of Llama-3-8B; products and sampling in real widths are XLA's alone, and take the compiler's time.
CONFIG = dataclasses.replace(
    MODELS["llama-3-8b"], num_layers=2, hidden_size=512, intermediate_size=1024, vocab_size=4096
)
HEADS = HeadMap(2, 8, (tuple(range(8)), (3,)))
PAGES, PAGE = 1024, 64


def array(*shape: int, dtype: Any = jnp.int32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.fixture(scope="module")
def layout() -> Layout:
    return Layout.of(CONFIG, tpu_compiler.slice_mesh("v5e:2x4", 8), HEADS.roles)


def shapes(layout: Layout) -> tuple[ModelSpec, Any, Any]:
    spec, weights = ModelSpec.abstract(CONFIG, jnp.bfloat16, layout)
    pools = jax.eval_shape(lambda: make_pools(layout.whole(CONFIG), PAGES + 2, PAGE, jnp.bfloat16))
    return spec, weights, layout.shapes(pools, POOLS)


def messages(compiled: Any) -> dict[str, int]:
    """Collectives of a program, by kind."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= [^=]*? ({kinds})(?:-start)?\(", compiled.as_text() or "")
    return dict(collections.Counter(found))


def check_pools(compiled: Any, pools: Any) -> None:
    """A device has its share of the pools, writes them in place, and copies none."""
    share = share_of(pools[0].data)
    assert share.shape == (PAGES + 2, 1, PAGE, 256)
    assert pool_copies(compiled.as_text() or "", share) == 0
    size = 2 * (PAGES + 2) * PAGE * 256
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < size
    assert memory.alias_size_in_bytes >= len(pools) * size


def test_a_decode_block_on_eight_chips(layout: Layout) -> None:
    """One KV head a chip, dense rows beside hybrid ones. Two sums a layer and the embedding's, a summary of the logits
    and (where a row asks for more) all of them, and how many pages were read.
    """
    spec, weights, pools = shapes(layout)
    rows = jax.eval_shape(lambda: make_rows(2, CONFIG.vocab_size, MAX_EOS_IDS))
    angles = array(2, 8, CONFIG.head_dim // 2, dtype=jnp.float32)
    plan = DecodePlan(HEADS, SelectionPolicy(), 8, "mosaic_tpu", mixed=True)
    with ops.recorded() as calls:
        compiled = compile_for(
            CHIPS["v5e"], programs.decode_block, spec, plan, weights, pools, rows, array(2), array(2, PAGES // 2),
            angles, angles, array(2, 8), array(2, dtype=bool), layout=layout,
        )  # fmt: skip
    assert {name for _, name in calls} == {"mosaic_tpu"}
    assert messages(compiled) == {"all-reduce": 2 * 2 + 1 + 1, "all-gather": 2}
    check_pools(compiled, pools)


def test_a_chunk_of_a_prompt_on_eight_chips(layout: Layout) -> None:
    """Two sums a layer, and the embedding's."""
    spec, weights, pools = shapes(layout)
    angles = array(1, 512, CONFIG.head_dim // 2, dtype=jnp.float32)
    with ops.recorded() as calls:
        compiled = compile_for(
            CHIPS["v5e"], programs.prefill_chunk, spec, "mosaic_tpu", 1, weights, pools, array(1, PAGES), array(1, 512),
            angles, angles, array(1), array(1), layout=layout,
        )  # fmt: skip
    assert set(calls) == {("extend_attention", "mosaic_tpu")}
    assert messages(compiled) == {"all-reduce": 2 * 2 + 1}
    check_pools(compiled, pools)
