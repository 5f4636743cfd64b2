"""What the Mosaic GPU kernels share."""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2E = math.log2(math.e)
# Columns of a wgmma: the query heads of a KV head, padded.
COLUMNS = 8
WGMMA = plgpu.Layout.WGMMA
# The same places with one element a register, not two: what 32-bit values need to be written transposed.
WGMMA_SINGLE = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 8), (16, 8), (8, 8), (2,), (1,))), warp_dims=(-8,), lane_dims=(-4, -3), vector_dim=-1
)
# A row of a swizzled tile is 128 bytes: 64 elements of 16 bits.
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
# The same for 32 bits.
TILED_32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]


# Streaming multiprocessors of an H100 or H200, where the device at hand cannot be asked.
_HOPPER_BLOCKS = 132

_target: contextvars.ContextVar[Any] = contextvars.ContextVar("_target", default=None)


@contextlib.contextmanager
def targeting(target: Any) -> Iterator[None]:
    """Trace for another machine than this one: `InterpretGPUParams` runs on the CPU, "cuda" only lowers."""
    token = _target.set(target)
    try:
        yield
    finally:
        _target.reset(token)


@contextlib.contextmanager
def simulated(params: plgpu.InterpretGPUParams | None = None) -> Iterator[None]:
    """Trace for JAX's GPU interpreter: see `pallas_kernels.interpreted`."""
    with targeting(plgpu.InterpretGPUParams() if params is None else params):
        yield


def target() -> Any:
    """What the code is traced for: None is the device at hand."""
    return _target.get()


def interpreter() -> Any:
    """What to give to `plgpu.kernel`'s `interpret`."""
    return None if _target.get() == "cuda" else _target.get()


def multiprocessors() -> int:
    """How many blocks run side by side.

    Raises:
        NotImplementedError: there is no Hopper GPU.
    """
    if _target.get() is not None:
        return _HOPPER_BLOCKS if _target.get() == "cuda" else 6
    device = jax.devices()[0]
    # Later GPUs multiply with other instructions; there, as on earlier ones, it is XLA's turn.
    if device.platform != "gpu" or not str(device.compute_capability).startswith("9."):
        raise NotImplementedError("Mosaic GPU kernels need an NVIDIA Hopper GPU")
    return device.core_count


class Refs:
    """A kernel's references by name."""

    def __init__(self, named: dict[str, Any]):
        self.__dict__.update(named)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


def store(ref: Any, value: jax.Array) -> None:
    """Write in whatever pattern the layout allows (JAX before 0.12 has no `store` and always does)."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def load(ref: Any, layout: Any) -> jax.Array:
    """Read in whatever pattern the layout allows."""
    return plgpu.load(ref, layout=layout, optimized=False)


def full(shape: tuple[int, ...], value: float | int, layout: Any, dtype: Any = jnp.float32) -> jax.Array:
    """A constant in registers."""
    return plgpu.layout_cast(jnp.full(shape, value, dtype), layout)


def along_rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeat a value per column `[shape[1]]` for every row."""
    return jax.lax.broadcast_in_dim(x, shape, [1])


def along_columns(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeat a value per row `[shape[0]]` for every column."""
    return jax.lax.broadcast_in_dim(x, shape, [0])


def iota(shape: tuple[int, ...], dimension: int) -> jax.Array:
    """Row or column numbers."""
    return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=WGMMA)


def multiply(rows: jax.Array, columns: Any, meanwhile: Callable[[], Any]) -> tuple[jax.Array, Any]:
    """`rows · columns` with rows in registers, and what `meanwhile` gives while the tensor cores are at it."""
    if interpreter() is not None:
        # The interpreter multiplies what lies in shared memory only.
        return jnp.dot(rows, columns[...], preferred_element_type=jnp.float32), meanwhile()

    def run(acc: Any) -> tuple[jax.Array, Any]:
        plgpu.wgmma(acc, rows, columns)
        other = meanwhile()
        return acc[...], other

    return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((rows.shape[0], columns.shape[1]), jnp.float32))


def multiply_add(sums: jax.Array, weights: jax.Array, values: Any, meanwhile: Callable[[], None]) -> jax.Array:
    """`sums + weights · values` with weights in registers; `meanwhile` is done while the tensor cores are at it."""
    if interpreter() is not None:
        # The interpreter multiplies what lies in shared memory only. Other than a wgmma, a plain read must be fenced
        # off from the copy that overwrites what was read.
        product = jnp.dot(weights, values[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()
        meanwhile()
        return sums + product

    def multiply(acc: Any) -> None:
        plgpu.wgmma(acc, weights, values)
        meanwhile()

    accumulated: Any = pl.run_state(multiply)(plgpu.WGMMAAccumulatorRef.init(sums))
    return accumulated


def remainder(x: jax.Array, n: int) -> jax.Array:
    """`x mod n` for x ≥ 0."""
    return jax.lax.rem(x, jnp.int32(n))


def quotient(x: jax.Array, n: int | jax.Array) -> jax.Array:
    """`⌊x / n⌋` for x ≥ 0. Python's operator looks at signs, too: a third of the calls that lower a decode step."""
    return jax.lax.div(x, jnp.asarray(n, x.dtype))


def quotient_up(x: jax.Array, n: int | jax.Array) -> jax.Array:
    """`⌈x / n⌉` for x ≥ 0."""
    return quotient(x + (n - 1), n)


def compiler_params() -> plgpu.CompilerParams:
    """Layouts are given by hand, and barriers too: every write to shared memory is committed before it is read."""
    return plgpu.CompilerParams(
        approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
    )


def wait_for_predecessor() -> None:
    """Let the launch overlap the end of the one before it (programmatic dependent launch)."""
    if interpreter() is None:
        plgpu.griddepcontrol_wait()


def let_successor_start() -> None:
    """Let the blocks of the next launch take up places that become free; it waits for this one all the same."""
    if interpreter() is None:
        plgpu.griddepcontrol_launch_dependents()
