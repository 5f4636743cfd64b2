"""Everything that runs on a TPU, compiled by the real TPU compiler for chips that are not here.

Shapes only, no weights: what is looked at is whether it compiles, what it holds in memory, and what it copies.
"""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from lychee_jax.attention.decode import Decode
from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.benchmarks import tpu_compiler
from lychee_jax.benchmarks.shapes import MODELS
from lychee_jax.benchmarks.step import pool_copies
from lychee_jax.benchmarks.tpu_compiler import CHIPS, Chip, compile_for
from lychee_jax.cache.allocator import pages_for
from lychee_jax.cache.pages import Pools, make_pools
from lychee_jax.config import ModelConfig
from lychee_jax.engine import programs
from lychee_jax.engine.options import max_pages
from lychee_jax.engine.programs import DecodePlan, make_rows
from lychee_jax.engine.request import MAX_EOS_IDS
from lychee_jax.models.spec import ModelSpec
from pallas_kernels import KVPages, Selection, SelectionSpec
from pallas_kernels.types import KVDtype

pytestmark = [
    pytest.mark.libtpu,
    pytest.mark.skipif(not tpu_compiler.installed(), reason="libtpu, the TPU compiler, is not installed here"),
]

PAGE = 64


def array(*shape: int, dtype: Any = jnp.int32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


V6E, V5P, V5E = "v6e", "v5p", "v5e"


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize(
    ("one_core", "batch", "kv_heads", "group", "head_dim", "page_size", "context", "dtype", "kv_dtype"),
    [
        (V6E, 1, 8, 4, 128, 64, 131072, "bfloat16", None),
        (V5E, 3, 4, 7, 128, 16, 4096, "bfloat16", None),
        (V6E, 64, 2, 8, 128, 128, 8192, "float32", None),
        (V5E, 2, 32, 1, 128, 32, 16384, "bfloat16", None),
        (V6E, 1, 4, 2, 64, 64, 1 << 20, "bfloat16", None),
        (V5E, 1, 4, 2, 64, 16, 1 << 20, "float32", None),
        (V5E, 3, 8, 4, 128, 64, 65536, "bfloat16", "int8"),
        (V6E, 1, 4, 7, 128, 128, 131072, "float32", "int8"),
        (V6E, 1, 8, 4, 128, 64, 131072, "bfloat16", "fp8"),
        (V5E, 2, 4, 2, 64, 16, 16384, "float32", "fp8"),
    ],
)  # fmt: skip
def test_every_op_compiles(
    cores: int, one_core: str, batch: int, kv_heads: int, group: int, head_dim: int, page_size: int, context: int,
    dtype: str, kv_dtype: KVDtype | None,
) -> None:  # fmt: skip
    """Through `hybrid_decode`, which is made of the other three: the roles of one layer with an odd number of heads.

    On v5p two cores share the work; chips of one core get the same code, and take turns with the shapes.
    Batches mix dense with hybrid rows, and get their heads while they run; a single row knows them before.
    """
    chip = CHIPS[one_core if cores == 1 else V5P]
    assert chip.cores == cores
    pages, budget = context // page_size, 4096 // page_size

    def layer(q: Any, kv: Any, table: Any, lengths: Any, chosen: Any, counts: Any, heads: Any, dense: Any) -> Any:
        mixed = {"dense": dense} if batch > 1 else {}
        return ops.hybrid_decode(
            q, kv, table, lengths, Selection(chosen, counts),
            heads if batch > 1 else np.array([kv_heads - 1], np.int32), SelectionSpec(budget, 2, 4),
            scale=head_dim**-0.5, implementation="mosaic_tpu", **mixed,
        )  # fmt: skip

    config = ModelConfig("llama", 64, 64, 64, 1, kv_heads * group, kv_heads, head_dim, context)
    num_pages = min(batch * pages, 1 << 16) + batch
    (pool,) = jax.eval_shape(lambda: make_pools(config, num_pages, page_size, dtype, kv_dtype))
    with ops.recorded() as calls:
        compiled = compile_for(
            chip, jax.jit(layer), array(batch, kv_heads, group, head_dim, dtype=dtype), pool, array(batch, pages),
            array(batch), array(batch, kv_heads, budget), array(batch, kv_heads), array(2 if batch > 2 else 1),
            array(batch, dtype=bool),
        )  # fmt: skip
    assert calls == [("hybrid_decode", "mosaic_tpu")]
    text = compiled.as_text() or ""
    for name in ("dense_decode", "sparse_decode", "select_pages"):
        assert re.search(rf"{name}\S* = \(?\S+ .*custom-call\(", text), f"no {name} kernel in the program"
    check_memory(chip, compiled, pool, 0)


@pytest.mark.parametrize("chip", [CHIPS["v5e"], CHIPS["v5p"]], ids=["v5e", "v5p"])
def test_ops_with_log_sum_exps_compile(chip: Chip) -> None:
    """Three heads, of which one may be none: on v5p two cores split the context of dense heads."""

    def both(q: Any, pool: Any, table: Any, lengths: Any, chosen: Any, counts: Any, heads: Any) -> Any:
        options: Any = {"scale": 64**-0.5, "return_lse": True, "implementation": "mosaic_tpu"}
        kv, selection = KVPages(pool), Selection(chosen, counts)
        return (
            ops.dense_decode(q, kv, table, lengths, heads, page_scores="lse", **options),
            ops.sparse_decode(q, kv, table, lengths, selection, heads, **options),
        )

    compiled = compile_for(
        chip, jax.jit(both), array(2, 4, 2, 64, dtype="bfloat16"), array(258, 4, PAGE, 128, dtype="bfloat16"),
        array(2, 128), array(2), array(2, 4, 16), array(2, 4), array(3),
    )  # fmt: skip
    (_, _, dense), (_, sparse) = compiled.out_info
    assert dense.shape == sparse.shape == (2, 3, 2)


def size_of(arrays: Any) -> int:
    """Bytes of all arrays together."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))


def check_memory(
    chip: Chip, compiled: Any, kv: KVPages, donated: int, temporaries: int | None = None, beside: int = 0
) -> None:
    """It fits the chip, `beside` bytes that are no arguments included, all temporaries together are smaller than a
    pool (or `temporaries` bytes), and pools are only ever written in place.
    """
    memory, size = compiled.memory_analysis(), size_of(kv)
    assert memory.temp_size_in_bytes < (temporaries or size)
    assert memory.alias_size_in_bytes >= donated * size
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert beside + held + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes <= chip.memory
    names = {"bfloat16": "bf16", "float32": "f32", "uint16": "u16"}
    text = compiled.as_text()
    for leaf in jax.tree.leaves(kv):
        shape = f"{names[leaf.dtype.name]}[{','.join(map(str, leaf.shape))}]"
        assert shape in text, "the pool must be in the program, or this looks for the wrong thing"
        # Also as part of a tuple, as asynchronous copies have it.
        made = re.findall(rf"= \(?[^=]*?{re.escape(shape)}[^=]*? ([a-z][a-z0-9-]*)\(", text)
        assert set(made) <= {"parameter", "get-tuple-element", "bitcast", "fusion", "scatter", "while", "tuple"}
        assert made.count("scatter") == donated
        assert made.count("fusion") == donated, "only the fusions around the scatters"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "model", "batch", "context"),
    [
        # Every chip, one row and several: what a whole program adds to its ops is the same in the others.
        (V6E, "qwen3-8b", 1, 65536),
        (V5P, "qwen2.5-7b", 4, 131072),
        (V5E, "qwen2.5-3b", 4, 32768),
    ],
)
def test_the_decode_loop_compiles_and_copies_nothing(chip: str, model: str, batch: int, context: int) -> None:
    """One retrieval head a layer, as learned maps have it, and all of them in layer 0; batches with dense rows."""
    check_decode(CHIPS[chip], narrow(MODELS[model]), batch, context, hybrid=True)


SMALL_8B = dataclasses.replace(MODELS["llama-3-8b"], quantize="int8", max_position_embeddings=1 << 18)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "config", "context", "hybrid", "kv_dtype"),
    [
        (V5E, MODELS["bundled"], 65536, True, None),
        (V5E, SMALL_8B, 65536, True, "int8"),
        (V6E, SMALL_8B, 1 << 18, False, "fp8"),
    ],
    ids=["bundled", "llama-3-8b at 64 K", "llama-3-8b at 256 K"],
)
def test_a_whole_model_compiles_and_fits(
    chip: str, config: ModelConfig, context: int, hybrid: bool, kv_dtype: KVDtype | None
) -> None:
    """All of its layers in their real width; with weights and a cache of 8 bits in a chip that holds them just so."""
    check_decode(CHIPS[chip], config, 1, context, hybrid=hybrid, kv_dtype=kv_dtype)


def narrow(config: ModelConfig) -> ModelConfig:
    """Two layers with a model's attention, pools and kernels: it is products and sampling in real widths, which are
    XLA's alone, and layers like others that take the compiler's time.
    """
    return dataclasses.replace(config, num_layers=2, hidden_size=512, intermediate_size=1024, vocab_size=4096)


def abstract(
    config: ModelConfig, batch: int, context: int, kv_dtype: KVDtype | None = None
) -> tuple[ModelSpec, Any, Pools, Any]:
    """A model, its weights, its pools and its page table, as shapes."""
    spec, weights = ModelSpec.abstract(config, jnp.bfloat16)
    num_pages = batch * (pages_for(context, PAGE) + 1)
    pools = jax.eval_shape(lambda: make_pools(config, num_pages, PAGE, jnp.bfloat16, kv_dtype))
    return spec, weights, pools, array(batch, max_pages(context, PAGE))


def check_decode(
    chip: Chip, config: ModelConfig, batch: int, context: int, *, hybrid: bool, kv_dtype: KVDtype | None = None
) -> None:
    spec, weights, pools, table = abstract(config, batch, context, kv_dtype)
    roles = None
    if hybrid:
        every = tuple(range(config.num_kv_heads))
        rest = tuple((layer % config.num_kv_heads,) for layer in range(1, config.num_layers))
        roles = HeadMap(config.num_layers, config.num_kv_heads, (every, *rest))
    plan = DecodePlan(roles, SelectionPolicy(), 8, "mosaic_tpu", mixed=hybrid and batch > 1)
    rows = jax.eval_shape(lambda: make_rows(batch, config.vocab_size, MAX_EOS_IDS))
    angles = array(batch, 8, config.head_dim // 2, dtype=jnp.float32)
    with ops.recorded() as calls:
        compiled = compile_for(
            chip, programs.decode_block, spec, plan, weights, pools, rows, array(batch), table, angles, angles,
            array(batch, 8), array(batch, dtype=bool),
        )  # fmt: skip
    assert {name for _, name in calls} == {"mosaic_tpu"}
    # In 8 bits no kernel of a layer is held in another dtype: the smallest would be 33 MB, beside the 36 of all layers.
    check_memory(chip, compiled, pools[0], config.num_layers, temporaries=64 << 20 if config.quantize else None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "config", "layers", "tokens", "context", "kv_dtype"),
    [
        (V5P, narrow(MODELS["qwen2.5-7b"]), 2, 512, 131072, None),
        (V5E, narrow(MODELS["bundled"]), 2, 512, 65536, None),
        (V5E, SMALL_8B, 1, 2048, 65536, "int8"),
        (V6E, SMALL_8B, 1, 2048, 1 << 18, "fp8"),
        (V5P, dataclasses.replace(SMALL_8B, quantize="fp8"), 1, 512, 1 << 18, None),
    ],
    ids=["qwen2.5-7b", "bundled", "llama-3-8b at 64 K", "llama-3-8b at 256 K", "llama-3-8b in fp8"],
)
def test_prefill_compiles_and_fits(
    chip: str, config: ModelConfig, layers: int, tokens: int, context: int, kv_dtype: KVDtype | None
) -> None:
    """A chunk by JAX's splash attention over a cache of any length.

    The activations of 2048 tokens outweigh the pool of a model with few KV heads; one layer in its real width shows
    how many they are, for all layers use the same memory. The weights and pools of the other layers are counted.
    """
    whole = size_of(abstract(config, 1, context, kv_dtype)[1:3])
    spec, weights, pools, table = abstract(dataclasses.replace(config, num_layers=layers), 1, context, kv_dtype)
    angles = array(1, tokens, config.head_dim // 2, dtype=jnp.float32)
    with ops.recorded() as calls:
        compiled = compile_for(
            CHIPS[chip], programs.prefill_chunk, spec, "mosaic_tpu", 1, weights, pools, table, array(1, tokens), angles,
            angles, array(1), array(1),
        )  # fmt: skip
    assert set(calls) == {("extend_attention", "mosaic_tpu")}
    beside = whole - size_of((weights, pools))
    check_memory(CHIPS[chip], compiled, pools[0], layers, temporaries=1 << 30, beside=beside)


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "kind"), [(V6E, "int8"), (V5E, "fp8"), (V5P, "int8")])
def test_quantised_pools_are_appended_to_in_place(chip: str, kind: KVDtype) -> None:
    """Words of 16 bits: pools of 8-bit elements would be copied at every step."""
    config = ModelConfig("llama", 64, 64, 64, 2, 32, 8, 128, 1 << 20)
    pools = jax.eval_shape(lambda: make_pools(config, 4098, PAGE, jnp.bfloat16, kind))

    @functools.partial(jax.jit, donate_argnums=0)
    def decode(pools: Pools, table: jax.Array, positions: jax.Array, qkv: jax.Array) -> Any:
        def step(i: jax.Array, carry: Any) -> Any:
            pools, added = carry
            active = jnp.ones(positions.shape, bool)
            backend = Decode(table, positions + i, active, None, SelectionPolicy(), "xla")
            state = backend.start(pools)
            for layer in range(config.num_layers):
                q, k, v = qkv[..., :4, :] + added, qkv[..., 4, :] + added[..., 0, :], qkv[..., 5, :]
                out, state = backend(layer, q, k, v, state)
                added = added + out
            return state.pools, added

        return jax.lax.fori_loop(0, 8, step, (pools, jnp.zeros_like(qkv[..., :4, :])))

    qkv = array(1, 1, 8, 6, 128, dtype=jnp.bfloat16)
    compiled = compile_for(CHIPS[chip], decode, pools, array(1, 4096), array(1), qkv)
    for leaf in jax.tree.leaves(pools[0]):
        assert pool_copies(compiled.as_text() or "", leaf) == 0
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(pools))
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < 8 << 20
