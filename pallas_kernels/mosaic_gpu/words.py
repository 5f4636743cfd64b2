"""Attention over words of 8-bit keys and values: they become 16-bit numbers in registers, operands of the wgmma.

A tile is read twice, the second time transposed, as the hardware does with elements of 16 bits alone: words are just
that. Their low bytes are the keys, `[tokens, H]`, their high ones the values, `[H, tokens]`. All 8-bit numbers are
float16 ones, whatever type the queries have: from e4m3 there is one instruction for two numbers, to bfloat16 there is
none. What float16 has too little of is range; powers of two make up for that.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.mosaic_gpu.common import WGMMA, along_columns, interpreter, load, multiply, store
from pallas_kernels.mosaic_gpu.compute import Compute
from pallas_kernels.types import KVDtype

# Tokens whose values are in registers at a time.
_PART = 64
# What 8-bit numbers, queries and weights are while they are multiplied.
NUMBERS = jnp.float16
# Queries of a bfloat16 model may be larger than float16 allows: up to 2^20 they are finite.
_QUERY_UNIT = 2.0**4
# The least weight that is not 0 is 2^-24 of this, the largest 1 of it, with int8 times the largest value / 127.
_WEIGHT_UNIT = {"fp8": 2.0**-15, "int8": 2.0**-10}
# 1024 + n and 1152 as float16: ten bits of mantissa count in units.
_COUNTER, _ZERO = 0x6480, 1152.0


# From a register of two words to one of two keys (0) or values (1): a byte of each word is put where it belongs. Of
# int8, 0x64 above a byte whose sign was turned is 1152 more than the byte.
_PTX = {
    ("fp8", 0): ".reg .b16 a, b; .reg .b32 t; prmt.b32 t, $1, 0, 0x20; mov.b32 {a, b}, t; cvt.rn.f16x2.e4m3x2 $0, a;",
    ("fp8", 1): ".reg .b16 a, b; .reg .b32 t; prmt.b32 t, $1, 0, 0x31; mov.b32 {a, b}, t; cvt.rn.f16x2.e4m3x2 $0, a;",
    ("int8", 0): (".reg .b32 t, c; mov.b32 c, 0x64806480; lop3.b32 t, $1, 0x00ff00ff, c, 0x6a; sub.rn.f16x2 $0, t, c;"),
    ("int8", 1): (
        ".reg .b32 t, c; mov.b32 c, 0x64806480; prmt.b32 t, $1, 0x64646464, 0x4341; xor.b32 t, t, 0x00800080; "
        "sub.rn.f16x2 $0, t, c;"
    ),
}


def inlined_numbers(words: jax.Array, kind: KVDtype, half: int) -> jax.Array:
    """What `numbers` gives, in the fewest instructions; the interpreter does not run them."""

    @plgpu.inline_mgpu(
        arg_types=(WGMMA,), return_type=plgpu.ShapeDtypeStruct(words.shape, jnp.dtype(NUMBERS), layout=WGMMA)
    )  # fmt: skip
    def convert(_: Any, words: Any) -> Any:
        bits, pair = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), ir.F16Type.get())
        registers = np.empty_like(words.registers)
        for place, register in np.ndenumerate(words.registers):
            given = mgpu.utils.bitcast(register, bits)
            made = llvm.inline_asm(bits, [given], "{ " + _PTX[kind, half] + " }", "=r,r")
            registers[place] = mgpu.utils.bitcast(made, pair)
        return mgpu.FragmentedArray(_registers=registers, _layout=words.layout, _is_signed=None)

    inlined: Any = convert  # called without the context
    return inlined(words)


def numbers(words: jax.Array, kind: KVDtype, half: int) -> jax.Array:
    """The keys (half 0) or values (half 1) of words, without their scales."""
    byte = words >> jnp.uint16(8) if half else words
    if kind == "fp8":
        return jax.lax.bitcast_convert_type(byte.astype(jnp.uint8), jnp.float8_e4m3fn).astype(NUMBERS)
    # A signed byte with its sign turned is the byte + 128.
    byte = byte if half else byte & jnp.uint16(0xFF)
    return jax.lax.bitcast_convert_type(byte ^ jnp.uint16(_COUNTER), NUMBERS) - jnp.float16(_ZERO)


class ComputeWords(Compute):
    """`Compute` for tiles of words. A slot is given back as soon as all its words were in registers."""

    def __init__(self, *shared: Any, kind: KVDtype):
        super().__init__(*shared)
        self.kind: KVDtype = kind
        self.numbers = self.refs.numbers.at[self.number]
        self.convert = inlined_numbers if self.plan.config.inlined and interpreter() is None else numbers
        self.scale *= _QUERY_UNIT
        self.unit = _WEIGHT_UNIT[kind]

    def take_query(self) -> None:
        """The query in float16."""
        query = load(self.query.transpose((1, 0)), WGMMA).astype(jnp.float32) * (1.0 / _QUERY_UNIT)
        store(self.numbers.transpose((1, 0)), query.astype(NUMBERS))
        plgpu.commit_smem()

    def multiply_keys(self, slot: jax.Array, real: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
        """Take keys, values and scales; multiply the keys."""
        refs, tile = self.refs, self.refs.tiles.at[slot]
        if self.kind == "fp8":  # every byte of int8 is a number
            self.clear(tile, real)
        keys = self.convert(load(tile, WGMMA), self.kind, 0)

        def take_scales() -> Any:
            if self.kind == "fp8":
                return None
            return [load(refs.scales.at[slot, half], WGMMA.reduce(1)) for half in range(2)]

        scores, scales = multiply(keys, self.numbers.transpose((1, 0)), take_scales)
        if scales is not None:
            scores = scores * along_columns(scales[0], scores.shape)
        # When the keys are gone: registers hold no more. They come while others are waited for.
        return scores, (self.take_values(slot, 0), scales)

    def take_values(self, slot: jax.Array, part: int) -> jax.Array:
        """The values `[H, 64]` of 64 tokens; with the last ones the slot is given back."""
        refs = self.refs
        words = refs.tiles.at[slot, pl.ds(_PART * part, _PART)]
        values = self.convert(load(words.transpose((1, 0)), WGMMA), self.kind, 1)
        if part == self.plan.tile_tokens // _PART - 1:
            if interpreter() is not None:
                # To the interpreter a plain read must be fenced off from the copy that overwrites what was read.
                plgpu.commit_smem()
            plgpu.barrier_arrive(refs.empty.at[slot])
        return values

    def store_weights(
        self, slot: jax.Array, real: tuple[jax.Array, ...], weights: jax.Array, inside: jax.Array, held: Any
    ) -> None:
        """With the scales of the values; those behind the last token may be NaN."""
        del slot, real
        _, scales = held
        weights = weights * (1.0 / self.unit)
        if scales is not None:
            weights = jnp.where(inside, weights * along_columns(scales[1], weights.shape), 0.0)
        store(self.weights.transpose((1, 0)), weights.astype(NUMBERS))

    def multiply_values(self, slot: jax.Array, held: Any) -> jax.Array:
        """Part after part; the values of the next one come while one is multiplied."""
        values, added = held[0], None
        parts = self.plan.tile_tokens // _PART
        for part in range(parts):
            weights = self.weights.at[:, pl.ds(_PART * part, _PART)].transpose((1, 0))
            more = functools.partial(self.take_values, slot, part + 1) if part + 1 < parts else lambda: None
            product, values = multiply(values, weights, more)
            added = product if added is None else added + product
        assert added is not None
        return added
