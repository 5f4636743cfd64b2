"""What a model and its cache take on each of several devices, and how long a decode step must take by its bytes."""

import dataclasses

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.benchmarks.rooflines import COLLECTIVE_SECONDS
from lychee_jax.benchmarks.step import pages_read
from lychee_jax.cache.allocator import pages_for
from lychee_jax.cache.pages import cache_bytes
from lychee_jax.config import ModelConfig
from lychee_jax.engine.device_memory import ACCELERATOR_SHARE
from lychee_jax.errors import UserError
from lychee_jax.models.spec import ModelSpec
from lychee_jax.parallel.layouts import Layout, bytes_on_a_device
from lychee_jax.parallel.mesh import abstract_mesh
from lychee_jax.process import MEMORY_SHARE
from pallas_kernels.types import KVDtype


@dataclasses.dataclass(frozen=True)
class Wish:
    """What is to be run.

    Attributes:
        config: with the dtype and the quantization that the weights will have.
        head_map: who retrieves.
        context: tokens of each sequence.
        batch: sequences that decode together.
    """

    config: ModelConfig
    head_map: HeadMap
    context: int
    batch: int = 1
    policy: SelectionPolicy = dataclasses.field(default_factory=SelectionPolicy)
    page_size: int = 64
    kv_dtype: KVDtype | None = None

    def __post_init__(self) -> None:
        for name in ("context", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        self.policy.validate(self.page_size)
        self.head_map.check(self.config)


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """One number of devices; bytes are those of the device that has most.

    Attributes:
        devices: tensor parallel.
        weight_bytes: of the weights.
        sequence_bytes: of the cache of one sequence.
        sequences: how many such caches fit beside the weights.
        hybrid_ms, dense_ms: a step by the bytes that it reads, and by the messages that it sends.
    """

    devices: int
    weight_bytes: int
    sequence_bytes: int
    sequences: int
    hybrid_ms: float
    dense_ms: float


def plan(wish: Wish, devices: int, *, memory: float, bandwidth: float) -> list[PlanRow]:
    """A row for each power of two of devices up to `devices`, and for `devices` itself.

    Args:
        wish: what is to be run.
        devices: that there are.
        memory: bytes of each.
        bandwidth: bytes a second that each reads.
    """
    if devices < 1:
        raise UserError(f"devices is {devices}; it must be at least 1")
    if not (memory > 0 and bandwidth > 0):
        raise UserError(f"memory is {memory:g} bytes and bandwidth {bandwidth:g} bytes a second; both must be above 0")
    counts = sorted({devices, *(1 << power for power in range(devices.bit_length()))})
    return [_row(wish, count, memory, bandwidth) for count in counts]


def _row(wish: Wish, devices: int, memory: float, bandwidth: float) -> PlanRow:
    config = wish.config
    layout = Layout.of(config, abstract_mesh(devices), wish.head_map.roles) if devices > 1 else None
    spec, shapes = ModelSpec.abstract(config, config.dtype, layout)
    sizes = {name: bytes_on_a_device(shape) for name, shape in zip(spec.names, shapes, strict=True)}
    weights = sum(sizes.values())
    read = weights - (0 if config.tie_word_embeddings else sizes["embed.embedding"])  # one row of it is read
    dtype, pages = np.dtype(jax.numpy.dtype(config.dtype)), pages_for(wish.context, wish.page_size)
    share = config if layout is None else layout.share(config)
    sequence = cache_bytes(share, pages, wish.page_size, dtype, wish.kv_dtype)
    page = sequence // (pages * share.num_layers * share.num_kv_heads)
    picked = min(pages, wish.policy.budget // wish.page_size)
    messages = 0.0 if layout is None else (2 * config.num_layers + 2) * COLLECTIVE_SECONDS

    def step(head_map: HeadMap) -> float:
        cache = wish.batch * page * pages_read(head_map, layout, pages, picked)
        return 1e3 * ((read + cache) / bandwidth + messages)

    room = ACCELERATOR_SHARE * (MEMORY_SHARE * memory - weights)
    return PlanRow(
        devices, weights, sequence, max(0, int(room // sequence)), step(wish.head_map), step(HeadMap.all(config))
    )


def table(wish: Wish, rows: list[PlanRow], name: str) -> str:
    """The rows as text."""
    shown = Table(
        "devices", "weights", "cache of a sequence", "sequences that fit", "hybrid step", "dense step",
        title=f"{name}: {wish.batch} × {wish.context:,} tokens, on each device", title_justify="left",
    )  # fmt: skip
    for column in shown.columns:
        column.justify = "right"
    for row in rows:
        fits = row.sequences >= wish.batch
        shown.add_row(
            str(row.devices), f"{row.weight_bytes / 1e9:.2f} GB", f"{row.sequence_bytes / 1e9:.2f} GB",
            str(row.sequences) if fits else f"{row.sequences}: not enough", f"{row.hybrid_ms:.2f} ms",
            f"{row.dense_ms:.2f} ms",
        )  # fmt: skip
    best = min((row for row in rows if row.sequences >= wish.batch), key=lambda row: row.hybrid_ms, default=None)
    console = Console(width=110)
    with console.capture() as capture:
        console.print(shown)
    said = "none of these is enough" if best is None else f"fastest by these numbers: --tensor-parallel {best.devices}"
    return f"{capture.get()}{said}"
